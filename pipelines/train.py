"""Ray Train: shards -> checkpoints, by data-parallel training that resumes where it was stopped.

The driver is the only writer to MLflow; worker 0 sends it records through a queue. What a resumed run needs, the records
included, lies in its checkpoints.
"""

import queue as queues
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
from pipelines.cluster import Resources, check_fits, connect
from pipelines.loading import check_shuffle
from pipelines.locations import Location, commit_json, location
from pipelines.progress import Progress, Say
from pipelines.saving import saved_checkpoints
from pipelines.shards import ShardedDataset
from pipelines.stopping import StopRequest, interruptible
from pipelines.tracking import TrackedRun, Tracker, default_uri, flatten
from pipelines.training_config import TrainConfig
from pipelines.training_loop import WorkerTask, run_worker


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
        tags={"ddpm.preset": config.preset, "ddpm.code_version": code_version(), "ddpm.data": dataset.name},
        parent=parent_run_id,
    )
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
    run.set_tags({"ddpm.workers": str(config.workers), "ddpm.device": device_name(resources, config.workers)})
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
    try:
        with StopRequest() as request, Follower(run, name, config, outbox, stop, request, say) as follower:
            interruptible(trainer.fit)
    except BaseException as error:
        run.finish("FAILED")
        cause = input_error(error)
        if cause is not None:
            raise cause from None
        raise
    finally:
        outbox.shutdown()
        stop.shutdown()
    done = checkpoints_until(folder, config.steps)
    synchronise(run, name, done)
    if follower.diverged is not None:
        run.log_json("diverged.json", follower.diverged["facts"])
        run.finish("FAILED")
        raise DivergedError(follower.diverged["text"], run.run_id)
    if follower.stopped_at is not None and not (done and done[-1].step == config.steps):
        run.finish("KILLED")
        say(f"train: {name} is saved at step {follower.stopped_at:,}")
        raise KeyboardInterrupt
    run.finish()
    return TrainResult(name, run.run_id, folder, done)


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


def synchronise(run: TrackedRun, name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Give MLflow what the checkpoints know and it does not: a killed driver's records, a model for each checkpoint."""
    logged = run.logged_steps("loss")
    if checkpoints:
        history = [record for record in checkpoints[-1].history if "step" in record]
        run.log_records(record for record in history if record["step"] not in logged)
    for checkpoint in checkpoints:
        run.checkpoint_model(
            f"{name}-step-{checkpoint.step}", checkpoint.step, checkpoint.path, checkpoint.weights_sha256()
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


def code_version() -> str:
    try:
        return version("ddpm-ray")
    except PackageNotFoundError:  # run from an uploaded working directory
        return "not installed"


class Follower:
    """Takes worker 0's records off the queue while the training runs: to MLflow, and to the person who watches."""

    def __init__(
        self,
        run: TrackedRun,
        name: str,
        config: TrainConfig,
        outbox: ray.util.queue.Queue,
        stop: ray.util.queue.Queue,
        request: StopRequest,
        say: Say,
    ) -> None:
        self.run, self.name, self.config, self.outbox, self.say = run, name, config, outbox, say
        self.stop, self.request = stop, request
        self.diverged: Mapping[str, Any] | None = None
        self.stopped_at: int | None = None
        self._logged = run.logged_steps("loss")
        self._progress: Progress | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        passed_on = False
        while True:
            if self.request.asked.is_set() and not passed_on:
                passed_on = True
                self.say("train: stopping, when the newest step is saved; once more to stop at once")
                self.stop.put("stop")
            stopping = self._stop.is_set()  # looked at before the queue is emptied, so that nothing is left in it
            try:
                message = self.outbox.get(timeout=0.5)
            except (queues.Empty, ray.exceptions.RayError):
                if stopping:
                    return
                continue
            self._take(message)

    def _take(self, message: Mapping[str, Any]) -> None:
        if message["kind"] == "start":
            self._progress = Progress("train", self.config.steps, "steps", self.say, done=message["step"])
            workers = message["workers"]
            self.say(
                f"train: {self.name} from step {message['step']:,} on {workers} worker{'' if workers == 1 else 's'}"
            )
        elif message["kind"] == "record":
            record = message["record"]
            if record["step"] not in self._logged:
                self._logged.add(record["step"])
                self.run.log_records([record])
            if self._progress is not None:
                self._progress.at(int(record["step"]), describe_record(record))
        elif message["kind"] == "samples":
            self.run.log_bytes(f"training/samples-{message['step']:08d}.png", message["png"])
        elif message["kind"] == "diverged":
            self.diverged = message
        elif message["kind"] == "stopped":
            self.stopped_at = int(message["step"])


def describe_record(record: Mapping[str, float]) -> str:
    """What a person watches, on one line."""
    parts = [
        f"{record['images_per_second']:,.0f} images/s",
        f"loss {record['loss']:.4f}",
        f"gradient {record['grad_norm']:.3g}",
        f"lr {record['lr']:.2g}",
    ]
    if "model_flops_utilisation" in record:
        parts.append(f"{record['model_flops_utilisation']:.0%} of peak")
    return " | ".join(parts)
