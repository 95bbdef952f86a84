"""One training, from the state that its checkpoints are in to each of its endings, and what MLflow gets of it."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

from ddpm_core import records
from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.commit import remove_leftovers
from ddpm_core.errors import DivergedError, InputError, one_line
from ddpm_core.protocol import fingerprint
from pipelines.checkpoints.store import saved_checkpoints, set_aside_damaged
from pipelines.runtime.cluster import Resources, check_fits, connect, gpu_kinds
from pipelines.runtime.messages import message_queue
from pipelines.runtime.progress import Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import Run, Storage
from pipelines.storage.locations import commit_json
from pipelines.tracking.origin import data_input
from pipelines.tracking.outbox import Unsent
from pipelines.tracking.retry import without_retries
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import open_tracker
from pipelines.train.checks import contact_sheet_of
from pipelines.train.config import TrainConfig
from pipelines.train.follower import Follower, logged_steps, synchronise, unsent_entries
from pipelines.train.stop import StopRequest, interruptible

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


def train_alone(
    config: TrainConfig,
    reason: str,
    dataset: ShardedDataset,
    storage: Storage,
    run: Run,
    say: Say,
    parent_run_id: str | None,
) -> TrainResult:
    """As the only one who writes to the run's folder. reason: why it is executed so."""
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
    follower = training.follow(use_gpu=resources.gpus > 0)
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
        # The workers of a killed driver outlive it by a moment, in which they save and delete on.
        try:
            synchronise(self.tracked, self.run.name, done)
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            synchronise(self.tracked, self.run.name, checkpoints_until(self.run, config.steps))

    def follow(self, *, use_gpu: bool) -> Follower:
        """Train to an end, whichever it is, with the records passed on. Raises what ended the workers."""
        # Here: torch and Ray Train take seconds, in which what is wrong with a command, or done, is said.
        from pipelines.train.ray_trainer import input_error, make_trainer
        from pipelines.train.worker import WorkerTask

        logged = logged_steps(self.tracked)
        with message_queue() as outbox, message_queue() as stop:
            task = WorkerTask(self.config, self.dataset, self.run.folder, outbox, stop)
            trainer = make_trainer(task, self.run, self.storage, use_gpu=use_gpu)
            self.unsent.start()
            try:
                with (
                    self.tracked.system_metrics(),
                    StopRequest() as request,
                    Follower(
                        self.run.name, self.config, outbox, stop, request, self.unsent, logged, self.say
                    ) as follower,
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


def log_data_card(run: TrackedRun, dataset: ShardedDataset) -> None:
    """What the images are, for the report."""
    run.log_json(records.DATA_CARD, dataset.card)
    run.log_json(records.CONTACT_SHEET_LAYOUT, dataset.manifest["contact_sheet"])
    run.log_bytes(records.CONTACT_SHEET, contact_sheet_of(dataset).read_bytes())


def device_name(resources: Resources, workers: int) -> str:
    if not resources.gpus:
        return f"{workers} x {records.CPU_DEVICE}"
    return f"{workers} x {' or '.join(gpu_kinds()) or 'GPU'}"
