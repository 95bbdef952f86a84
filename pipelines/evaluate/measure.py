"""From the chunks of a checkpoint's samples to its numbers, on a worker: the chunks are read once, whatever is measured."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import overload

import torch
from torch import Tensor

from ddpm_core import metrics, records, rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.protocol import Protocol
from ddpm_core.verdicts import Interval
from pipelines.evaluate.config import MIN_CHUNKS
from pipelines.evaluate.evaluation import describe_values
from pipelines.evaluate.extractor import Extractor
from pipelines.evaluate.reference import SPLITS, Reference, read_reference, reference_path
from pipelines.evaluate.worker import CHAIN, CHAIN_LOGITS
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import load_chunks
from pipelines.storage.locations import Location, commit_json

GRID = 64  # samples shown: the first ones, whatever they look like
KID_SUBSETS, KID_SUBSET = 100, 1000  # of the kernel distance, as Binkowski et al. have them
COLUMNS = 64  # of features in float64 at once
PR_K = 3  # nearest neighbours, as Kynkaanniemi et al. have them


@dataclass(frozen=True)
class MeasuredAgainst:
    """A protocol, the data set that it compares with, and the folder of its results, one in it for each checkpoint."""

    protocol: Protocol
    dataset: ShardedDataset
    results: Location


@dataclass(frozen=True)
class NumbersUnit:
    """All numbers of a checkpoint, whose chunks are all there."""

    checkpoint: Checkpoint


@dataclass(frozen=True)
class PreviewUnit:
    """The distance of a checkpoint on the chunks that are there."""

    checkpoint: Checkpoint
    chunks: tuple[range, ...]


@dataclass
class Measurer:
    """Makes the numbers of checkpoints from their samples. samples: the folder of those, one in it for each checkpoint."""

    comparisons: Sequence[MeasuredAgainst]  # that with the training set first
    extractor: Extractor
    samples: Location
    chunks: Sequence[range]
    timesteps: Sequence[int]
    read: dict[str, Reference] = field(default_factory=dict)  # by protocol

    def run(self, unit: NumbersUnit | PreviewUnit) -> list[str]:
        """Do a unit and return what there is to say of it. Raises InputError if a chunk or a reference is damaged."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(unit, PreviewUnit):
            return self._preview(unit, device)
        return self._measure(unit.checkpoint, device)

    def _measure(self, checkpoint: Checkpoint, device: torch.device) -> list[str]:
        samples = read_samples(self.samples / checkpoint.path.name, self.chunks, self.timesteps, device)
        lines = []
        for comparison in self.comparisons:
            protocol, reference = comparison.protocol, self._reference(comparison)
            values = measure(samples, protocol, reference, comparison.dataset)
            if checkpoint.made_of is not None:
                values[records.EMA_ERROR] = checkpoint.made_of["error"]
            facts = {
                "step": checkpoint.step,
                "protocol": asdict(protocol),
                "values": values,
                "weights_sha256": checkpoint.weights_sha256(protocol.weights),
                "progress": chain_values(samples.chain, reference.statistics),
            }
            commit_json(comparison.results / checkpoint.path.name / MANIFEST, facts)
            lines.append(f"evaluate: step {checkpoint.step:,} has {describe_values(values, protocol)}")
        return lines

    def _preview(self, unit: PreviewUnit, device: torch.device) -> list[str]:
        folder, comparison = self.samples / unit.checkpoint.path.name, self.comparisons[0]
        features = [chunk["features"].to(device) for _, chunk, _ in load_chunks(folder, unit.chunks)]
        value, interval = distance_and_interval(features, self._reference(comparison).statistics.to(device))
        if interval is None:
            return []
        line = (
            f"evaluate: step {unit.checkpoint.step:,} has {comparison.protocol.distance} {value:.4g} "
            f"({interval[0]:.4g} to {interval[1]:.4g}) on its first {sum(map(len, unit.chunks)):,} samples; it falls with their "
            "number"
        )
        return [line]

    def _reference(self, comparison: MeasuredAgainst) -> Reference:
        """Read once, by the workers that come to need it."""
        protocol, dataset = comparison.protocol, comparison.dataset
        if protocol.fingerprint not in self.read:
            path = reference_path(dataset, self.extractor, protocol.neighbours)
            self.read[protocol.fingerprint] = read_reference(path, dataset, self.extractor, protocol.neighbours)
        return self.read[protocol.fingerprint]


