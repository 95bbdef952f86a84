"""How fast shuffled images come out of shards, against goals, row groups of compressed Parquet, and other formats."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.contest import contest, peer_module
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


def batches_of(size: int, items: Iterator[np.ndarray]) -> int:
    """How many batches, uint8 [size, H, W, C], a peer's items make; each is a flat or shaped array."""
    count = 0
    for first in items:
        torch.from_numpy(np.stack([first, *itertools.islice(items, size - 1)]))
        count += 1
    return count


def written_for_litdata(images: np.ndarray, folder: Path, size: int) -> Callable[[], Iterator[np.ndarray]]:
    litdata, cache = peer_module("litdata"), peer_module("litdata.streaming.cache").Cache
    writer = cache(str(folder), chunk_bytes="64MB")
    for number, image in enumerate(images):
        writer[number] = {"image": image.tobytes()}
    writer.done()
    writer.merge(1)

    def items() -> Iterator[np.ndarray]:
        for item in litdata.StreamingDataset(str(folder), shuffle=True):
            yield np.frombuffer(item["image"], np.uint8)

    return items


def written_for_mosaicml(images: np.ndarray, folder: Path, size: int) -> Callable[[], Iterator[np.ndarray]]:
    streaming = peer_module("streaming")
    shape = ",".join(map(str, images.shape[1:]))
    with streaming.MDSWriter(columns={"image": f"ndarray:uint8:{shape}"}, out=str(folder)) as writer:
        for image in images:
            writer.write({"image": image})
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=size)
    return lambda: (item["image"] for item in dataset)


def written_for_webdataset(images: np.ndarray, folder: Path, size: int) -> Callable[[], Iterator[np.ndarray]]:
    webdataset = peer_module("webdataset")
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%04d.tar", maxsize=64 << 20, verbose=0) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"{number:08d}", "bin": image.tobytes()})
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]

    def items() -> Iterator[np.ndarray]:
        shuffled = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000)
        return (np.frombuffer(item["bin"], np.uint8) for item in shuffled)

    return items


def written_as_pngs(images: np.ndarray, folder: Path, size: int) -> Callable[[], Iterator[np.ndarray]]:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:08d}.png", compress_level=1)
    paths = sorted(folder.iterdir())

    def items() -> Iterator[np.ndarray]:
        return (np.asarray(Image.open(paths[i])) for i in np.random.default_rng(0).permutation(len(paths)))

    return items


PEERS = {
    "litdata": written_for_litdata,
    "mosaicml-streaming": written_for_mosaicml,
    "webdataset": written_for_webdataset,
    "a folder of PNGs": written_as_pngs,
}


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("side", "count", "size"), [(256, 2048, 64), (32, 16_384, 128)])
def test_an_epoch_of_shuffled_batches_against_other_formats(
    tmp_path: Path, side: int, count: int, size: int, peer: str
) -> None:
    """In one thread, from the page cache. Ours draws from the whole set; litdata, mosaicml-streaming and webdataset shuffle
    within some shards or items."""
    images = random_pixels(count, (side, side, 3)) & 0x1F  # so that PNG has something to do
    dataset = write_dataset(tmp_path / "set", images, [count // 4] * 4)
    items = PEERS[peer](images, tmp_path / "peers", size)

    def ours() -> int:
        batches = (dataset.pixels(dataset.global_batch(0, step, size)) for step in range(count // size))
        return sum(len(torch.from_numpy(batch)) > 0 for batch in batches)

    assert ours() == batches_of(size, items()) == count // size
    row = contest(f"an epoch of {count:,} shuffled {side}x{side} images", peer, ours, lambda: batches_of(size, items()))
    assert row.ratio > 1.0
