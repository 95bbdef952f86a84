"""How the Frechet distance and the Inception score of the predicted x_0 change along the chain (Fig. 10 of the paper)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_core.metrics import FeatureStatistics, FrechetDistance, InceptionScore
from ddpm_core.samplers import Spacing, select_timesteps
from pipelines.evaluate.reference import SPLITS
from pipelines.runtime.chunks import load_chunk

PROGRESS, LOGITS = "progress", "progress_logits"  # of a chunk's predictions: float32 [points, n, d] and [points, n, k]


def progress_timesteps(num_timesteps: int, steps: int, spacing: Spacing, points: int) -> tuple[int, ...]:
    """Timesteps at evenly spaced places of a chain, from its first step to its last, in the order of generation."""
    visited = select_timesteps(num_timesteps, steps, spacing)[::-1]
    if points < 2:
        return tuple(visited[:points])
    places = {round(i * (len(visited) - 1) / (points - 1)) for i in range(points)}
    return tuple(visited[place] for place in sorted(places))


def holds_progress(tensors: dict[str, Tensor], facts: dict[str, Any], timesteps: Sequence[int]) -> bool:
    """Whether a chunk has what is asked for."""
    return not timesteps or (PROGRESS in tensors and facts.get(PROGRESS) == list(timesteps))


def stack_progress(batches: Sequence[Sequence[tuple[Tensor, Tensor | None]]]) -> dict[str, Tensor]:
    """A chunk's tensors [points, n, ..] of its batches' (features, logits) at each point."""
    points = list(zip(*batches, strict=True))
    stacked = {PROGRESS: torch.stack([torch.cat([features for features, _ in point]) for point in points])}
    logits = [torch.cat([part for _, part in point if part is not None]) for point in points if point[0][1] is not None]
    return stacked | ({LOGITS: torch.stack(logits)} if logits else {})


def measure_progress(
    folder: Path, chunks: Sequence[range], timesteps: Sequence[int], reference: FeatureStatistics
) -> list[dict[str, float]]:
    """{"t", "distance", "score"} of the predictions at each timestep, the last where the extractor has logits; a chunk is
    held at a time."""
    distances = [FrechetDistance(reference) for _ in timesteps]
    scores: list[InceptionScore] = []
    count = chunks[-1].stop
    for indices in chunks if timesteps else ():
        tensors = load_chunk(folder, indices)[0]
        for distance, part in zip(distances, tensors[PROGRESS], strict=True):
            distance.update(part)
        if LOGITS in tensors:
            classes = tensors[LOGITS].shape[-1]
            scores = scores or [InceptionScore(count, min(SPLITS, count), classes) for _ in timesteps]
            for score, part in zip(scores, tensors[LOGITS], strict=True):
                score.update(part, torch.tensor(indices))
    found = [{"t": t, "distance": float(distance.compute())} for t, distance in zip(timesteps, distances, strict=True)]
    for point, score in zip(found, scores, strict=False):
        point["score"] = float(score.compute()[0])
    return found
