"""A data set: a folder of shards with a manifest, written last, that says what is in it; any image of it by number.

A shard holds a fixed range of the source's keys (pipelines.shards.format). The folder is local or a URL. Images are read
as float32 in [-1, 1], or as the uint8 pixels that stand for them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from ddpm_core.commit import Manifest, check_manifest, damaged_manifest, read_manifest, verify_files
from ddpm_core.errors import InputError, one_line
from ddpm_core.ranges import Seed, up_to
from ddpm_core.typed import ImageCount, shown
from pipelines.shards.format import FORMAT, ContentHash, PixelStorage, Skipped, dataset_sha256, image_sha256
from pipelines.shards.order import BatchOrder
from pipelines.shards.reader import ShardReader, open_for_arrow
from pipelines.storage.locations import Location, location

if TYPE_CHECKING:
    from torch import Tensor

WHAT = "data set"


class ShardFacts(TypedDict):
    """A shard's file, by its path in the folder, the number of its images, and the hash of their keys and pixels."""

    file: str
    images: ImageCount
    content_sha256: str


class SheetLayout(TypedDict):
    """How the contact sheet is laid out: the sides of a tile in pixels, and the number of columns and of tiles."""

    tile: list[Annotated[int, up_to(65_535)]]
    columns: Annotated[int, up_to(1024)]
    count: ImageCount


class Chosen(TypedDict):
    """Which of a source's images were taken: so many, the first by key or drawn with a seed."""

    images: ImageCount
    seed: Seed | None


class DatasetManifest(Manifest):
    """What a data set's manifest.json holds. shape: (height, width, channels). mean, std: of each channel in [-1, 1].
    second_moment: E[x_0^2]."""

    format: int
    name: str
    images: ImageCount
    shape: list[Annotated[int, up_to(65_535)]]
    storage: PixelStorage
    sha256: str
    source: str
    source_fingerprint: str
    source_images: ImageCount
    filter: str
    mean: list[float]
    std: list[float]
    second_moment: float
    skipped: list[Skipped]
    shards: list[ShardFacts]
    contact_sheet: SheetLayout
    chosen: NotRequired[Chosen]  # if not all of the source's images were asked for
    source_others: NotRequired[dict[str, ImageCount]]  # manifests of earlier versions lack the last two
    colour_profiles: NotRequired[dict[str, ImageCount]]


