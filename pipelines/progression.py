"""How a Frechet distance falls along the chain: of the x_0 predicted at some of its steps (Fig. 10 of the paper)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_core.metrics import FeatureStatistics, FrechetDistance
from ddpm_core.samplers import Spacing, select_timesteps
from pipelines.chunks import load_chunk

PROGRESS = "progress"  # a chunk's features of predictions, float32 [points, n, d]


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


def measure_progress(
    folder: Path, chunks: Sequence[range], timesteps: Sequence[int], reference: FeatureStatistics
) -> list[dict[str, float]]:
    """{"t", "distance"} of the predictions at each timestep; a chunk is held at a time."""
    if not timesteps:
        return []
    distances = [FrechetDistance(reference) for _ in timesteps]
    for indices in chunks:
        features = load_chunk(folder, indices)[0][PROGRESS]
        for distance, part in zip(distances, features, strict=True):
            distance.update(part)
    return [{"t": t, "distance": float(distance.compute())} for t, distance in zip(timesteps, distances, strict=True)]
