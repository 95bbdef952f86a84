"""From a checkpoint's chunks to its numbers, and from there to MLflow."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from ddpm_core.features import FeatureExtractor
from ddpm_core.metrics import (
    ExtrapolatedFrechetDistance,
    FeatureStatistics,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    frechet_interval,
)
from ddpm_core.protocol import Protocol
from pipelines.evaluate.reference import SPLITS, Reference
from pipelines.runtime.chunks import load_chunk
from pipelines.shards.dataset import ShardedDataset
from pipelines.tracking.tracker import TrackedRun

GRID = 64  # samples shown: the first ones, whatever they look like
MIN_CHUNKS = 5  # for an interval
KID_SUBSETS, KID_SUBSET = 100, 1000  # of the kernel distance, as Binkowski et al. have them
COLUMNS = 64  # of features in float64 at once
PR_K = 3  # nearest neighbours, as Kynkaanniemi et al. have them


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of one checkpoint."""

    step: int
    protocol: Protocol
    values: dict[str, float]
    folder: Path
    progress: tuple[dict[str, float], ...] = ()  # {"t", "distance"} of the x_0 predicted along the chain

    @property
    def distance(self) -> float:
        return self.values[self.protocol.distance]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the distance, None where the chunks were too few for one."""
        low, high = (self.values.get(f"{self.protocol.distance}_ci_{end}") for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    def indistinguishable_from(self, other: "Evaluation") -> bool:
        """Whether the intervals overlap. InputError under another protocol."""
        if self.protocol.fingerprint != other.protocol.fingerprint:
            raise InputError(
                f"protocols {self.protocol.fingerprint} and {other.protocol.fingerprint} differ, and so do their numbers: "
                "compare results of one protocol"
            )
        if self.interval is None or other.interval is None:
            return False
        return self.interval[0] <= other.interval[1] and other.interval[0] <= self.interval[1]


class ChunkStatistics(Sequence[FeatureStatistics]):
    """The statistics of each chunk's features, made when they are asked for: 33 MB each at 2048 dimensions."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    @overload
    def __getitem__(self, number: int) -> FeatureStatistics: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[FeatureStatistics]: ...
    def __getitem__(self, number: int | slice) -> FeatureStatistics | Sequence[FeatureStatistics]:
        if isinstance(number, slice):
            return ChunkStatistics(self.features[number])
        statistics = FeatureStatistics(self.features[number].shape[1])
        statistics.update(self.features[number])
        return statistics


def distance_and_interval(
    parts: Sequence[FeatureStatistics], reference: FeatureStatistics
) -> tuple[float, tuple[float, float] | None]:
    """(distance, its interval) of all parts; None where they are too few for one."""
    distance = FrechetDistance(reference)
    for part in parts:
        distance.merge_state(part.statistics())
    return float(distance.compute()), frechet_interval(parts, reference) if len(parts) >= MIN_CHUNKS else None