@dataclass(frozen=True)
class ShardedDataset:
    """Images by global index, in the order of the source's keys. Picklable and safe for threads; opens files on first use.

    path: the folder. manifest: what its manifest.json holds.
    """

    path: Location
    manifest: Mapping[str, Any]
    _reader: ShardReader = field(init=False, repr=False, compare=False)
    _order: BatchOrder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_reader", ShardReader(self.path, self.manifest))
        object.__setattr__(self, "_order", BatchOrder(self._reader.group_sizes))

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens files and makes locks and caches of its own.
        return ShardedDataset, (self.path, self.manifest)

    @classmethod
    def open(cls, path: Location | str) -> "ShardedDataset":
        """The data set in a folder or at a URL. Raises InputError if there is no finished data set of this format, or its
        manifest is damaged."""
        folder = location(path, option="the data set") if isinstance(path, str) else path
        manifest = read_manifest(folder, what=WHAT)
        if "shards" not in manifest or "format" not in manifest:
            raise InputError(
                f"data set {str(folder)!r} has a manifest of another kind: give a folder that jobs/preprocess.py made"
            )
        if manifest["format"] != FORMAT:
            raise InputError(
                f"data set {str(folder)!r} is of format {shown(manifest['format'])}, not {FORMAT}: make it again with "
                "jobs/preprocess.py, in another folder"
            )
        checked = check_manifest(folder, manifest, DatasetManifest, what=WHAT)
        total = sum(shard["images"] for shard in checked["shards"])
        shape = checked["shape"]
        if len(shape) != 3 or {len(checked["mean"]), len(checked["std"])} != {shape[2]}:
            problem = (
                f"shape is {shape}, where height, width and channels are wanted, with a mean and std for each channel"
            )
            raise damaged_manifest(folder, problem, WHAT)
        if checked["images"] != total:
            raise damaged_manifest(folder, f"images is {checked['images']:,}, and its shards hold {total:,}", WHAT)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self.manifest["images"])

    @property
    def name(self) -> str:
        """What the data set is called, such as church_outdoor_train."""
        return str(self.manifest["name"])

    @property
    def sha256(self) -> str:
        """The sha256 of all keys and pixels, whatever the files' encoding."""
        return str(self.manifest["sha256"])

    @property
    def card(self) -> dict[str, Any]:
        """What the images are, for MLflow and reports; paths and keys stay in the manifest."""
        keys = ("name", "images", "shape", "mean", "std", "second_moment", "sha256", "filter")
        source = Path(self.manifest.get("source", "")).name
        skipped = len(self.manifest.get("skipped", ()))
        return {**{key: self.manifest.get(key) for key in keys}, "source": source, "skipped": skipped}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = self.manifest["shape"]
        return height, width, channels

    @property
    def nbytes(self) -> int:
        """The size of all pixels as uint8, in bytes."""
        return len(self) * int(np.prod(self.shape))

    @property
    def by_image(self) -> bool:
        """Whether an image can be read alone; otherwise its whole row group is read, unless that is in the cache."""
        return self._reader.by_image

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,C]. Raises IndexError outside 0..len-1, InputError if a file is damaged."""
        numbers = np.asarray(indices, np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(
                f"indices run from {numbers.min()} to {numbers.max()}: they must lie in 0..{len(self) - 1}"
            )
        return self._reader.pixels(numbers)

    def images(self, indices: Sequence[int] | np.ndarray) -> "Tensor":
        """float32 [B,C,H,W] in [-1, 1]. Raises as `pixels` does."""
        import torch  # here: who reads pixels or the manifest alone does without

        from ddpm_core import images

        return images.to_float(torch.from_numpy(self.pixels(indices)))

    def keys(self, shard: int) -> list[str]:
        """The source's keys of one shard, in order."""
        groups = range(len(self._reader.groups_of(shard)))
        return [key for group in groups for key in self._reader.table(shard, group, ["key"]).column("key").to_pylist()]

    def shard_range(self, shard: int) -> range:
        """The global indices of one shard."""
        return range(int(self._reader.shard_starts[shard]), int(self._reader.shard_starts[shard + 1]))

    def global_batch(self, seed: int, step: int, batch_size: int, shuffle_window: int | None = None) -> np.ndarray:
        """The images of training step `step`, int64 [batch_size]: a function of the data set's row groups and the arguments.

        The stream of all steps goes through the data set in epochs that visit every image once, each in an order of its
        own (pipelines.shards.order.epoch_order).
        """
        return self._order.global_batch(seed, step, batch_size, shuffle_window)

    def verify(self, progress: Callable[[int], None] = lambda images: None) -> None:
        """Check all that the manifest and the files say: sizes and sha256 of files, counts, the digest of every image,
        ascending keys, and the content hashes. Raises InputError, which names the first difference.

        progress: called with the number of images checked so far, after each row group.
        """
        verify_files(self.path, self.manifest, what="data set")
        last_key, checked = "", 0
        for shard, facts in enumerate(self.manifest["shards"]):
            content = ContentHash()
            for group in range(len(self._reader.groups_of(shard))):
                table = self._reader.table(shard, group, ["key", "sha256", "image"])
                keys, digests = table.column("key").to_pylist(), table.column("sha256").to_pylist()
                pixels = self._reader.decode(shard, table.column("image"))
                for key, digest, image in zip(keys, digests, pixels, strict=True):
                    if key <= last_key:
                        raise self._reader.damaged(shard, f"key {key!r} comes after {last_key!r}")
                    if image_sha256(image) != digest:
                        raise self._reader.damaged(shard, f"image {key!r} differs from its sha256")
                    content.update(key, digest)
                    last_key = key
                checked += len(keys)
                progress(checked)
            if content.hexdigest() != facts["content_sha256"]:
                raise self._reader.damaged(shard, "its content differs from content_sha256 in the manifest")
        total = dataset_sha256(facts["content_sha256"] for facts in self.manifest["shards"])
        if checked != len(self) or total != self.sha256:
            raise InputError(
                f"data set {str(self.path)!r} has {checked:,} images with sha256 {total}, not the {len(self):,} with "
                f"{shown(self.sha256)} that its manifest promises: make it again"
            )

    @staticmethod
    def digests(path: Location) -> list[tuple[str, bytes]]:
        """(key, sha256) of each image of a shard's file, in order; pixels are not read."""
        try:
            with open_for_arrow(path) as file:
                table = pq.read_table(file, columns=["key", "sha256"])
            return list(zip(table.column("key").to_pylist(), table.column("sha256").to_pylist(), strict=True))
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:  # KeyError: no such column
            raise InputError(
                f"shard {str(path)!r} is damaged ({one_line(error)}): delete it and give the same command again"
            ) from error
