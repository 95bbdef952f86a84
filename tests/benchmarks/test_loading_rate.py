"""How fast shuffled images come out of shards, against goals, and against row groups of compressed Parquet."""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.synthetic_shards import random_pixels, write_dataset
from support.timing import seconds

from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.format import group_sizes
from pipelines.shards.order import epoch_order
from pipelines.train.config import TrainConfig, config_for
from pipelines.train.loader import Loader, share_indices

pytestmark = pytest.mark.bench
PAIRS = 5


class Pixels(Loader):
    """The loader as it is for a CUDA device, which draws the rest itself: only pixels are made ahead."""

    def _make(self, step: int) -> torch.Tensor:
        indices = share_indices(self._config, self._dataset, step, self._rank, self._world_size)
        return torch.from_numpy(self._dataset.pixels(indices))

    def _finish(self, made: torch.Tensor, step: int) -> Any:
        return made


def rate(images: int, action: Callable[[], Any]) -> float:
    return images / seconds(action)


def zstd_copy(dataset: ShardedDataset, path: Path) -> list[Path]:
    """The same images, in row groups of 1,024, compressed with zstd."""
    paths = []
    for shard in range(len(dataset.manifest["shards"])):
        pixels = dataset.pixels(dataset.shard_range(shard))
        width = pixels[0].size
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(pixels), [None, pa.py_buffer(pixels)])
        paths.append(path / f"{shard}.parquet")
        pq.write_table(
            pa.table({"image": column}), paths[-1], compression="zstd", row_group_size=1024, use_dictionary=False
        )
    return paths


def read_row_groups(paths: list[Path], shape: tuple[int, int, int], most: int) -> int:
    """Every row group once, in sequence, until `most` images: the best case of reading by row groups."""
    images = 0
    for path in paths:
        file = pq.ParquetFile(path, memory_map=True)
        for group in range(file.num_row_groups):
            column = file.read_row_group(group, columns=["image"]).column("image").combine_chunks()
            images += len(np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, *shape).copy())
            if images >= most:
                return images
    return images


@pytest.mark.parametrize(
    ("side", "count", "per_shard", "preset", "goal"),
    [(256, 4096, 1024, "lsun_church", 3_000), (32, 50_000, 10_000, "cifar10", 100_000)],
)
def test_shuffled_images_come_faster_than_ten_accelerators_use_them(
    tmp_path: Path, side: int, count: int, per_shard: int, preset: str, goal: int
) -> None:
    shape = (side, side, 3)
    # Five noisy bits of eight, so that zstd has something to do.
    dataset = write_dataset(tmp_path / "set", random_pixels(count, shape) & 0x1F, [per_shard] * (count // per_shard))
    paths = zstd_copy(dataset, tmp_path)
    config: TrainConfig = config_for(preset, shards="unused", steps=10**9)
    size = config.optim.batch_size
    steps = min(count, 8192) // size

    def loaded() -> None:
        with Pixels(config, dataset, rank=0, world_size=1, device=torch.device("cpu")) as batches:
            for _ in range(steps):
                next(batches)

    def direct() -> None:
        for step in range(steps):
            dataset.pixels(dataset.global_batch(0, step, size))

    direct()  # warm up: footers, the epoch's order
    ahead, plain, grouped = [], [], []
    for _ in range(PAIRS):
        ahead.append(rate(steps * size, loaded))
        plain.append(rate(steps * size, direct))
        grouped.append(rate(min(count, 8192), lambda: read_row_groups(paths, shape, 8192)))
    fast = statistics.median(ahead)
    ratio = statistics.median(a / b for a, b in zip(ahead, grouped, strict=True))
    print(
        f"\n{side}x{side}: {fast:,.0f} images/s through the loader, {fast / goal:.1f} x the goal; "
        f"{statistics.median(plain) / goal:.1f} x in one thread; {ratio:.1f} x zstd row groups read in sequence"
    )
    assert fast > goal


def test_the_order_of_three_million_images_takes_seconds() -> None:
    groups = group_sizes([1024] * 2930, (256, 256, 3))
    for window in (None, 8192):
        times = [seconds(functools.partial(epoch_order, groups, 0, 0, window)) for _ in range(3)]
        print(f"\n{groups.sum():,} images, window {window}: an epoch's order in {statistics.median(times):.1f} s")
        assert statistics.median(times) < 20
