"""Reference statistics: a Ray Data pass over the shards, made once for a data set and extractor, and kept with them."""

from typing import Any

import numpy as np
import ray.data
import torch
from safetensors.torch import load, save_file

from ddpm_core.features import FeatureExtractor, load_extractor
from ddpm_core.frechet import FeatureStatistics
from pipelines.cluster import connect
from pipelines.locations import Location, committed
from pipelines.progress import Progress, Say
from pipelines.shards import ShardedDataset

BATCH = 250  # images an extractor sees at once; its float32 features depend on it in the last digits


def extractor_for(spec: str, dataset: ShardedDataset) -> FeatureExtractor:
    """The extractor that `spec` names, for this data set's images. InputError where it cannot be had."""
    height, width, channels = dataset.shape
    return load_extractor(spec, (channels, height, width))


class ShardFeatures:
    """Ray Data's worker: a shard's number -> the statistics of its images' features. Holds the extractor once."""

    def __init__(self, spec: str, dataset: ShardedDataset) -> None:
        self.dataset = dataset
        self.extractor = extractor_for(spec, dataset)

    @torch.no_grad()
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        statistics = FeatureStatistics(self.extractor.dim)
        indices = np.asarray(self.dataset.shard_range(int(row["shard"])))
        for start in range(0, len(indices), BATCH):
            pixels = torch.from_numpy(self.dataset.pixels(indices[start : start + BATCH]))
            features, _ = self.extractor(pixels.permute(0, 3, 1, 2).contiguous())
            statistics.update(features)
        return {
            "shard": int(row["shard"]),
            **{name: value.numpy() for name, value in statistics.statistics().items()},
        }


def reference_path(dataset: ShardedDataset, extractor: FeatureExtractor) -> Location:
    """Where the statistics lie; the name holds the sha256 of the images and of the extractor."""
    name = f"{extractor.name}-{extractor.sha256[:12]}-{dataset.sha256[:12]}.safetensors"
    return dataset.path / "reference" / name


def reference_statistics(dataset: ShardedDataset, spec: str, cpus: float, say: Say) -> FeatureStatistics:
    """The statistics of all images of a data set, read from beside its shards or made and put there. Shards are merged in
    their order, so that the sums do not depend on the workers."""
    extractor = extractor_for(spec, dataset)
    path = reference_path(dataset, extractor)
    if path.is_file():
        return FeatureStatistics.from_statistics(load(path.read_bytes()))
    connect()
    progress = Progress("reference", len(dataset), "images", say)
    numbers = [{"shard": number} for number in range(len(dataset.manifest["shards"]))]
    rows = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(
        ShardFeatures,
        fn_constructor_args=(spec, dataset),
        num_cpus=cpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=len(numbers)),
    )
    early: dict[int, dict[str, torch.Tensor]] = {}  # what came before its turn
    merged, turn = FeatureStatistics(extractor.dim), 0
    for row in rows.iter_rows():
        number = int(row.pop("shard"))
        early[number] = {name: torch.from_numpy(np.array(value)) for name, value in row.items()}
        while turn in early:
            merged.merge_state(early.pop(turn))
            turn += 1
        progress.advance(len(dataset.shard_range(number)))
    with committed(path) as temporary:
        save_file(merged.statistics(), temporary)
    return merged
