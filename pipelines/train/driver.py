"""Ray Train: shards -> checkpoints, by data-parallel training that resumes where it was stopped.

The driver is the only writer to MLflow; worker 0 sends it records through a queue. What a resumed run needs, the records
included, lies in its checkpoints. Where MLflow does not answer, the training goes on, and what is for MLflow waits on disk.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import ray
import ray.train
import ray.train.torch
import ray.util.queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import remove_leftovers
from ddpm_core.diffusion import LEARNED
from ddpm_core.errors import DivergedError, InputError
from ddpm_core.protocol import fingerprint
from pipelines.checkpoints.saver import saved_checkpoints
from pipelines.runtime.cluster import Resources, check_fits, connect
from pipelines.runtime.locations import Location, commit_json, location
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.tracking.outbox import Unsent
from pipelines.tracking.retry import at_once, reason
from pipelines.tracking.tracker import STEPS_TAG, TrackedRun, Tracker, default_uri, flatten
from pipelines.train.config import TrainConfig
from pipelines.train.follower import Follower, synchronise, unsent_entries
from pipelines.train.loader import check_shuffle
from pipelines.train.stop import StopRequest, interruptible
from pipelines.train.worker import WorkerTask, run_worker

LAST_WAIT, BRIEF_WAIT = 60.0, 10.0  # seconds for an MLflow that does not answer, when a training is done or was stopped


@dataclass(frozen=True)
class TrainResult:
    """A finished training run."""

    name: str
    run_id: str
    folder: Location
    checkpoints: tuple[Checkpoint, ...]

    @property
    def last(self) -> Checkpoint:
        return self.checkpoints[-1]


def run_name(config: TrainConfig, dataset: ShardedDataset) -> str:
    return f"{config.preset}-{fingerprint(config.identity(dataset.sha256))}"


def train(config: TrainConfig, say: Say = lambda line: None, *, parent_run_id: str | None = None) -> TrainResult:
    """Train, or resume, or find it done.

    InputError for shards, storage or a tracking server that cannot be reached, shards that do not fit the network, more
    workers than the cluster has, or a disk that filled up; DivergedError when loss, gradient or weights stop being
    finite, with the last good checkpoint kept; KeyboardInterrupt after a request to stop, with the newest step saved.
    """
    storage = location(config.storage, option="--storage")
    dataset = ShardedDataset.open(location(config.shards, option="--shards"))
    check_dataset(config, dataset)
    name = run_name(config, dataset)
    folder = storage / "train" / name
    done = checkpoints_until(folder, config.steps)
    finished = bool(done) and done[-1].step == config.steps
    if not finished:  # before anything is written: a refusal leaves no run behind
        resources = connect()
        use_gpu = resources.gpus > 0
        check_fits(
            resources,
            workers=config.min_workers or config.workers,
            cpus=config.cpus_per_worker,
            gpus=1 if use_gpu else 0,
            what="--min-workers" if config.min_workers else "--workers",
        )
    tracker = Tracker(config.tracking_uri or default_uri(storage), config.experiment, storage)
    run = tracker.run(
        "train",
        name,
        fingerprint(config.identity(dataset.sha256)),
        params=flatten(config),
        tags={"ddpm.preset": config.preset, "ddpm.data": dataset.name},
        parent=parent_run_id,
    )
    unsent = unsent_entries(run, folder, say)
    if finished:
        synchronise(run, name, done)
        run.finish()
        say(f"train: {name} is done, {config.steps:,} steps")
        return TrainResult(name, run.run_id, folder, done)

    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    resolved = {**asdict(config), "dataset_sha256": dataset.sha256}
    commit_json(folder / "config.json", resolved)
    run.log_json("config.json", resolved)
    log_data_card(run, dataset)
    run.set_tags(
        {
            STEPS_TAG: str(config.steps),
            "ddpm.workers": str(config.workers),
            "ddpm.device": device_name(resources, config.workers),
        }
    )
    synchronise(run, name, done)

    # Beside the driver, which they cannot outlive anyway: on another node they would die with that.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    outbox, stop = (ray.util.queue.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(2))
    task = WorkerTask(config=config, dataset=dataset, folder=folder, outbox=outbox, stop=stop)
    trainer = ray.train.torch.TorchTrainer(
        run_worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    logged = run.logged_steps("loss")
    unsent.start()
    try:
        with (
            StopRequest() as request,
            Follower(name, config, outbox, stop, request, unsent, logged, say) as follower,
        ):
            interruptible(trainer.fit)
    except BaseException as error:
        conclude(run, unsent, name, (), "FAILED", say)
        cause = input_error(error)
        if cause is not None:
            raise cause from None
        raise
    finally:
        outbox.shutdown()
        stop.shutdown()
    done = checkpoints_until(folder, config.steps)
    if follower.diverged is not None:
        conclude(run, unsent, name, done, "FAILED", say)
        raise DivergedError(follower.diverged["text"], run.run_id)
    if follower.stopped_at is not None and not (done and done[-1].step == config.steps):
        conclude(run, unsent, name, done, "KILLED", say)
        say(f"train: {name} is saved at step {follower.stopped_at:,}")
        raise KeyboardInterrupt
    conclude(run, unsent, name, done, "FINISHED", say)
    return TrainResult(name, run.run_id, folder, done)


def conclude(
    run: TrackedRun,
    unsent: Unsent,
    name: str,
    done: Sequence[Checkpoint],
    status: Literal["FINISHED", "FAILED", "KILLED"],
    say: Say,
) -> None:
    """Bring MLflow up to the end of a training, whose outcome does not depend on whether that succeeds."""
    finished = status == "FINISHED"
    left = unsent.close(LAST_WAIT if finished else BRIEF_WAIT)
    if left:
        say(
            f"train: {left:,} entries for MLflow wait in {str(unsent.folder)!r}: give the same command again when it answers, "
            "and they are sent"
        )
        return
    try:
        with contextlib.nullcontext() if finished else at_once():
            synchronise(run, name, done)
            run.finish(status)
    except Exception as error:
        say(
            f"train: MLflow lacks the end of {name} ({reason(error)}): give the same command again when it answers, and it "
            "is sent"
        )


def input_error(error: BaseException) -> InputError | None:
    """The InputError that a worker raised, such as for a full disk, from within what Ray made of it."""
    failures: list[BaseException] = [error]
    if isinstance(error, ray.train.WorkerGroupError):
        failures += [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
    return next((failure for failure in failures if isinstance(failure, InputError)), None)


def checkpoints_until(folder: Location, step: int) -> tuple[Checkpoint, ...]:
    """The finished checkpoints of a run up to a step; a longer run of the same configuration may have made more.
    InputError where only such a one's are left."""
    found = saved_checkpoints(folder)
    done = tuple(checkpoint for checkpoint in found if checkpoint.step <= step)
    if found and found[-1].step > step and not (done and done[-1].step == step):
        raise InputError(
            f"run {folder.name!r} has gone on to step {found[-1].step:,} and kept no checkpoint at --steps {step:,}: "
            f"give --steps {found[-1].step}, or another --storage"
        )
    return done


