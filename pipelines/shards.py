"""The shard format and random access to it.

A data set is a folder of Parquet files and a manifest that comes last. A file holds a fixed range of the source's keys:
`key` (string) and `image` (fixed-size binary, 8-bit pixels, height x width x channels). The schema's metadata says the
shape and the affine map to [-1, 1]; every reader here hands out [-1, 1].
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.commit import read_manifest, verify_files
from ddpm_core.errors import InputError

WHAT = "data set"
FORMAT = 1
CACHE_BYTES = 2 << 30  # decoded pixels a process keeps; CIFAR-10 is 0.15 GB


def shard_schema(shape: Sequence[int]) -> pa.Schema:
    """The schema of a shard of images [height, width, channels]."""
    facts = {"shape": list(shape), "layout": "HWC", "divide_by": images.SCALE, "then_add": images.OFFSET}
    return pa.schema(
        [("key", pa.string()), ("image", pa.binary(int(np.prod(shape))))],
        metadata={"ddpm": json.dumps(facts, sort_keys=True)},
    )


def write_shard(path: Path, keys: Sequence[str], pixels: np.ndarray, shape: Sequence[int]) -> None:
    """One Parquet file; `pixels` is uint8 [n, *shape]. The bytes depend on the content alone."""
    width = int(np.prod(shape))
    binary = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(keys), [None, pa.py_buffer(np.ascontiguousarray(pixels))]
    )
    table = pa.Table.from_arrays([pa.array(keys, pa.string()), binary], schema=shard_schema(shape))
    pq.write_table(table, path, compression="zstd", row_group_size=1024, use_dictionary=False)


@dataclass(frozen=True)
class ShardedDataset:
    """Images by global index, in the order of the source's keys. Picklable; files are opened on first use."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "ShardedDataset":
        """InputError where there is no finished data set."""
        manifest = read_manifest(Path(path), what=WHAT)
        if manifest.get("format") != FORMAT or "shards" not in manifest:
            raise InputError(
                f"{WHAT} {str(path)!r} has a manifest of another kind: give a folder that jobs/preprocess.py made"
            )
        return cls(Path(path), manifest)

    def __len__(self) -> int:
        return int(self.manifest["images"])

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def sha256(self) -> str:
        """Of all keys and pixels, whatever the files' encoding."""
        return str(self.manifest["sha256"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = self.manifest["shape"]
        return height, width, channels

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        rows = [shard["images"] for shard in self.manifest["shards"]]
        return np.concatenate([[0], np.cumsum(rows)])

    @functools.cached_property
    def _shard(self) -> Any:
        largest = max(shard["images"] for shard in self.manifest["shards"]) * int(np.prod(self.shape))
        return functools.lru_cache(maxsize=max(1, CACHE_BYTES // max(1, largest)))(self._read_shard)

    def _read_shard(self, number: int) -> np.ndarray:
        name = self.manifest["shards"][number]["file"]
        try:
            column = pq.read_table(self.path / name, columns=["image"], memory_map=True).column("image")
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{WHAT} {str(self.path)!r} has an unreadable file {name!r} ({error}): make it again"
            ) from error
        chunks = [
            np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, *self.shape)[chunk.offset :][: len(chunk)]
            for chunk in column.chunks
        ]
        return np.concatenate(chunks)

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,C]. IndexError beyond 0..len-1."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"indices run from {wanted.min()} to {wanted.max()}: they must lie in 0..{len(self) - 1}")
        result = np.empty((len(wanted), *self.shape), np.uint8)
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(numbers):
            at = numbers == number
            result[at] = self._shard(int(number))[wanted[at] - self._starts[number]]
        return result

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """float32 [B,C,H,W] in [-1, 1]."""
        return images.to_float(torch.from_numpy(self.pixels(indices)))

    def keys(self, shard: int) -> list[str]:
        """The source's keys of one shard, in order."""
        name = self.manifest["shards"][shard]["file"]
        return pq.read_table(self.path / name, columns=["key"]).column("key").to_pylist()

    def shard_range(self, shard: int) -> range:
        """The global indices of one shard."""
        return range(int(self._starts[shard]), int(self._starts[shard + 1]))

    def verify(self) -> None:
        """Check every file's size and sha256. InputError names the first that differs."""
        verify_files(self.path, self.manifest, what=WHAT)


def global_batch(num_images: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The images of training step `step`, int64 [batch_size]: a function of its arguments alone.

    The stream of all steps goes through the data set in epochs; each epoch visits every image once, in an order of its
    own. A batch may end one epoch and begin the next.
    """
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    epochs, offsets = np.divmod(positions, num_images)
    batch = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        at = epochs == epoch
        batch[at] = _epoch_order(num_images, seed, int(epoch))[offsets[at]]
    return batch


@functools.lru_cache(maxsize=2)
def _epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    return rng.permutation(seed, "epoch", epoch, num_images).numpy()


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch that belongs to a worker; the parts differ by at most one image."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
