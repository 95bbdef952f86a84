"""Fan-out: checkpoints -> samples -> features -> metrics.

The unit of work is a chunk, a fixed range of sample indices in batches of a fixed size. A worker commits one file a
chunk; the driver merges them in order. The result does not depend on the number of workers, on the order in which they
finish, or on how often the evaluation was killed; running it again makes the chunks that are missing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import ray
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST, write_json
from ddpm_core.errors import InputError
from ddpm_core.features import FeatureExtractor
from ddpm_core.protocol import Protocol
from ddpm_core.samplers import Method, Spacing
from pipelines.chunks import Chunk, ChunkWorker, SampleSettings, finished_chunk
from pipelines.cluster import check_fits, connect
from pipelines.locations import Location, absolute, location
from pipelines.progress import Progress, Say
from pipelines.reference import extractor_for, reference_statistics
from pipelines.results import GRID, Evaluation, describe_values, measure, read_evaluation, record
from pipelines.saving import mark_best, saved_steps
from pipelines.selection import find_checkpoints
from pipelines.shards import ShardedDataset
from pipelines.tracking import Tracker, default_uri, flatten


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which checkpoints to evaluate, by which protocol, with how many workers."""

    run: str
    """A training run, by its name, its MLflow run id or its folder; or the folder of one checkpoint."""
    checkpoints: str = "all"
    """Which of the run's: all, latest, or steps such as 1000,2000."""
    reference: str | None = None
    """The shards to compare with; the run's own by default."""
    extractor: str = "inception"
    """inception (the FID network of 2015-12-05), pixels (the image averaged to 8x8), or a TorchScript file."""
    samples: int = 50_000
    """How many samples; the Frechet distance depends on it."""
    sampler: Method = "ancestral"
    """ancestral (the paper's), ddim or dpmpp_2m."""
    sampler_steps: int | None = None
    """How many timesteps the sampler visits; all by default."""
    spacing: Spacing = "uniform"
    """How those are spaced."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, as in the paper, or the last ones."""
    seed: int = 0
    """Of the samples' noise."""
    batch_size: int = 250
    """Images a network sees at once; float32 results depend on it in the last digits."""
    chunk_size: int = 500
    """Samples a file holds, the unit of work and of resuming."""
    workers: int | None = None
    """Processes, one a GPU where there are GPUs; as many as the cluster has room for by default."""
    cpus_per_worker: float = 0.9
    """CPUs of each."""
    storage: str = "runs"
    """The folder for results, reachable from every worker."""
    tracking_uri: str | None = None
    """MLflow's; by default MLFLOW_TRACKING_URI, or an SQLite file in the storage folder."""
    experiment: str = "ddpm"
    """The MLflow experiment."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "chunk_size", "workers", "sampler_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: give a positive number")
        if self.samples < 2:
            raise InputError(f"--samples is {self.samples}: a covariance needs 2 or more")


@dataclass(frozen=True)
class EvaluateResult:
    """All evaluations of a call, by ascending step, and the MLflow run that holds them."""

    run_id: str
    evaluations: tuple[Evaluation, ...]

    @property
    def best(self) -> Evaluation:
        """The lowest distance; the earlier checkpoint where two are equal."""
        return min(self.evaluations, key=lambda evaluation: (evaluation.distance, evaluation.step))


def evaluate(config: EvaluateConfig, say: Say = lambda line: None) -> EvaluateResult:
    """Evaluate checkpoints, or finish that, or find it done.

    InputError for a run nobody knows, a reference of another image size, or an extractor that cannot be had.
    """
    storage = absolute(config.storage, option="--storage")
    uri = config.tracking_uri or default_uri(storage)
    name, checkpoints = find_checkpoints(config.run, config.checkpoints, storage, uri)
    dataset = ShardedDataset.open(location(config.reference or checkpoints[0].config["shards"], option="--reference"))
    network = checkpoints[0].unet_config()
    if dataset.shape != (network.image_size, network.image_size, network.in_channels):
        raise InputError(
            f"reference {str(dataset.path)!r} holds images {'x'.join(map(str, dataset.shape))}, but run {name!r} makes "
            f"{network.image_size}x{network.image_size}x{network.in_channels}: give the shards it was trained on"
        )
    spec = extractor_spec(config)
    extractor = extractor_for(spec, dataset)
    protocol = protocol_of(config, checkpoints[0], dataset, extractor)
    if protocol.num_samples <= extractor.dim:
        say(
            f"evaluate: {protocol.num_samples:,} samples for {extractor.dim:,} features: the covariance is singular and the "
            "distance far above its value at large n"
        )
    tracker = Tracker(uri, config.experiment, storage)
    train_run = tracker.find("train", name)
    run = tracker.run(
        "evaluate",
        f"{name}-eval-{protocol.fingerprint[:6]}",
        protocol.fingerprint,
        params=flatten(protocol),
        tags={"ddpm.distance": protocol.distance, "ddpm.data": dataset.name},
        parent=train_run.run_id if train_run else None,
    )
    run.log_json("protocol.json", asdict(protocol))
    folders = {c.step: storage / "evaluate" / name / protocol.fingerprint / c.path.name for c in checkpoints}
    todo = [c for c in checkpoints if not (folders[c.step] / MANIFEST).is_file()]
    if todo:
        reference = reference_statistics(dataset, spec, config.cpus_per_worker, say)
        settings = SampleSettings(
            shape=(network.in_channels, network.image_size, network.image_size),
            method=protocol.sampler,
            steps=protocol.sampler_steps,
            spacing=protocol.spacing,
            weights=protocol.weights,
            seed=protocol.seed,
            batch_size=protocol.batch_size,
            images_to_keep=GRID,
        )
        chunks = chunk_ranges(config.samples, config.chunk_size)
        for checkpoint in sample_chunks(config, todo, folders, chunks, settings, spec, dataset, say):
            folder = folders[checkpoint.step]
            values = measure(folder, chunks, protocol, reference, extractor)
            facts = {
                "step": checkpoint.step,
                "protocol": asdict(protocol),
                "values": values,
                "weights_sha256": checkpoint.weights_sha256(config.weights),
            }
            write_json(folder / MANIFEST, facts)
            say(f"evaluate: step {checkpoint.step:,} has {describe_values(values, protocol)}")
    evaluations = tuple(read_evaluation(folders[checkpoint.step]) for checkpoint in checkpoints)
    for checkpoint, evaluation in zip(checkpoints, evaluations, strict=True):
        record(train_run or run, run, name, checkpoint, evaluation, dataset)
    run.finish()
    if config.weights == "ema":
        keep_best(folders[checkpoints[0].step].parent, checkpoints[0].path.parent, say)
    if not todo:
        say(f"evaluate: {name} is done, {len(checkpoints)} checkpoints under protocol {protocol.fingerprint}")
    return EvaluateResult(run.run_id, evaluations)


def keep_best(evaluated: Path, run: Location, say: Say) -> None:
    """Have the training run keep its best checkpoint, by all finished evaluations of a protocol."""
    found = [read_evaluation(path.parent) for path in evaluated.glob(f"step-*/{MANIFEST}")]
    there = set(saved_steps(run))
    best = min(found, key=lambda evaluation: (evaluation.distance, evaluation.step))
    if best.step in there:
        mark_best(run, best.step)
    else:
        say(f"evaluate: the best checkpoint, step {best.step:,}, is no longer kept: give the run a larger --keep-last")


def extractor_spec(config: EvaluateConfig) -> str:
    """The extractor's name, or the absolute path of its file."""
    spec = config.extractor
    return str(absolute(spec, option="--extractor")) if spec.endswith(".pt") else spec


