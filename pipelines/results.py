"""From a checkpoint's chunks to its numbers, and from there to MLflow."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ddpm_core import images
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.features import FeatureExtractor
from ddpm_core.metrics import FeatureStatistics, FrechetDistance, InceptionScore, frechet_interval
from ddpm_core.protocol import Protocol
from pipelines.chunks import chunk_file
from pipelines.shards import ShardedDataset
from pipelines.tracking import TrackedRun

GRID = 64  # samples shown: the first ones, whatever they look like


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
