"""What a preprocessing worker does: a range of a source's items -> one shard and its record. Imports no torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ddpm_core.commit import sha256_file
from ddpm_core.errors import InputError
from pipelines.preprocess.sources.open import Item, Source
from pipelines.preprocess.transform import Filter, TooSmallError, transform
from pipelines.runtime.locations import Location, commit_json, committed
from pipelines.shards.format import ContentHash, ShardWriter, Storage


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Which images to read, what to make of them, and where to put them."""

    source: str
    """LMDB folder or zip as LSUN publishes it, CIFAR-10 archive, CelebA-HQ TFRecords, Parquet with an image column, or a
    folder, zip or tar of images; a local path, or a URL such as s3://bucket/images.zip."""
    output: str
    """The folder of shards to make; a local path or a URL."""
    image_size: int
    """Height and width after the centre crop and the resize."""
    channels: Literal[1, 3] = 3
    """3 for RGB, 1 for grey."""
    filter: Filter = "lanczos"
    """The resize's filter; Lanczos is that of StyleGAN's LSUN recipe."""
    split: str | None = None
    """Which part of a source that has parts, such as CIFAR-10's test; train by default."""
    name: str | None = None
    """What the data set is called; the source's name by default."""
    storage: Storage = "uint8"
    """How pixels are stored: a byte each, or the scaled float32 values themselves for other tools to see."""
    images_per_shard: int = 1024
    """How many of the source's images a file covers."""
    undecodable: Literal["skip", "fail"] = "skip"
    """What to do with an image that does not decode: leave it out and list it in the manifest, or stop."""
    too_small: Literal["skip", "fail", "enlarge"] = "skip"
    """What to do with an image whose shorter side is below the image size."""
    duplicates: Literal["keep", "skip", "fail"] = "keep"
    """What to do with an image whose pixels, after the resize, are those of one before it; data sets as published are
    kept whole by default."""
    max_skipped: float = 0.01
    """Stop when more than this share of the images is undecodable or too small."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise InputError(f"--image-size is {self.image_size}: give a positive number of pixels")
        if self.images_per_shard < 1:
            raise InputError(f"--images-per-shard is {self.images_per_shard}: give a positive number")
        if not 0.0 <= self.max_skipped <= 1.0:
            raise InputError(f"--max-skipped is {self.max_skipped}: give a share from 0 to 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return (self.image_size, self.image_size, self.channels)


def shard_file(number: int) -> str:
    return f"shards/shard-{number:05d}.parquet"


def record_file(number: int) -> str:
    return f"records/shard-{number:05d}.json"


def make_shard(
    number: int,
    items: Sequence[Item],
    source: Source,
    config: PreprocessConfig,
    output: Location,
    duplicate_of: Mapping[str, str],
) -> dict[str, Any]:
    """Write shard `number` and, after it, its record: counts, hashes, exact pixel sums, skipped keys. Returns the record.

    `duplicate_of`: keys to leave out, with the key of the image that each repeats.
    """
    kept = 0
    sums, squares = np.zeros((2, config.channels), np.int64)
    content = ContentHash()
    skipped: list[dict[str, str]] = []
    path = output / shard_file(number)
    with committed(path) as temporary:
        with ShardWriter(temporary, config.shape, config.storage) as writer:
            for key, image in decoded(items, source, config, duplicate_of, skipped):
                content.update(key, writer.append(key, image))
                # Integers all the way, so that no order of adding matters; down the columns first, which is ten times faster
                # and stays below 2^32 up to 66,000 rows.
                rows = image.reshape(config.image_size, -1)
                sums += rows.sum(0, dtype=np.uint32).reshape(-1, config.channels).sum(0, dtype=np.int64)
                columns = np.square(rows, dtype=np.uint16).sum(0, dtype=np.uint32)
                squares += columns.reshape(-1, config.channels).sum(0, dtype=np.int64)
                kept += 1
        facts = {"bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}
    record = {
        "file": shard_file(number),
        "images": kept,
        **facts,
        "content_sha256": content.hexdigest(),
        "sum": sums.tolist(),
        "sum_of_squares": squares.tolist(),
        "skipped": skipped,
    }
    commit_json(output / record_file(number), record)
    return record


def decoded(
    items: Sequence[Item],
    source: Source,
    config: PreprocessConfig,
    duplicate_of: Mapping[str, str],
    skipped: list[dict[str, str]],
) -> Iterator[tuple[str, np.ndarray]]:
    """The images that the data set takes, as uint8 [*config.shape]; the others are added to `skipped`."""

    def skip(key: str, kind: str, reason: str) -> None:
        skipped.append({"key": key, "kind": kind, "reason": reason})

    for key, value in source.read(items):
        if key in duplicate_of:
            skip(key, "duplicate", f"same pixels as {duplicate_of[key]!r}")
            continue
        try:
            if isinstance(value, Exception):
                raise value
            image = transform(
                value,
                image_size=config.image_size,
                channels=config.channels,
                filter=config.filter,
                enlarge=config.too_small == "enlarge",
            )
        except TooSmallError as error:
            skip(key, "too small", str(error))
        except Exception as error:  # Pillow's decoders raise many kinds; whichever it is, it is recorded
            skip(key, "undecodable", f"{type(error).__name__}: {error}")
        else:
            yield key, image


def finished_record(output: Location, number: int) -> dict[str, Any] | None:
    """The record of a shard whose file is there with the size it should have."""
    try:
        record = json.loads((output / record_file(number)).read_text())
        whole = (output / record["file"]).stat().st_size == record["bytes"]
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None