def measure(
    folder: Path, chunks: Sequence[range], protocol: Protocol, reference: Reference, extractor: FeatureExtractor
) -> dict[str, float]:
    """The metrics of a whole evaluation, its chunks taken in order. InputError where one is damaged."""
    features, logits, seconds = [], [], 0.0
    for indices in chunks:
        tensors, facts = load_chunk(folder, indices)
        features.append(tensors["features"])
        logits.append(tensors.get("logits"))
        seconds += facts["seconds"]
    every, statistics, name = torch.cat(features), reference.statistics, protocol.distance
    distance, interval = distance_and_interval(ChunkStatistics(features), statistics)
    values = {name: distance}
    if interval is not None:
        values |= {f"{name}_ci_low": interval[0], f"{name}_ci_high": interval[1]}
    if len(every) // 10 > extractor.dim:  # below, covariances are singular and the line in 1/n is none
        extrapolated = ExtrapolatedFrechetDistance(statistics, min_samples=len(every) // 10)
        extrapolated.update(every, torch.arange(len(every)))
        values[f"{name}_infinity"] = float(extrapolated.compute())
    values |= neighbour_values(every[: protocol.neighbours], reference.features[: protocol.neighbours], protocol)
    if extractor.num_logits:
        score = InceptionScore(protocol.num_samples, min(SPLITS, protocol.num_samples), extractor.num_logits)
        for indices, part_logits in zip(chunks, logits, strict=True):
            if part_logits is not None:
                score.update(part_logits, torch.tensor(indices))
        mean, std = score.compute()
        values |= {protocol.score: float(mean), f"{protocol.score}_std": float(std)}
    variance = sum(float(columns.double().var(0).sum()) for columns in every.split(COLUMNS, dim=1))
    if (real := float(statistics.moments()[1].trace())) > 0:
        values[protocol.metric("spread")] = math.sqrt(variance / real)
    values["samples_per_second"] = protocol.num_samples / seconds  # of one worker
    return values


def look_at(folder: Path, chunks: Sequence[range], dataset: ShardedDataset) -> dict[str, float]:
    """What the first samples look like beside as many images of a data set: the share of their values that are black or
    white to the last level."""
    shown = first_images(folder, chunks)
    chosen = rng.permutation(0, "saturation", 0, len(dataset))[: len(shown)].sort().values.numpy()
    found = {"saturation": shown, "saturation_data": torch.from_numpy(dataset.pixels(chosen))}
    return {name: float(((each == 0) | (each == 255)).double().mean()) for name, each in found.items()}


def first_images(folder: Path, chunks: Sequence[range]) -> Tensor:
    """The samples that are shown, uint8 [n,h,w,c]."""
    return torch.cat([load_chunk(folder, indices)[0]["images"] for indices in chunks if indices.start < GRID])[:GRID]


def neighbour_values(samples: Tensor, real: Tensor, protocol: Protocol) -> dict[str, float]:
    """What looks at single features rather than at moments: KID, precision and recall."""
    numbers, smaller = torch.arange(len(samples)), min(len(samples), len(real))
    kernel = KernelDistance(real, subsets=KID_SUBSETS, subset_size=min(KID_SUBSET, smaller))
    kernel.update(samples, numbers)
    kid, kid_std = kernel.compute()
    values = {protocol.metric("kid"): float(kid), f"{protocol.metric('kid')}_std": float(kid_std)}
    if smaller > PR_K:
        neighbourhoods = PrecisionRecall(real, PR_K)
        neighbourhoods.update(samples, numbers)
        precision, recall = neighbourhoods.compute()
        values |= {protocol.metric("precision"): float(precision), protocol.metric("recall"): float(recall)}
    return values


def describe_values(values: dict[str, float], protocol: Protocol) -> str:
    """The distance with its interval, and the others, in words."""
    name = protocol.distance
    text = f"{name} {values[name]:.4g}"
    if f"{name}_ci_low" in values:
        text += f" (95 % interval {values[f'{name}_ci_low']:.4g} to {values[f'{name}_ci_high']:.4g})"
    for other in (protocol.score, *(protocol.metric(metric) for metric in ("kid", "precision", "recall"))):
        if other in values:
            text += f", {other} {values[other]:.3g}"
    return text


def compare(one: Evaluation, other: Evaluation, *, across_protocols: bool = False) -> str:
    """Two evaluations in words. InputError under different protocols, unless that is asked for; then it is said."""
    name, theirs = one.protocol.distance, other.protocol.distance
    difference = f"{one.folder}: {name} {one.distance:.4g}; {other.folder}: {theirs} {other.distance:.4g}"
    if one.protocol.fingerprint != other.protocol.fingerprint:
        pairs = ((key, value, getattr(other.protocol, key)) for key, value in vars(one.protocol).items())
        differing = ", ".join(f"{key} {mine} and {their}" for key, mine, their in pairs if mine != their)
        if not across_protocols:
            raise InputError(
                f"the two were measured under different protocols ({differing}), so that their numbers do not compare: evaluate "
                "both alike, or give --across-protocols"
            )
        return f"{difference}; under DIFFERENT PROTOCOLS ({differing}), which may be all of the difference"
    if one.interval is None or other.interval is None:
        return f"{difference}; without intervals, for which an evaluation needs {MIN_CHUNKS} chunks"
    if one.indistinguishable_from(other):
        return f"{difference}; their 95 % intervals overlap: indistinguishable"
    better = min(one, other, key=lambda evaluation: evaluation.distance)
    return f"{difference}; their 95 % intervals do not overlap: {better.folder} is better"


def read_evaluation(folder: Path) -> Evaluation:
    """InputError where there is no finished evaluation of this version."""
    try:
        facts: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        progress = tuple(facts["progress"])
        return Evaluation(facts["step"], Protocol(**facts["protocol"]), facts["values"], folder, progress)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(folder)!r} holds no finished evaluation ({error}): give a folder evaluate/RUN/PROTOCOL/step-... of the "
            "storage, or evaluate again"
        ) from error


def record_samples(run: TrackedRun, evaluation: Evaluation, samples: Path, chunks: Sequence[range]) -> None:
    """The grid of a checkpoint's first samples into MLflow."""
    shown = first_images(samples, chunks)
    columns = min(16, len(shown))
    run.log_bytes(f"samples/{evaluation.folder.name}.png", images.encode_png(images.tile(shown, columns)))
    grid = {
        "tile": list(shown.shape[1:3]),
        "columns": columns,
        "count": len(shown),
        "indices": f"0..{len(shown) - 1}",
        "seed": evaluation.protocol.seed,
    }
    run.log_json("samples/grid.json", grid)