def protocol_of(
    config: EvaluateConfig, checkpoint: Checkpoint, dataset: ShardedDataset, extractor: FeatureExtractor
) -> Protocol:
    """What the numbers of this evaluation will depend on. InputError for a sampler that cannot be."""
    T = checkpoint.diffusion_config().num_timesteps
    steps = config.sampler_steps or T
    if steps > T:
        raise InputError(f"--sampler-steps is {steps}: the run's schedule has {T} timesteps")
    return Protocol(
        num_samples=config.samples,
        seed=config.seed,
        sampler=config.sampler,
        sampler_steps=steps,
        spacing=config.spacing if steps < T else "uniform",
        clip_denoised=True,
        weights=config.weights,
        batch_size=min(config.batch_size, config.chunk_size),
        precision="float32",
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize=extractor.resize,
        reference=dataset.name,
        reference_sha256=dataset.sha256,
        reference_images=len(dataset),
    )


def chunk_ranges(samples: int, chunk_size: int) -> list[range]:
    """The sample indices of each chunk: exactly 0..samples-1, each once."""
    return [range(start, min(start + chunk_size, samples)) for start in range(0, samples, chunk_size)]


def sample_chunks(
    config: EvaluateConfig,
    checkpoints: Sequence[Checkpoint],
    folders: dict[int, Path],
    chunks: Sequence[range],
    settings: SampleSettings,
    spec: str,
    dataset: ShardedDataset,
    say: Say,
) -> Iterator[Checkpoint]:
    """Make the missing chunks on a pool of workers; yields each checkpoint when all of its chunks are there."""
    resources = connect()
    use_gpu = resources.gpus > 0
    room = resources.gpus if use_gpu else resources.cpus // config.cpus_per_worker
    workers = config.workers or max(1, int(room))
    check_fits(
        resources,
        workers=workers,
        cpus=config.cpus_per_worker,
        gpus=1 if use_gpu else 0,
        what="--workers",
    )
    work = [
        Chunk(number, indices, checkpoint, folders[checkpoint.step])
        for checkpoint in checkpoints
        for number, indices in enumerate(chunks)
        if not finished_chunk(folders[checkpoint.step], number)
    ]
    missing = {checkpoint.step: sum(c.checkpoint.step == checkpoint.step for c in work) for checkpoint in checkpoints}
    yield from (checkpoint for checkpoint in checkpoints if not missing[checkpoint.step])
    if not work:
        return
    progress = Progress("evaluate", sum(len(chunk.indices) for chunk in work), "samples", say)
    options = {
        "num_cpus": config.cpus_per_worker,
        "num_gpus": 1 if use_gpu else 0,
        "max_restarts": -1,  # a lost worker is replaced and its chunk done again: chunks are idempotent
        "max_task_retries": -1,
        # Inside a Tune trial, actors would else be held to the trial's own bundle.
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=None),
    }
    actors = [
        ray.remote(ChunkWorker).options(**options).remote(settings, spec, dataset.shape)
        for _ in range(min(workers, len(work)))
    ]
    by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    try:
        pool = ray.util.ActorPool(actors)
        for step, count in pool.map_unordered(lambda actor, chunk: actor.run.remote(chunk), work):
            progress.advance(count, f"step {step:,}")
            missing[step] -= 1
            if not missing[step]:
                yield by_step[step]
    finally:
        for actor in actors:
            ray.kill(actor)
