"""What is evaluated, what it is compared with, and under which protocols."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.configs import Purpose
from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from ddpm_core.timesteps import progress_timesteps
from pipelines.checkpoints.averages import averaged_checkpoint
from pipelines.checkpoints.process import other_variance, process_of
from pipelines.checkpoints.select import find_checkpoints
from pipelines.evaluate.calibration import check_calibrated
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.evaluation import read_facts
from pipelines.evaluate.extractor import Extractor, describe_extractor
from pipelines.runtime.cluster import choose_execution
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import chunk_ranges
from pipelines.storage.layout import Run, Storage, shards_of
from pipelines.storage.locations import Location, location
from pipelines.tracking.uri import tracking_uri

if TYPE_CHECKING:
    from pipelines.evaluate.worker import SampleSettings

Role = Literal["train", "test"]


@dataclass(frozen=True)
class Subject:
    """Checkpoints of one run, all of one configuration, and what they are compared with.

    chunks: of the sample numbers. timesteps: of the chain, at which predictions of x_0 are measured too.
    """

    config: EvaluateConfig
    run: Run
    checkpoints: tuple[Checkpoint, ...]
    references: Mapping[Role, ShardedDataset]
    extractor: Extractor
    chunks: Sequence[range]
    timesteps: tuple[int, ...]

    def protocol(self, role: Role, purpose: Purpose) -> Protocol:
        """What the numbers will depend on. Raises InputError for a sampler that cannot be."""
        config, dataset, extractor = self.config, self.references[role], self.extractor
        T = self.checkpoints[0].diffusion_config().num_timesteps
        steps = config.steps_of(T)
        return Protocol(
            num_samples=config.samples,
            seed=config.seed,
            purpose=purpose,
            sampler=config.sampler,
            sampler_steps=steps,
            spacing=config.spacing if steps < T else "uniform",
            clip_denoised=True,
            weights="raw" if config.weights == "raw" else "ema",
            batch_size=min(config.batch_size, config.chunk_size),
            precision=config.network_precision,
            extractor=extractor.name,
            extractor_sha256=extractor.sha256,
            resize=extractor.resize,
            reference=dataset.name,
            reference_sha256=dataset.sha256,
            reference_images=len(dataset),
            against=role,
            neighbours=config.neighbours,
            eta=config.eta,
            var_type=other_variance(self.checkpoints[0], config.var_type),
            ema_length=config.ema_length,
        )

    def protocols(self, purpose: Purpose) -> dict[Role, Protocol]:
        """That against each reference."""
        return {role: self.protocol(role, purpose) for role in self.references}

    def results(self, protocol: Protocol) -> Location:
        """The folder of a protocol's results, one in it for each checkpoint."""
        return self.run.results(protocol.fingerprint)

    def samples(self, purpose: Purpose) -> Location:
        """The folder of the samples of one noise, one in it for each checkpoint."""
        return self.run.samples(self.protocol("train", purpose).samples_fingerprint)

    def is_measured(self, checkpoint: Checkpoint, purpose: Purpose) -> bool:
        """Whether finished evaluations of these very weights are there, against every reference."""
        return all(
            is_finished(self.results(protocol) / checkpoint.path.name, checkpoint, protocol, self.timesteps)
            for protocol in self.protocols(purpose).values()
        )

    def settings(self, purpose: Purpose) -> "SampleSettings":
        """What workers need to know to draw the samples of one noise."""
        # Here: with torch and torchmetrics, which what is done already does without.
        from pipelines.evaluate.measure import GRID
        from pipelines.evaluate.worker import SampleSettings

        height, width, channels = self.references["train"].shape
        return SampleSettings(
            protocol=self.protocol("train", purpose),
            shape=(channels, height, width),
            compile=self.config.compile,
            channels_last=self.config.channels_last,
            images_to_keep=max(GRID, self.config.nearest),
            progress=self.timesteps,
        )