@dataclass
class ChainPoint:
    """The x_0 predicted at one timestep of the chain: sums over all samples."""

    t: int
    statistics: metrics.FeatureStatistics
    score: metrics.InceptionScore | None


@dataclass
class Samples:
    """What the chunks of a checkpoint's samples hold.

    features, logits: of each chunk, [n,d] and [n,k], the latter empty without logits; features lie on the device of the
    arithmetic. images: the first GRID samples, uint8 [n,h,w,c]. seconds: that workers took. chain: by descending t.
    """

    chunks: Sequence[range]
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0
    chain: list[ChainPoint] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.chunks[-1].stop

    def score(self, num_logits: int) -> metrics.InceptionScore:
        """An Inception score that waits for these samples' logits."""
        return metrics.InceptionScore(self.count, min(SPLITS, self.count), num_logits)


def read_samples(
    folder: Location, chunks: Sequence[range], timesteps: Sequence[int], device: torch.device | None = None
) -> Samples:
    """Read all chunks, in order, their features to a device, or the CPU; of the chain's predictions at `timesteps` only sums
    are kept, for they are many. Raises InputError if a chunk is damaged."""
    samples, shown = Samples(chunks), []
    for indices, tensors, facts in load_chunks(folder, chunks):
        samples.features.append(tensors["features"].to(device or "cpu"))
        if "logits" in tensors:
            samples.logits.append(tensors["logits"])
        if indices.start < GRID:
            shown.append(tensors["images"])
        samples.seconds += facts["seconds"]
        if timesteps:
            add_chain(samples, indices, timesteps, tensors[CHAIN], tensors.get(CHAIN_LOGITS))
    samples.images = torch.cat(shown)[:GRID]
    return samples


def add_chain(
    samples: Samples, indices: range, timesteps: Sequence[int], features: Tensor, logits: Tensor | None
) -> None:
    """Add a chunk's predictions along the chain, [points,n,d] and [points,n,k]."""
    if not samples.chain:
        dim, classes = features.shape[-1], None if logits is None else logits.shape[-1]
        samples.chain = [
            ChainPoint(t, metrics.FeatureStatistics(dim), None if classes is None else samples.score(classes))
            for t in timesteps
        ]
    for number, point in enumerate(samples.chain):
        point.statistics.update(features[number])
        if point.score is not None and logits is not None:
            point.score.update(logits[number], torch.tensor(indices))


class ChunkFeatures(Sequence[metrics.FeatureSums]):
    """The sums of each chunk's features, made when they are asked for: 33 MB each at 2048 dimensions."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    @overload
    def __getitem__(self, number: int) -> metrics.FeatureSums: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[metrics.FeatureSums]: ...
    def __getitem__(self, number: int | slice) -> metrics.FeatureSums | Sequence[metrics.FeatureSums]:
        if isinstance(number, slice):
            return ChunkFeatures(self.features[number])
        return metrics.FeatureSums.of(self.features[number])


def distance_and_interval(
    features: Sequence[Tensor], reference: metrics.FeatureStatistics
) -> tuple[float, tuple[float, float] | None]:
    """(Frechet distance, its 95 % interval) of the features [n,d] of chunks; None if they are too few for one."""
    chunks = metrics.ChunkSums(ChunkFeatures(features))
    distance = metrics.frechet_distance(*chunks.total.moments(), *reference.moments())
    return distance, metrics.frechet_interval(chunks, reference) if len(chunks) >= MIN_CHUNKS else None


def measure(samples: Samples, protocol: Protocol, reference: Reference, dataset: ShardedDataset) -> dict[str, float]:
    """The metrics of samples against a reference, whose images are the data set's."""
    every = torch.cat(samples.features)
    statistics = reference.statistics.to(every.device)
    values = distance_values(samples.features, every, statistics, protocol)
    values |= neighbour_values(every[: protocol.neighbours], reference.features[: protocol.neighbours], protocol)
    if samples.logits:
        score = samples.score(samples.logits[0].shape[1])
        for indices, logits in zip(samples.chunks, samples.logits, strict=True):
            score.update(logits, torch.tensor(indices))
        mean, std = (float(value) for value in score.compute())
        values |= {protocol.score: mean, protocol.score + records.STD: std}
        values |= ends(protocol.score, metrics.score_interval(mean, std, score.splits))
    variance = sum(float(columns.double().var(0).sum()) for columns in every.split(COLUMNS, dim=1))
    if (real := float(statistics.moments()[1].trace())) > 0:
        values[protocol.metric(records.SPREAD)] = math.sqrt(variance / real)
    values[records.SAMPLES_PER_SECOND] = protocol.num_samples / samples.seconds  # of one worker
    return values | saturation_values(samples.images, dataset)


