"""The likelihood of a data set, fanned out: bits/dim with its error, rate against distortion (paper, section 4.3).

Batches start at multiples of the batch size among the chosen images, and an image's noise is addressed by its number in
the data set: the numbers do not depend on chunks, workers, order or kills.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from ddpm_core.protocol import fingerprint
from ddpm_core.records import DATA_TAG, LIKELIHOOD, LIKELIHOOD_PROTOCOL, RUN_TAG, TRAIN, flatten, likelihood_path
from pipelines.checkpoints.process import other_variance
from pipelines.checkpoints.select import find_checkpoints
from pipelines.likelihood.config import LikelihoodConfig
from pipelines.likelihood.result import Likelihood, LikelihoodProtocol, read_likelihood
from pipelines.runtime.fan_out import Pool, make_missing
from pipelines.runtime.progress import Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import chunk_ranges
from pipelines.storage.layout import Run, Storage, open_storage, shards_of
from pipelines.storage.locations import Location, commit_json, location
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import open_tracker
from pipelines.tracking.uri import tracking_uri

MIN_IMAGES = 5  # that an interval needs


@dataclass(frozen=True)
class LikelihoodResult:
    """All measurements of a call, by ascending step, and the MLflow run that holds them."""

    run_id: str
    likelihoods: tuple[Likelihood, ...]


def measure_likelihood(config: LikelihoodConfig, say: Say = lambda line: None) -> LikelihoodResult:
    """Measure the likelihood under checkpoints, or finish that, or read it if it is done.

    Raises InputError for an unknown run, and for images, terms or workers that do not fit.
    """
    storage = open_storage(config.storage, to_write=True)
    run, checkpoints = find_checkpoints(config.run, config.checkpoints, storage, tracking_uri(config, storage))
    data = config.data or shards_of(checkpoints[0].config, checkpoints[0].path)
    dataset = ShardedDataset.open(location(data, option="--data"))
    protocol = make_protocol(config, run.name, checkpoints[0], dataset)
    folders = {c.step: run.likelihood(fingerprint(protocol)) / c.path.name for c in checkpoints}
    earlier = {c.step: read_likelihood(folders[c.step], c.weights_sha256(config.weights)) for c in checkpoints}
    likelihoods = {step: likelihood for step, likelihood in earlier.items() if likelihood is not None}
    pending = [c for c in checkpoints if c.step not in likelihoods]
    with Pool(config.workers, config.cpus_per_worker, say) as pool:
        if pending:
            pool.check_fits()  # before anything is written: a refusal leaves no run behind
        training, tracked = open_runs(config, storage, run, protocol)
        # Whole batches, so that the same images meet in a batch whatever the chunk size.
        chunks = chunk_ranges(protocol.images, -(-config.chunk_size // protocol.batch_size) * protocol.batch_size)
        for checkpoint in make_chunks(pending, chunks, folders, protocol, dataset, pool):
            likelihood = finish(checkpoint, chunks, folders[checkpoint.step], protocol)
            say(f"likelihood: step {checkpoint.step:,} is done")
            log_likelihood(training or tracked, tracked, run.name, checkpoint, likelihood)
            likelihoods[checkpoint.step] = likelihood
    for checkpoint in checkpoints:
        if checkpoint not in pending:  # a driver that was killed may have left MLflow without it
            log_likelihood(training or tracked, tracked, run.name, checkpoint, likelihoods[checkpoint.step])
    tracked.finish()
    named = replace(config, storage=str(storage.root), data=config.data and str(dataset.path))
    keep_recipe(run.likelihood(fingerprint(protocol)), named)
    if not pending:
        counted = "1 checkpoint" if len(checkpoints) == 1 else f"{len(checkpoints)} checkpoints"
        say(f"likelihood: {run.name} is done, {counted} under protocol {fingerprint(protocol)}")
    return LikelihoodResult(tracked.run_id, tuple(likelihoods[c.step] for c in checkpoints))


def make_protocol(
    config: LikelihoodConfig, name: str, checkpoint: Checkpoint, dataset: ShardedDataset
) -> LikelihoodProtocol:
    """What the numbers will depend on. Raises InputError if images and network, or counts, do not fit. name: the run's."""
    network, T = checkpoint.unet_config(), checkpoint.diffusion_config().num_timesteps
    if dataset.shape != (network.image_size, network.image_size, network.in_channels):
        raise InputError(
            f"data set {str(dataset.path)!r} holds images {'x'.join(map(str, dataset.shape))}, but run {name!r} codes "
            f"{network.image_size}x{network.image_size}x{network.in_channels}: give images of that size as --data"
        )
    images = config.images or len(dataset)
    if not MIN_IMAGES <= images <= len(dataset):
        raise InputError(
            f"--images is {images:,}: data set {str(dataset.path)!r} holds {len(dataset):,}, and an interval needs {MIN_IMAGES} "
            "or more"
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
        var_type=other_variance(checkpoint, config.var_type),
    )