def choose_subject(config: EvaluateConfig, storage: Storage, say: Say) -> Subject:
    """The checkpoints that a configuration asks for. Raises InputError if there are none, or they cannot be evaluated."""
    if config.foreign:
        from pipelines.checkpoints.foreign import import_weights  # here: with torch

        chosen = import_weights(config.weights, config.reference, storage)
    else:
        chosen = find_checkpoints(config.run or "", config.checkpoints, storage, tracking_uri(config, storage))
    return open_subject(config, *chosen, storage, say)


def open_subject(
    config: EvaluateConfig, run: Run, checkpoints: tuple[Checkpoint, ...], storage: Storage, say: Say
) -> Subject:
    """Checkpoints of a run, at least one, with their references and extractor. Raises InputError if a reference does not
    fit, or the extractor cannot be had or failed its calibration."""
    if config.ema_length is not None:
        folder = storage.averaged(run.name, config.ema_length)
        checkpoints = tuple(averaged_checkpoint(each, config.ema_length, folder, say) for each in checkpoints)
    first = checkpoints[0]
    given = config.reference or shards_of(first.config, first.path)
    references: dict[Role, ShardedDataset] = {"train": open_reference(given, "--reference", first, run.name)}
    if config.test_reference is not None:
        references["test"] = open_reference(config.test_reference, "--test-reference", first, run.name)
    extractor = describe_extractor(config.extractor, references["train"])
    check_calibrated(extractor, storage)
    if config.samples <= extractor.dim:
        say(
            f"evaluate: {config.samples:,} samples for {extractor.dim:,} features: the covariance is singular and "
            "the distance far above its value at large n"
        )
    config = config.executed(choose_execution(config.execution, lambda line: say(f"evaluate: {line}"))[0])
    process = process_of(first, config.var_type)
    T = process.num_timesteps
    steps = config.steps_of(T)
    spacing = config.spacing if steps < T else "uniform"
    if config.sampler == "ancestral" and process.var_type == "fixedlarge" and 4 * steps <= T:
        say(
            f"evaluate: {steps} of {T:,} ancestral steps leave noise in the samples under fixedlarge: --var-type fixedsmall "
            "and --sampler ddim leave less"
        )
    timesteps = progress_timesteps(process, steps, spacing, config.progress)
    chunks = chunk_ranges(config.samples, config.chunk_size)
    return Subject(config, run, checkpoints, references, extractor, chunks, timesteps)


def open_reference(given: str, option: str, checkpoint: Checkpoint, name: str) -> ShardedDataset:
    """The data set to compare with. Raises InputError if its images are of another size than the network's, or were resized
    by another filter than those it was trained on, which alone moves a Frechet distance."""
    dataset = ShardedDataset.open(location(given, option=option))
    network = checkpoint.unet_config()
    if dataset.shape != (network.image_size, network.image_size, network.in_channels):
        raise InputError(
            f"reference {str(dataset.path)!r} holds images {'x'.join(map(str, dataset.shape))}, but run {name!r} makes "
            f"{network.image_size}x{network.image_size}x{network.in_channels}: give the shards it was trained on"
        )
    try:
        shards = location(shards_of(checkpoint.config, checkpoint.path), option="the run's shards")
        trained = ShardedDataset.open(shards).manifest["filter"]
    except InputError:  # no longer reachable from here
        trained = None
    if trained is not None and dataset.manifest["filter"] != trained:
        raise InputError(
            f"reference {str(dataset.path)!r} was resized by filter {dataset.manifest['filter']!r}, but run {name!r} was "
            f"trained on images resized by {trained!r}: preprocess the reference with --filter {trained}"
        )
    return dataset


def is_finished(folder: Location, checkpoint: Checkpoint, protocol: Protocol, timesteps: Sequence[int]) -> bool:
    """Whether a finished evaluation of these very weights is there, with the points of the chain that are asked for."""
    try:
        facts = read_facts(folder)
        measured = [point["t"] for point in facts["progress"]]
        same = facts["weights_sha256"] == checkpoint.weights_sha256(protocol.weights)
        return bool(same and (not timesteps or measured == list(timesteps)))
    except (OSError, InputError):  # damaged: it is measured again
        return False