def distance_values(
    features: Sequence[Tensor], every: Tensor, statistics: metrics.FeatureStatistics, protocol: Protocol
) -> dict[str, float]:
    """The Frechet distance and its extrapolation to infinitely many samples, each with its interval, if there are enough."""
    name = protocol.distance
    distance, interval = distance_and_interval(features, statistics)
    values = {name: distance} | ends(name, interval)
    if len(every) // 10 > every.shape[1]:  # below, covariances are singular and the line in 1/n is none
        metric = metrics.ExtrapolatedFrechetDistance(statistics, min_samples=len(every) // 10)
        metric.update(every, torch.arange(len(every)))
        extrapolation, name = metric.compute(), name + records.INFINITY
        values |= {name: float(extrapolation.distance)} | ends(name, metrics.extrapolation_interval(extrapolation))
    return values


def neighbour_values(samples: Tensor, real: Tensor, protocol: Protocol) -> dict[str, float]:
    """What looks at single features rather than at moments: KID, precision and recall."""
    numbers, smaller = torch.arange(len(samples)), min(len(samples), len(real))
    kernel = metrics.KernelDistance(real, subsets=KID_SUBSETS, subset_size=min(KID_SUBSET, smaller))
    kernel.update(samples, numbers)
    kid, name = kernel.compute(), protocol.metric(records.KID)
    values = {name: float(kid.mean), name + records.STD: float(kid.std)} | ends(name, metrics.kid_interval(kid))
    if smaller > PR_K:
        neighbourhoods = metrics.PrecisionRecall(real, PR_K)
        neighbourhoods.update(samples, numbers)
        manifolds = neighbourhoods.compute()
        name, precision = protocol.metric(records.PRECISION), float(manifolds.precision)
        # Given the reference, each sample is inside its manifold or not, whatever the others are.
        inside = round(precision * len(samples))
        values |= {name: precision} | ends(name, metrics.proportion_interval(inside, len(samples)))
        name = protocol.metric(records.RECALL)
        values |= {name: float(manifolds.recall)} | ends(name, metrics.recall_interval(manifolds))
    return values


def ends(name: str, interval: Interval | None) -> dict[str, float]:
    """A metric's interval as metrics, none if it has none."""
    return {} if interval is None else {name + records.CI_LOW: interval[0], name + records.CI_HIGH: interval[1]}


def saturation_values(shown: Tensor, dataset: ShardedDataset) -> dict[str, float]:
    """The share of values that are black or white to the last level, of samples uint8 [n,h,w,c] and of as many images."""
    chosen = rng.permutation(0, "saturation", 0, len(dataset))[: len(shown)].sort().values.numpy()
    pixels = {records.SATURATION: shown, records.SATURATION_DATA: torch.from_numpy(dataset.pixels(chosen))}
    return {name: float(((each == 0) | (each == 255)).double().mean()) for name, each in pixels.items()}


def chain_values(chain: Sequence[ChainPoint], reference: metrics.FeatureStatistics) -> list[dict[str, float]]:
    """{"t", "distance", "score"} of the x_0 predicted at each timestep (Fig. 10 of the paper); no score without logits."""
    values = []
    for point in chain:
        distance = metrics.FrechetDistance(reference)
        distance.merge_state(point.statistics)
        value = {"t": point.t, "distance": float(distance.compute())}
        if point.score is not None:
            value["score"] = float(point.score.compute()[0])
        values.append(value)
    return values


def first_images(folder: Location, chunks: Sequence[range]) -> Tensor:
    """The samples that are shown, uint8 [n,h,w,c]."""
    shown = load_chunks(folder, [indices for indices in chunks if indices.start < GRID])
    return torch.cat([chunk["images"] for _, chunk, _ in shown])[:GRID]