def make_chunks(
    checkpoints: Sequence[Checkpoint],
    chunks: Sequence[range],
    folders: Mapping[int, Location],
    protocol: LikelihoodProtocol,
    dataset: ShardedDataset,
    pool: Pool,
) -> Iterator[Checkpoint]:
    """Make the chunks that are missing; yields each checkpoint when its last one is there. folders: by step."""
    if not checkpoints:
        return
    from pipelines.likelihood.worker import LikelihoodChunk, LikelihoodWorker, choose_images  # here: with torch

    numbers = choose_images(protocol.seed, len(dataset), protocol.images)
    # A training that was started again from nothing has other weights at the same step: its old chunks are made again.
    weights = {c.step: c.weights_sha256(protocol.weights) for c in checkpoints}
    missing = {c.step: len(chunks) for c in checkpoints}
    for unit, _ in make_missing(
        pool,
        LikelihoodWorker,
        [protocol, dataset],
        [LikelihoodChunk(p, numbers[p.start : p.stop], c, folders[c.step]) for c in checkpoints for p in chunks],
        is_current=lambda unit, _, facts: bool(facts.get("weights_sha256") == weights[unit.checkpoint.step]),
        stage="likelihood",
        counted="images",
        note=lambda unit: f"step {unit.checkpoint.step:,}",
        say=pool.say,
    ):
        missing[unit.checkpoint.step] -= 1
        if not missing[unit.checkpoint.step]:
            yield unit.checkpoint


def finish(
    checkpoint: Checkpoint, chunks: Sequence[range], folder: Location, protocol: LikelihoodProtocol
) -> Likelihood:
    """Merge a checkpoint's chunks and commit the result."""
    from pipelines.likelihood.bound import merge_chunks  # here: with torch

    sha256, T = checkpoint.weights_sha256(protocol.weights), checkpoint.diffusion_config().num_timesteps
    likelihood = Likelihood(checkpoint.step, sha256, T, protocol, *merge_chunks(folder, chunks))
    commit_json(folder / MANIFEST, asdict(likelihood))
    return likelihood


def open_runs(
    config: LikelihoodConfig, storage: Storage, run: Run, protocol: LikelihoodProtocol
) -> tuple[TrackedRun | None, TrackedRun]:
    """(the training's MLflow run, if there is one; the run of the protocol's numbers, a child of it)."""
    tracker, digest = open_tracker(config, storage), fingerprint(protocol)
    training = tracker.find(TRAIN, run.name)
    tracked = tracker.run(
        LIKELIHOOD,
        f"{run.name}-likelihood-{digest[:6]}",
        digest,
        params=flatten(protocol),
        tags={RUN_TAG: run.name, DATA_TAG: protocol.data},
        parent=training.run_id if training else None,
    )
    tracked.log_json(LIKELIHOOD_PROTOCOL, asdict(protocol))
    return training, tracked


def log_likelihood(
    owner: TrackedRun, tracked: TrackedRun, name: str, checkpoint: Checkpoint, likelihood: Likelihood
) -> None:
    """Put one checkpoint's numbers into MLflow. owner: the run that has the checkpoint's model. name: the training's."""
    protocol = likelihood.protocol
    tracked.log_json(likelihood_path(checkpoint.step), asdict(likelihood))
    tracked.log_result(
        owner,
        name,
        checkpoint,
        protocol.weights,
        likelihood.values,
        dataset=protocol.data,
        protocol=fingerprint(protocol),
    )
