"""Ray Train: shards -> checkpoints, by data-parallel training that resumes from its newest checkpoint.

The driver is the only writer to MLflow; worker 0 sends it records through a queue. What a resumed run needs, the records
included, lies in its checkpoints. While MLflow does not answer, the training goes on, and what is for MLflow waits on disk.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import ray.train
import ray.train.torch
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from ddpm_core import records
from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.commit import remove_leftovers
from ddpm_core.configs import LEARNED
from ddpm_core.errors import DivergedError, InputError, one_line
from ddpm_core.protocol import fingerprint
from pipelines.checkpoints.store import saved_checkpoints, set_aside_damaged
from pipelines.runtime.cluster import (
    Resources,
    check_fits,
    choose_execution,
    connect,
    gpu_kinds,
    has_dashboard,
    kept_by_ray,
)
from pipelines.runtime.messages import MessageQueue, message_queue
from pipelines.runtime.progress import Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import Run, Storage, open_storage
from pipelines.storage.lease import sole_writer
from pipelines.storage.locations import Location, commit_json, location
from pipelines.tracking.origin import data_input
from pipelines.tracking.outbox import Unsent
from pipelines.tracking.retry import without_retries
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import open_tracker
from pipelines.train.config import TrainConfig
from pipelines.train.follower import Follower, logged_steps, synchronise, unsent_entries
from pipelines.train.loader import check_shuffle
from pipelines.train.stop import StopRequest, interruptible
from pipelines.train.worker import WorkerTask, run_worker

TRIAL_ENDS = 60.0  # seconds that a trial whose sweep was killed may take to end
LAST_WAIT, BRIEF_WAIT = 60.0, 10.0  # seconds for an MLflow that does not answer, when a training is done or was stopped


@dataclass(frozen=True)
class TrainResult:
    """A finished training. run_id: MLflow's. checkpoints: by ascending step, at least one."""

    storage: Storage
    run: Run
    run_id: str
    checkpoints: tuple[Checkpoint, ...]

    @property
    def last(self) -> Checkpoint:
        return self.checkpoints[-1]


def run_name(config: TrainConfig, dataset: ShardedDataset) -> str:
    """The preset and the fingerprint of everything that decides the result of a step."""
    return f"{config.preset}-{fingerprint(config.identity(dataset.sha256))}"


def train(config: TrainConfig, say: Say = lambda line: None, *, parent_run_id: str | None = None) -> TrainResult:
    """Train, or resume, or find it done.

    Raises InputError for shards, storage or a tracking server that cannot be reached, shards that do not fit the network,
    more workers than the cluster has, a run that another command trains, or a disk that filled up; DivergedError if loss,
    gradient or weights stop being finite, with the last good checkpoint kept; KeyboardInterrupt after a request to stop,
    with the newest step saved.
    """
    storage = open_storage(config.storage, to_write=True)
    dataset = ShardedDataset.open(location(config.shards, option="--shards"))
    check_dataset(config, dataset)
    execution, reason = choose_execution(config.execution, lambda line: say(f"train: {line}"))
    # As a reader elsewhere finds them: a relative path means something in this process's folder alone.
    config = replace(config, execution=execution, storage=str(storage.root), shards=str(dataset.path))
    run = storage.run(run_name(config, dataset))
    # A trial of Tune's outlives the killed driver of its sweep by a moment.
    with sole_writer(run.folder, "run", say, wait=0.0 if parent_run_id is None else TRIAL_ENDS):
        return train_alone(config, reason, dataset, storage, run, say, parent_run_id)


def train_alone(
    config: TrainConfig,
    reason: str,
    dataset: ShardedDataset,
    storage: Storage,
    run: Run,
    say: Say,
    parent_run_id: str | None,
) -> TrainResult:
    """train(), as the only one who writes to the run's folder. reason: why it is executed so."""
    set_aside_damaged(run.folder, config.steps, say)
    done = checkpoints_until(run, config.steps)
    resources = None
    if not is_finished(done, config):  # before anything is written: a refusal leaves no run behind
        resources = check_resources(config)
    tracked = open_tracker(config, storage).run(
        records.TRAIN,
        run.name,
        fingerprint(config.identity(dataset.sha256)),
        params=records.flatten(config),
        tags={records.PRESET_TAG: config.preset, records.DATA_TAG: dataset.name},
        parent=parent_run_id,
        data=data_input(dataset.name, dataset.sha256, dataset.card, dataset.path, "training"),
    )
    training = TrainingSession(config, dataset, storage, run, tracked, unsent_entries(tracked, run.folder, say), say)
    if resources is None:
        return training.already_done(done)
    training.begin(done, resources, reason)
    with message_queue() as outbox, message_queue() as stop:
        trainer = training.trainer(WorkerTask(config, dataset, run.folder, outbox, stop), use_gpu=resources.gpus > 0)
        follower = training.follow(trainer, outbox, stop)
    if follower.diverged is not None:
        training.diverged(follower.diverged["text"])
    if follower.stopped_at is not None and not is_finished(checkpoints_until(run, config.steps), config):
        training.stopped(follower.stopped_at)
    return training.finished()


