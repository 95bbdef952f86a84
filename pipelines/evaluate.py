"""Fan-out: checkpoints -> samples -> features -> metrics.

The unit of work is a chunk, a fixed range of sample indices in batches of a fixed size. A worker commits one file a
chunk; the driver merges them in order. The result does not depend on the number of workers, on the order in which they
finish, or on how often the evaluation was killed; running it again makes the chunks that are missing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import ray.util
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors.torch import load_file

from ddpm_core import images
from ddpm_core.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from ddpm_core.commit import MANIFEST, write_json
from ddpm_core.errors import InputError
from ddpm_core.features import FeatureExtractor
from ddpm_core.frechet import FeatureStatistics, FrechetDistance
from ddpm_core.metrics import InceptionScore, frechet_interval
from ddpm_core.protocol import Protocol
from ddpm_core.samplers import Method, Spacing
from pipelines.chunks import Chunk, ChunkWorker, SampleSettings, chunk_file, finished_chunk
from pipelines.cluster import check_fits, connect
from pipelines.locations import absolute
from pipelines.progress import Progress, Say
from pipelines.reference import extractor_for, reference_statistics
from pipelines.shards import ShardedDataset
from pipelines.tracking import TrackedRun, Tracker, default_uri, flatten, name_of_run

GRID = 64  # samples shown: the first ones, whatever they look like


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
class Evaluation:
    """A finished evaluation of one checkpoint."""

    step: int
    protocol: Protocol
    values: dict[str, float]
    folder: Path

    @property
    def distance(self) -> float:
        return self.values[self.protocol.distance]


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
    name, checkpoints = find_checkpoints(config, storage, uri)
    dataset = ShardedDataset.open(absolute(config.reference or checkpoints[0].config["shards"], option="--reference"))
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
    if not todo:
        say(f"evaluate: {name} is done, {len(checkpoints)} checkpoints under protocol {protocol.fingerprint}")
    return EvaluateResult(run.run_id, evaluations)


def extractor_spec(config: EvaluateConfig) -> str:
    """The extractor's name, or the absolute path of its file."""
    spec = config.extractor
    return str(absolute(spec, option="--extractor")) if spec.endswith(".pt") else spec


def find_checkpoints(config: EvaluateConfig, storage: Path, uri: str) -> tuple[str, tuple[Checkpoint, ...]]:
    """(the run's name, the checkpoints asked for). InputError where there is no such run or step."""
    given = Path(config.run).expanduser()
    if (given / MANIFEST).is_file():
        return given.resolve().parent.name, (open_checkpoint(given.resolve()),)
    candidates = [given, storage / "train" / config.run]
    tracked = name_of_run(uri, config.run)
    if tracked is not None:
        candidates.append(storage / "train" / tracked)
    folder = next((path for path in candidates if any(path.glob("step-*"))), None)
    if folder is None:
        known = sorted(path.name for path in (storage / "train").glob("*") if path.is_dir())
        raise InputError(
            f"run {config.run!r} is not known: give one of those in {str(storage / 'train')!r} ({', '.join(known) or 'none'}), "
            "an MLflow run id, or a checkpoint's folder"
        )
    found = list_checkpoints(folder.resolve())
    if not found:
        raise InputError(f"run {config.run!r} has no finished checkpoint yet: train on, or wait for the first")
    if config.checkpoints == "latest":
        found = found[-1:]
    elif config.checkpoints != "all":
        try:
            steps = {int(step) for step in config.checkpoints.split(",")}
        except ValueError:
            raise InputError(
                f"--checkpoints is {config.checkpoints!r}: give all, latest, or steps such as 1000,2000"
            ) from None
        there = {checkpoint.step for checkpoint in found}
        if steps - there:
            raise InputError(
                f"run {config.run!r} has no checkpoint at step {min(steps - there)}: it has "
                f"{', '.join(map(str, sorted(there)))}"
            )
        found = [checkpoint for checkpoint in found if checkpoint.step in steps]
    return folder.resolve().name, tuple(found)


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


def measure(
    folder: Path,
    chunks: Sequence[range],
    protocol: Protocol,
    reference: FeatureStatistics,
    extractor: FeatureExtractor,
) -> dict[str, float]:
    """The metrics of a whole evaluation, its chunks merged in order."""
    distance = FrechetDistance(reference)
    score = (
        InceptionScore(protocol.num_samples, min(10, protocol.num_samples), extractor.num_logits)
        if extractor.num_logits
        else None
    )
    parts: list[FeatureStatistics] = []
    seconds = 0.0
    for number, indices in enumerate(chunks):
        stored = load_file(folder / chunk_file(number))
        part = FeatureStatistics(extractor.dim)
        part.update(stored["features"])
        parts.append(part)
        distance.merge_state(part.statistics())
        if score is not None:
            score.update(stored["logits"], torch.tensor(indices))
        seconds += json.loads((folder / chunk_file(number)).with_suffix(".json").read_text())["seconds"]
    values = {protocol.distance: float(distance.compute())}
    if len(parts) >= 5:
        low, high = frechet_interval(parts, reference)
        values |= {f"{protocol.distance}_ci_low": low, f"{protocol.distance}_ci_high": high}
    if score is not None:
        mean, std = score.compute()
        values |= {protocol.score: float(mean), f"{protocol.score}_std": float(std)}
    values["samples_per_second"] = protocol.num_samples / seconds  # of one worker
    return values


def describe_values(values: dict[str, float], protocol: Protocol) -> str:
    """The distance with its interval, in words."""
    name = protocol.distance
    text = f"{name} {values[name]:.4g}"
    if f"{name}_ci_low" in values:
        text += f" (95 % interval {values[f'{name}_ci_low']:.4g} to {values[f'{name}_ci_high']:.4g})"
    if protocol.score in values:
        text += f", {protocol.score} {values[protocol.score]:.3g}"
    return text


def read_evaluation(folder: Path) -> Evaluation:
    facts: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return Evaluation(facts["step"], Protocol(**facts["protocol"]), facts["values"], folder)


def record(
    owner: TrackedRun,
    run: TrackedRun,
    name: str,
    checkpoint: Checkpoint,
    evaluation: Evaluation,
    dataset: ShardedDataset,
) -> None:
    """One checkpoint's numbers and sample grid into MLflow."""
    model_id = owner.checkpoint_model(
        f"{name}-step-{checkpoint.step}", checkpoint.step, checkpoint.path, checkpoint.weights_sha256()
    )
    if not run.log_result(
        evaluation.values,
        step=checkpoint.step,
        model_id=model_id,
        dataset=dataset.name,
        dataset_sha256=dataset.sha256,
    ):
        return
    samples = []
    for number in range(GRID):
        path = evaluation.folder / chunk_file(number)
        if not path.is_file() or "images" not in (stored := load_file(path)):
            break
        samples.append(stored["images"])
    shown = torch.cat(samples)[:GRID]
    columns = min(16, len(shown))
    run.log_bytes(f"samples/{checkpoint.path.name}.png", images.encode_png(images.tile(shown, columns)))
    grid = {
        "tile": list(shown.shape[1:3]),
        "columns": columns,
        "count": len(shown),
        "indices": f"0..{len(shown) - 1}",
        "seed": evaluation.protocol.seed,
    }
    run.log_json("samples/grid.json", grid)