def check_dataset(config: TrainConfig, dataset: ShardedDataset) -> None:
    """InputError where the shards' images are not the network's."""
    wanted = (config.unet.image_size, config.unet.image_size, config.unet.in_channels)
    if dataset.shape != wanted:
        raise InputError(
            f"shards {str(dataset.path)!r} hold images {'x'.join(map(str, dataset.shape))}, but preset {config.preset!r} wants "
            f"{'x'.join(map(str, wanted))}: preprocess with --image-size {wanted[0]} --channels {wanted[2]}"
        )
    check_shuffle(config, dataset)
    channels = config.unet.in_channels * (2 if config.diffusion.var_type in LEARNED else 1)
    if (config.unet.out_channels or config.unet.in_channels) != channels:
        raise InputError(
            f"--diffusion.var-type is {config.diffusion.var_type!r}, which wants a network with {channels} output channels: "
            f"give --unet.out-channels {channels}"
        )


def log_data_card(run: TrackedRun, dataset: ShardedDataset) -> None:
    """What the images are, for the report; paths stay in the data set's own manifest."""
    keys = ("name", "images", "shape", "mean", "std", "second_moment", "sha256", "filter")
    source = Path(dataset.manifest["source"]).name
    card = {key: dataset.manifest[key] for key in keys}
    run.log_json("data/card.json", {**card, "source": source, "skipped": len(dataset.manifest["skipped"])})
    run.log_json("data/contact_sheet.json", dataset.manifest["contact_sheet"])
    run.log_bytes("data/contact_sheet.png", (dataset.path / "contact_sheet.png").read_bytes())


def device_name(resources: Resources, workers: int) -> str:
    if not resources.gpus:
        return f"{workers} x CPU"
    kinds = [key.removeprefix("accelerator_type:") for key in ray.cluster_resources() if "accelerator_type:" in key]
    return f"{workers} x {' or '.join(kinds) or 'GPU'}"