@dataclass(frozen=True)
class TrainingSession:
    """A training and where it is recorded, from its begin to each of its endings. unsent: what MLflow has yet to get."""

    config: TrainConfig
    dataset: ShardedDataset
    storage: Storage
    run: Run
    tracked: TrackedRun
    unsent: Unsent
    say: Say

    def already_done(self, done: tuple[Checkpoint, ...]) -> TrainResult:
        """Nothing is left to train; MLflow gets what it lacks."""
        synchronise(self.tracked, self.run.name, done)
        self.tracked.finish()
        self.say(f"train: {self.run.name} is done, {self.config.steps:,} steps")
        return TrainResult(self.storage, self.run, self.tracked.run_id, done)

    def begin(self, done: Sequence[Checkpoint], resources: Resources, reason: str) -> None:
        """Make the run's folder, and record how it is trained."""
        folder, config = self.run.folder, self.config
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        resolved = {**asdict(config), "dataset_sha256": self.dataset.sha256}
        commit_json(folder / records.CONFIG, resolved)
        keep_recipe(folder, config)
        self.tracked.log_json(records.CONFIG, resolved)
        log_data_card(self.tracked, self.dataset)
        self.tracked.set_tags(
            {
                records.STEPS_TAG: str(config.steps),
                records.WORKERS_TAG: str(config.workers),
                records.DEVICE_TAG: device_name(resources, config.workers),
                records.EXECUTION_TAG: reason,
            }
        )
        synchronise(self.tracked, self.run.name, done)

    def trainer(self, task: WorkerTask, *, use_gpu: bool) -> ray.train.torch.TorchTrainer:
        config = self.config
        return Trainer(
            run_worker,
            train_loop_config={"task": task},
            scaling_config=ray.train.ScalingConfig(
                num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=ray.train.RunConfig(
                name=self.run.name,
                **kept_by_ray(self.storage.ray),
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )

    def follow(self, trainer: ray.train.torch.TorchTrainer, outbox: MessageQueue, stop: MessageQueue) -> Follower:
        """Train to an end, whichever it is, with the records passed on. Raises what ended the workers."""
        logged = logged_steps(self.tracked)
        self.unsent.start()
        try:
            with (
                self.tracked.system_metrics(),
                StopRequest() as request,
                Follower(self.run.name, self.config, outbox, stop, request, self.unsent, logged, self.say) as follower,
            ):
                interruptible(trainer.fit)
        except BaseException as error:
            self.conclude("FAILED", ())
            cause = input_error(error)
            if cause is not None:
                raise cause from None
            raise
        return follower

    def diverged(self, text: str) -> NoReturn:
        """Loss, gradient or weights are not finite: raises DivergedError with the story that a worker told."""
        self.conclude("FAILED", checkpoints_until(self.run, self.config.steps))
        raise DivergedError(text, self.tracked.run_id)

    def stopped(self, step: int) -> NoReturn:
        """Somebody asked to stop, and the newest step is saved: raises KeyboardInterrupt."""
        self.conclude("KILLED", checkpoints_until(self.run, self.config.steps))
        self.say(f"train: {self.run.name} is saved at step {step:,}")
        raise KeyboardInterrupt

    def finished(self) -> TrainResult:
        done = checkpoints_until(self.run, self.config.steps)
        self.conclude("FINISHED", done)
        return TrainResult(self.storage, self.run, self.tracked.run_id, done)

    def conclude(self, status: Literal["FINISHED", "FAILED", "KILLED"], done: Sequence[Checkpoint]) -> None:
        """Bring MLflow up to the end of the training, whose outcome does not depend on whether that succeeds."""
        finished = status == "FINISHED"
        left = self.unsent.close(LAST_WAIT if finished else BRIEF_WAIT)
        if left:
            self.say(
                f"train: {left:,} entries for MLflow wait in {str(self.unsent.folder)!r}: give the same command again when "
                "it answers, and they are sent"
            )
            return
        try:
            with contextlib.nullcontext() if finished else without_retries():
                synchronise(self.tracked, self.run.name, done)
                self.tracked.finish(status)
        except Exception as error:
            self.say(
                f"train: MLflow lacks the end of {self.run.name} ({one_line(error)}): give the same command again when it "
                "answers, and it is sent"
            )


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's, without its watch for a controller that died, if there is no dashboard for that to ask every second: a Ray without
    one is this command's own, and ends with it, its placement groups too."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [
            callback
            for callback in callbacks
            if has_dashboard() or not isinstance(callback, PlacementGroupCleanerCallback)
        ]


def check_resources(config: TrainConfig) -> Resources:
    """Connects to the cluster. Raises InputError if the workers do not fit."""
    resources = connect()
    check_fits(
        resources,
        workers=config.min_workers or config.workers,
        cpus=config.cpus_per_worker,
        gpus=1 if resources.gpus else 0,
        what="--min-workers" if config.min_workers else "--workers",
    )
    return resources


def input_error(error: BaseException) -> InputError | None:
    """The InputError that a worker raised, such as for a full disk, from within what Ray made of it."""
    failures: list[BaseException] = [error]
    if isinstance(error, ray.train.WorkerGroupError):
        failures += [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
    return next((failure for failure in failures if isinstance(failure, InputError)), None)


def is_finished(done: Sequence[Checkpoint], config: TrainConfig) -> bool:
    """Whether the last of a run's checkpoints is that of its last step."""
    return bool(done) and done[-1].step == config.steps


def checkpoints_until(run: Run, step: int) -> tuple[Checkpoint, ...]:
    """The finished checkpoints of a run up to a step; a longer run of the same configuration may have made more. Raises
    InputError if only such a one's are left."""
    saved = saved_checkpoints(run.folder)
    if all(checkpoint.step != step for checkpoint in saved):  # an old listing may lack the last one
        with contextlib.suppress(InputError):
            last = open_checkpoint(run.folder / checkpoint_name(step))
            saved = sorted([*saved, last], key=lambda checkpoint: checkpoint.step)
    done = tuple(checkpoint for checkpoint in saved if checkpoint.step <= step)
    if saved and saved[-1].step > step and not (done and done[-1].step == step):
        raise InputError(
            f"run {run.name!r} has gone on to step {saved[-1].step:,} and kept no checkpoint at --steps {step:,}: "
            f"give --steps {saved[-1].step}, or another --storage"
        )
    return done


def check_dataset(config: TrainConfig, dataset: ShardedDataset) -> None:
    """Raises InputError if the shards' images are not the network's."""
    wanted = (config.unet.image_size, config.unet.image_size, config.unet.in_channels)
    if dataset.shape != wanted:
        raise InputError(
            f"shards {str(dataset.path)!r} hold images {'x'.join(map(str, dataset.shape))}, but preset {config.preset!r} wants "
            f"{'x'.join(map(str, wanted))}: preprocess with --image-size {wanted[0]} --channels {wanted[2]}"
        )
    if not contact_sheet_of(dataset).is_file():
        raise InputError(
            f"shards {str(dataset.path)!r} lack their file {contact_sheet_of(dataset).name!r}: copy it too, or make them again"
        )
    check_shuffle(config, dataset)
    channels = config.unet.in_channels * (2 if config.diffusion.var_type in LEARNED else 1)
    if (config.unet.out_channels or config.unet.in_channels) != channels:
        raise InputError(
            f"--diffusion.var-type is {config.diffusion.var_type!r}, which wants a network with {channels} output channels: "
            f"give --unet.out-channels {channels}"
        )


def log_data_card(run: TrackedRun, dataset: ShardedDataset) -> None:
    """What the images are, for the report."""
    run.log_json(records.DATA_CARD, dataset.card)
    run.log_json(records.CONTACT_SHEET_LAYOUT, dataset.manifest["contact_sheet"])
    run.log_bytes(records.CONTACT_SHEET, contact_sheet_of(dataset).read_bytes())


def contact_sheet_of(dataset: ShardedDataset) -> Location:
    return dataset.path / Path(records.CONTACT_SHEET).name


def device_name(resources: Resources, workers: int) -> str:
    if not resources.gpus:
        return f"{workers} x {records.CPU_DEVICE}"
    return f"{workers} x {' or '.join(gpu_kinds()) or 'GPU'}"
