"""The likelihood of a data set, fanned out: bits/dim with its error, rate against distortion (paper, section 4.3).

Batches start at multiples of the batch size among the chosen images, and an image's noise is addressed by its number in
the data set: the numbers do not depend on chunks, workers, order or kills.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ddpm_core import rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST, read_manifest, write_json
from ddpm_core.errors import InputError
from ddpm_core.protocol import fingerprint
from pipelines.checkpoints.select import find_checkpoints
from pipelines.likelihood.config import LikelihoodConfig
from pipelines.likelihood.worker import LikelihoodChunk, LikelihoodProtocol, LikelihoodWorker, merge
from pipelines.runtime.chunks import chunk_ranges
from pipelines.runtime.fan_out import Pool, make_missing
from pipelines.runtime.layout import Run, Storage, local_storage
from pipelines.runtime.locations import location
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import flatten, open_tracker
from pipelines.tracking.uri import tracking_uri


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

    Raises InputError for a run nobody knows, and for images, terms or workers that cannot be.
    """
    storage = local_storage(config.storage)
    run, checkpoints = find_checkpoints(config.run, config.checkpoints, storage, tracking_uri(config, storage))
    dataset = ShardedDataset.open(location(config.data or checkpoints[0].config["shards"], option="--data"))
    protocol = protocol_of(config, run.name, checkpoints[0], dataset)
    mark = fingerprint(protocol)
    folders = {c.step: run.likelihood(mark) / c.path.name for c in checkpoints}
    earlier = {c.step: read_likelihood(folders[c.step], c.weights_sha256(config.weights)) for c in checkpoints}
    found = {step: likelihood for step, likelihood in earlier.items() if likelihood is not None}
    todo = [c for c in checkpoints if c.step not in found]
    with Pool(config.workers, config.cpus_per_worker, say) as pool:
        if todo:
            pool.check_fits()  # before anything is written: a refusal leaves no run behind
        owner, tracked = open_records(config, storage, run, protocol)
        chunks = chunk_ranges(protocol.images, -(-config.chunk_size // protocol.batch_size) * protocol.batch_size)
        for checkpoint in measured(todo, chunks, folders, protocol, dataset, pool, say):
            step, sha256 = checkpoint.step, checkpoint.weights_sha256(config.weights)
            T = checkpoint.diffusion_config().num_timesteps
            found[step] = likelihood = Likelihood(step, sha256, T, protocol, *merge(folders[step], chunks))
            write_json(folders[step] / MANIFEST, asdict(likelihood))
            say(f"likelihood: step {step:,} is done")
            record(owner or tracked, tracked, run.name, checkpoint, likelihood)
    for checkpoint in checkpoints:
        if checkpoint not in todo:
            record(owner or tracked, tracked, run.name, checkpoint, found[checkpoint.step])
    tracked.finish()
    if not todo:
        say(f"likelihood: {run.name} is done, {len(checkpoints)} checkpoints under protocol {mark}")
    return LikelihoodResult(tracked.run_id, tuple(found[c.step] for c in checkpoints))


def open_records(
    config: LikelihoodConfig, storage: Storage[Path], run: Run[Path], protocol: LikelihoodProtocol
) -> tuple[TrackedRun | None, TrackedRun]:
    """(the training's MLflow run, if there is one; that of the protocol's numbers)."""
    tracker, mark = open_tracker(config, storage), fingerprint(protocol)
    owner = tracker.find("train", run.name)
    tracked = tracker.run(
        "likelihood",
        f"{run.name}-likelihood-{mark[:6]}",
        mark,
        params=flatten(protocol),
        tags={"ddpm.data": protocol.data},
        parent=owner.run_id if owner else None,
    )
    tracked.log_json("likelihood/protocol.json", asdict(protocol))
    return owner, tracked


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


def measured(
    checkpoints: Sequence[Checkpoint],
    chunks: Sequence[range],
    folders: Mapping[int, Path],
    protocol: LikelihoodProtocol,
    dataset: ShardedDataset,
    pool: Pool,
    say: Say,
) -> Iterator[Checkpoint]:
    """Make what is missing; yields each checkpoint when its last chunk is there."""
    numbers = chosen_images(protocol.seed, len(dataset), protocol.images)
    weights = {c.step: c.weights_sha256(protocol.weights) for c in checkpoints}
    missing = {c.step: len(chunks) for c in checkpoints}
    for unit, _ in make_missing(
        pool,
        LikelihoodWorker,
        [protocol, dataset],
        [LikelihoodChunk(p, numbers[p.start : p.stop], c, folders[c.step]) for c in checkpoints for p in chunks],
        is_current=lambda unit, _, facts: bool(facts["weights_sha256"] == weights[unit.checkpoint.step]),
        stage="likelihood",
        counted="images",
        note=lambda unit: f"step {unit.checkpoint.step:,}",
        say=say,
    ):
        missing[unit.checkpoint.step] -= 1
        if not missing[unit.checkpoint.step]:
            yield unit.checkpoint


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
