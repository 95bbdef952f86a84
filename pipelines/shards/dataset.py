"""A data set as a folder of shards and a manifest that comes last: what is in it, and any image of it by number.

A shard holds a fixed range of the source's keys (pipelines.shards.dataset.format says how). The folder is local or a URL. Every
reader here hands out [-1, 1], or the pixels that stand for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddpm_core import images
from ddpm_core.commit import read_manifest, verify_files
from ddpm_core.errors import InputError
from pipelines.runtime.locations import Location, location
from pipelines.shards.format import FORMAT, ContentHash, dataset_sha256, image_sha256
from pipelines.shards.order import BatchOrder
from pipelines.shards.reader import ShardReader, opened

WHAT = "data set"


@dataclass(frozen=True)
class ShardedDataset:
    """Images by global index, in the order of the source's keys. Picklable, safe for threads; opens files on first use."""

    path: Location
    manifest: Mapping[str, Any]
    _reader: ShardReader = field(init=False, repr=False, compare=False)
    _order: BatchOrder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_reader", ShardReader(self.path, self.manifest))
        object.__setattr__(self, "_order", BatchOrder(self._reader.groups))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardedDataset, (self.path, self.manifest)

    @classmethod
    def open(cls, path: Location | str) -> "ShardedDataset":
        """From a folder or URL. InputError where there is no finished data set of this format."""
        place = location(path, option="the data set") if isinstance(path, str) else path
        manifest = read_manifest(place, what=WHAT)
        if "shards" not in manifest or "format" not in manifest:
            raise InputError(
                f"{WHAT} {str(place)!r} has a manifest of another kind: give a folder that jobs/preprocess.py made"
            )
        if manifest["format"] != FORMAT:
            raise InputError(
                f"{WHAT} {str(place)!r} is of format {manifest['format']}, not {FORMAT}: make it again with "
                "jobs/preprocess.py, in another folder"
            )
        return cls(place, manifest)

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

    @property
    def nbytes(self) -> int:
        """Of all pixels as uint8."""
        return len(self) * int(np.prod(self.shape))

    @property
    def by_image(self) -> bool:
        """Whether any image can be read alone; otherwise it costs its row group, unless that is among those kept."""
        return self._reader.by_image

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,C]. IndexError beyond 0..len-1; InputError where a file is damaged."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"indices run from {wanted.min()} to {wanted.max()}: they must lie in 0..{len(self) - 1}")
        return self._reader.pixels(wanted)

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """float32 [B,C,H,W] in [-1, 1]."""
        return images.to_float(torch.from_numpy(self.pixels(indices)))

    def keys(self, shard: int) -> list[str]:
        """The source's keys of one shard, in order."""
        groups = range(len(self._reader.groups_of(shard)))
        return [key for group in groups for key in self._reader.table(shard, group, ["key"]).column("key").to_pylist()]

    def shard_range(self, shard: int) -> range:
        """The global indices of one shard."""
        return range(int(self._reader.starts[shard]), int(self._reader.starts[shard + 1]))

    def global_batch(self, seed: int, step: int, batch_size: int, shuffle_window: int | None = None) -> np.ndarray:
        """The images of training step `step`, int64 [batch_size]: a function of the data set's row groups and the
        arguments. The stream of all steps goes through the data set in epochs that visit every image once, each in an
        order of its own, as pipelines.shards.dataset.order.epoch_order says."""
        return self._order.global_batch(seed, step, batch_size, shuffle_window)

    def verify(self, progress: Callable[[int], None] = lambda images: None) -> None:
        """Check everything that the manifest and the files say: sizes and sha256 of files, counts, the digest of every
        image, ascending keys, and the content hashes. InputError names the first thing that differs. `progress` gets
        the number of images checked so far, a row group at a time."""
        verify_files(self.path, self.manifest, what=WHAT)
        last, checked = "", 0
        for shard, facts in enumerate(self.manifest["shards"]):
            content = ContentHash()
            for group in range(len(self._reader.groups_of(shard))):
                table = self._reader.table(shard, group, ["key", "sha256", "image"])
                keys, digests = table.column("key").to_pylist(), table.column("sha256").to_pylist()
                pixels = self._reader.decode(shard, table.column("image"))
                for key, digest, image in zip(keys, digests, pixels, strict=True):
                    if key <= last:
                        raise self._reader.damaged(shard, f"key {key!r} comes after {last!r}")
                    if image_sha256(image) != digest:
                        raise self._reader.damaged(shard, f"image {key!r} differs from its sha256")
                    content.update(key, digest)
                    last = key
                checked += len(keys)
                progress(checked)
            if content.hexdigest() != facts["content_sha256"]:
                raise self._reader.damaged(shard, "its content differs from content_sha256 in the manifest")
        total = dataset_sha256(facts["content_sha256"] for facts in self.manifest["shards"])
        if checked != len(self) or total != self.sha256:
            raise InputError(
                f"{WHAT} {str(self.path)!r} has {checked:,} images with sha256 {total}, not the {len(self):,} with {self.sha256} "
                "that its manifest promises: make it again"
            )

    @staticmethod
    def digests(file: Location) -> list[tuple[str, bytes]]:
        """The keys and the images' sha256 of a shard's file, in order; pixels are not read."""
        with opened(file) as source:
            table = pq.read_table(source, columns=["key", "sha256"])
        return list(zip(table.column("key").to_pylist(), table.column("sha256").to_pylist(), strict=True))
