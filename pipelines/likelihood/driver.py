"""The likelihood of a data set, fanned out: bits/dim with its error, rate against distortion (paper, section 4.3).

Batches start at multiples of the batch size among the chosen images, and an image's noise is addressed by its number in
the data set: the numbers do not depend on chunks, workers, order or kills.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ddpm_core import rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST, read_manifest, write_json
from ddpm_core.errors import InputError
from ddpm_core.gaussian import Cdf
from ddpm_core.protocol import fingerprint
from pipelines.checkpoints.select import find_checkpoints
from pipelines.likelihood.worker import LikelihoodChunk, LikelihoodProtocol, LikelihoodWorker, merge
from pipelines.runtime.chunks import chunk_ranges, missing_chunks
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.locations import absolute, location
from pipelines.runtime.progress import Progress, Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.tracking.tracker import TrackedRun, Tracker, default_uri, flatten


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """Which checkpoints to measure, on which images, how exactly, with how many workers."""

    run: str
    """A training run, by its name, its MLflow run id or its folder; or the folder of one checkpoint."""
    checkpoints: str = "latest"
    """Which of the run's: all, latest, or steps such as 1000,2000."""
    data: str | None = None
    """The shards whose images are coded; the run's own by default."""
    images: int | None = None
    """How many of them, 5 or more: the first so many of a permutation that the seed decides; all by default."""
    strata: int | None = None
    """By default every term of the bound, T network passes an image. With a number, L_0 and so many other terms, drawn one
    from each stratum of t: an estimate without bias, whose error the interval covers; 32 are good for T = 1000."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, as in the paper, or the last ones."""
    cdf: Cdf = "exact"
    """The normal CDF of the decoder L_0: exact, or tanh for the authors' approximation."""
    seed: int = 0
    """Of the choice of images, the noise and the drawn terms."""
    batch_size: int = 100
    """Images a network sees at once; float32 results depend on it in the last digits."""
    chunk_size: int = 100
    """Images a file holds, the unit of work and of resuming; rounded up to whole batches."""
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
        for name in ("images", "strata", "batch_size", "chunk_size", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: give a positive number")


@dataclass(frozen=True)
class Likelihood:
    """A finished measurement of one checkpoint."""

    step: int
    weights_sha256: str
    num_timesteps: int
    protocol: LikelihoodProtocol
    values: dict[str, float]  # those of `merge`
    curves: dict[str, list[float]] | None  # those of `curves_of`; None for an estimate

    def describe(self) -> str:
        """The measurement in words."""
        bpd, reach = self.values["bpd"], self.values["bpd_ci_high"] - self.values["bpd"]
        strata, T = self.protocol.strata, self.num_timesteps
        how = f"full bound of {T:,} terms" if strata is None else f"estimate from {1 + strata:,} of {T:,} terms"
        where = f"{self.protocol.images:,} images of {self.protocol.data}"
        return f"step {self.step:,}: {bpd:.3f} +- {reach:.3f} bits/dim on {where}, {how}"


@dataclass(frozen=True)
class LikelihoodResult:
    """All measurements of a call, by ascending step, and the MLflow run that holds them."""

    run_id: str
    likelihoods: tuple[Likelihood, ...]


def measure_likelihood(config: LikelihoodConfig, say: Say = lambda line: None) -> LikelihoodResult:
    """Measure the likelihood under checkpoints, or finish that, or find it done.

    InputError for a run nobody knows, and for images, terms or workers that cannot be.
    """
    storage = absolute(config.storage, option="--storage")
    uri = config.tracking_uri or default_uri(storage)
    name, checkpoints = find_checkpoints(config.run, config.checkpoints, storage, uri)
    dataset = ShardedDataset.open(location(config.data or checkpoints[0].config["shards"], option="--data"))
    protocol = protocol_of(config, name, checkpoints[0], dataset)
    mark = fingerprint(protocol)
    folders = {c.step: storage / "evaluate" / name / f"likelihood-{mark}" / c.path.name for c in checkpoints}
    found = {c.step: read_likelihood(folders[c.step], c.weights_sha256(config.weights)) for c in checkpoints}
    todo = [c for c in checkpoints if found[c.step] is None]
    pool = Pool(config.workers, config.cpus_per_worker, say)
    if todo:
        _ = pool.size  # before anything is written: a refusal leaves no run behind
    tracker = Tracker(uri, config.experiment, storage)
    train_run = tracker.find("train", name)
    run = tracker.run(
        "likelihood",
        f"{name}-likelihood-{mark[:6]}",
        mark,
        params=flatten(protocol),
        tags={"ddpm.data": dataset.name},
        parent=train_run.run_id if train_run else None,
    )
    run.log_json("likelihood/protocol.json", asdict(protocol))
    chunks = chunk_ranges(protocol.images, -(-config.chunk_size // protocol.batch_size) * protocol.batch_size)
    numbers = chosen_images(protocol.seed, len(dataset), protocol.images)
    work = [
        LikelihoodChunk(positions, numbers[positions.start : positions.stop], checkpoint, folders[checkpoint.step])
        for checkpoint in todo
        for positions in missing_of(checkpoint, config, folders[checkpoint.step], chunks, say)
    ]
    with pool:
        for checkpoint in finished(checkpoints, work, (protocol, dataset), pool, say):
            step, likelihood = checkpoint.step, found[checkpoint.step]
            if likelihood is None:
                sha256, T = checkpoint.weights_sha256(config.weights), checkpoint.diffusion_config().num_timesteps
                likelihood = found[step] = Likelihood(step, sha256, T, protocol, *merge(folders[step], chunks))
                write_json(folders[step] / MANIFEST, asdict(likelihood))
                say(f"likelihood: step {step:,} is done")
            record(train_run or run, run, name, checkpoint, likelihood)
    run.finish()
    if not todo:
        say(f"likelihood: {name} is done, {len(checkpoints)} checkpoints under protocol {mark}")
    return LikelihoodResult(run.run_id, tuple(each for each in found.values() if each))


def protocol_of(
    config: LikelihoodConfig, name: str, checkpoint: Checkpoint, dataset: ShardedDataset
) -> LikelihoodProtocol:
    """What the numbers will depend on. InputError where images and network, or counts, do not fit."""
    network, T = checkpoint.unet_config(), checkpoint.diffusion_config().num_timesteps
    if dataset.shape != (network.image_size, network.image_size, network.in_channels):
        raise InputError(
            f"data set {str(dataset.path)!r} holds images {'x'.join(map(str, dataset.shape))}, but run {name!r} codes "
            f"{network.image_size}x{network.image_size}x{network.in_channels}: give images of that size as --data"
        )
    images = config.images or len(dataset)
    if not 5 <= images <= len(dataset):
        raise InputError(
            f"--images is {images:,}: data set {str(dataset.path)!r} holds {len(dataset):,}, and an interval needs 5 or more"
        )
    if config.strata is not None and config.strata > T - 1:
        raise InputError(f"--strata is {config.strata}: run {name!r} has {T - 1} terms L_1..L_{T - 1} to draw from")
    return LikelihoodProtocol(
        images=images,
        strata=config.strata,
        seed=config.seed,
        weights=config.weights,
        cdf=config.cdf,
        batch_size=min(config.batch_size, images),
        data=dataset.name,
        data_sha256=dataset.sha256,
    )


def chosen_images(seed: int, total: int, count: int) -> Tensor:
    """The first `count` numbers of a permutation of 0..total-1, ascending, so that files are read from front to back."""
    return rng.permutation(seed, "likelihood-images", 0, total)[:count].sort().values


def missing_of(
    checkpoint: Checkpoint, config: LikelihoodConfig, folder: Path, chunks: Sequence[range], say: Say
) -> list[range]:
    """The chunks that are not there whole, of these very weights."""
    weights = checkpoint.weights_sha256(config.weights)
    return missing_chunks(
        folder,
        chunks,
        lambda _, facts: bool(facts["weights_sha256"] == weights),
        lambda path, _: say(f"likelihood: chunk {str(path)!r} is damaged and is made again"),
    )


def finished(
    checkpoints: Sequence[Checkpoint],
    work: Sequence[LikelihoodChunk],
    arguments: tuple[LikelihoodProtocol, ShardedDataset],
    pool: Pool,
    say: Say,
) -> Iterator[Checkpoint]:
    """Do the work; yields each checkpoint when none of its is left."""
    missing = Counter(chunk.checkpoint.step for chunk in work)
    yield from (checkpoint for checkpoint in checkpoints if not missing[checkpoint.step])
    progress = Progress("likelihood", sum(len(chunk.positions) for chunk in work), "images", say)
    for number, _ in pool.fan_out(LikelihoodWorker, arguments, work):
        checkpoint = work[number].checkpoint
        progress.advance(len(work[number].positions), f"step {checkpoint.step:,}")
        missing[checkpoint.step] -= 1
        if not missing[checkpoint.step]:
            yield checkpoint


def read_likelihood(folder: Path, weights_sha256: str) -> Likelihood | None:
    """The finished measurement of these weights, if there is one."""
    if not (folder / MANIFEST).is_file():
        return None
    facts = read_manifest(folder, what="likelihood")
    found = Likelihood(**{**facts, "protocol": LikelihoodProtocol(**facts["protocol"])})
    return found if found.weights_sha256 == weights_sha256 else None


def record(owner: TrackedRun, run: TrackedRun, name: str, checkpoint: Checkpoint, likelihood: Likelihood) -> None:
    """One checkpoint's numbers into MLflow."""
    protocol = likelihood.protocol
    run.log_json(f"likelihood/{checkpoint.path.name}.json", asdict(likelihood))
    run.log_result(
        owner,
        name,
        checkpoint,
        protocol.weights,
        likelihood.values,
        dataset=protocol.data,
        protocol=fingerprint(protocol),
    )
