"""Format 2 of a shard: a Parquet file whose images lie at computable offsets, and the hashes of its content.

    "PAR1"
    row group 0     column chunks: key (zstd) | sha256 | image
    row group 1     ...
    footer          the schema with its metadata, the place and size of each column chunk; its length; "PAR1"

    column chunk of `image`, storage "uint8":    page header (17 to 33 bytes) | image 0 | image 1 | ... | image n-1

Columns: `key` (string), `sha256` (32 bytes, of the image's uint8 HWC pixels) and `image`. With storage "uint8" an image
is a fixed-size binary of height * width * channels bytes: required, plain, uncompressed (natural images shrink by 6 %
only) and without statistics, a row group in one data page, so that an image is a slice of the file. With storage
"float32" it is Arrow's fixed-shape tensor [height, width, channels] of the scaled values, dictionary-encoded: 256
values, about a byte each. The schema's metadata `ddpm` holds the shape, the storage and the affine map to [-1, 1].
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from ddpm_core.pixel_range import OFFSET, SCALE, scaled_values

FORMAT = 2
PixelStorage = Literal["uint8", "float32"]
GROUP_ROWS, GROUP_BYTES = 1024, 16 << 20  # the most images, and bytes of pixels, in a row group
# The header of a data page without statistics takes 17 to 33 bytes: 34 bytes that are no pixels mean two pages.
TWO_PAGE_HEADERS = 34


class Skipped(TypedDict):
    """An image of the source that the data set does not have, and why."""

    key: str
    kind: str
    reason: str


def rows_per_group(shape: Sequence[int]) -> int:
    """The number of images in each row group; a shard's last may hold fewer."""
    return max(1, min(GROUP_ROWS, GROUP_BYTES // int(np.prod(shape))))


def group_sizes(images_per_shard: Iterable[int], shape: Sequence[int]) -> np.ndarray:
    """The number of images in each row group of a data set, in order, int64 [row groups]."""
    rows = rows_per_group(shape)
    return np.array(
        [min(rows, count - first) for count in images_per_shard for first in range(0, count, rows)], np.int64
    )


class ContentHash:
    """The hash of a shard's content, whatever the file's encoding: sha256 over its keys and its images' digests, in order."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, key: str, digest: bytes) -> None:
        # key (UTF-8) | 0 | digest (32 bytes) of each image
        self._sha256.update(key.encode() + b"\0" + digest)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def dataset_sha256(shards: Iterable[str]) -> str:
    """The hash of a data set's content: sha256 over its shards' content hashes, as hex digits, in order."""
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def image_sha256(pixels: np.ndarray) -> bytes:
    """The sha256, 32 bytes, of an image uint8 [H,W,C]."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()


def shard_schema(shape: Sequence[int], storage: PixelStorage) -> pa.Schema:
    """The Arrow schema of a shard. shape: (height, width, channels)."""
    tensor = pa.fixed_shape_tensor(pa.float32(), list(shape))
    # pixel / divide_by + then_add is the value in [-1, 1]
    layout = {"layout": "HWC", "divide_by": SCALE, "then_add": OFFSET}
    facts = {"format": FORMAT, "shape": list(shape), "storage": storage, **layout}
    return pa.schema(
        [
            # Not nullable: a nullable column has definition levels, which would lie before the pixels in the page.
            pa.field("key", pa.string(), nullable=False),
            pa.field("sha256", pa.binary(32), nullable=False),
            pa.field("image", pa.binary(int(np.prod(shape))) if storage == "uint8" else tensor, nullable=False),
        ],
        metadata={"ddpm": json.dumps(facts, sort_keys=True)},
    )


class ShardWriter:
    """Writes a shard image by image and keeps one row group in memory. The bytes depend on the content alone."""

    def __init__(self, path: Path, shape: Sequence[int], storage: PixelStorage = "uint8") -> None:
        if storage not in get_args(PixelStorage):
            raise ValueError(f"storage is {storage!r}: it must be one of {', '.join(get_args(PixelStorage))}")
        self._shape, self._storage = tuple(shape), storage
        self._schema = shard_schema(shape, storage)
        self._keys: list[str] = []
        self._digests: list[bytes] = []
        self._pixels = np.empty((rows_per_group(shape), *shape), np.uint8)
        self._file = pq.ParquetWriter(
            path,
            self._schema,
            compression={"key": "zstd", "sha256": "none", "image": "none"},
            use_dictionary=False if storage == "uint8" else ["image.list.element"],
            write_statistics=["key"],
            # pyarrow starts a new page at either limit: at these there is one page a row group.
            data_page_size=2**31 - 1,
            max_rows_per_page=GROUP_ROWS,
            # A checksum would make the page's header longer; sha256 says more.
            write_page_checksum=False,
            write_page_index=False,
        )

    def append(self, key: str, image: np.ndarray) -> bytes:
        """Add an image, uint8 [H,W,C]; returns its sha256, 32 bytes. Keys must ascend over the data set.

        Raises ValueError if the image has another type or shape.
        """
        if image.dtype != np.uint8 or image.shape != self._shape:
            raise ValueError(f"image {key!r} is {image.dtype} {list(image.shape)}: uint8 {list(self._shape)} is wanted")
        digest = image_sha256(image)
        self._pixels[len(self._keys)] = image
        self._keys.append(key)
        self._digests.append(digest)
        if len(self._keys) == len(self._pixels):
            self._write_group()
        return digest

    def _write_group(self) -> None:
        count = len(self._keys)
        pixels = self._pixels[:count]
        if self._storage == "uint8":
            column = _binary(pixels.reshape(count, -1))
        else:
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(scaled_values()[pixels])
        digests = _binary(np.frombuffer(b"".join(self._digests), np.uint8).reshape(count, 32))
        keys = pa.array(self._keys, pa.string())
        self._file.write_batch(pa.record_batch([keys, digests, column], schema=self._schema))
        self._keys, self._digests = [], []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and self._keys:
                self._write_group()
        finally:
            self._file.close()


def _binary(rows: np.ndarray) -> pa.Array:
    """uint8 [n, width] as fixed-size binaries, without a copy."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])


def pixel_offsets(metadata: pq.FileMetaData, shape: Sequence[int]) -> list[int] | None:
    """The byte at which each row group's first image begins in a file of storage "uint8"; the others follow without a gap.

    None if the file is laid out in another way, because another program wrote it: pyarrow still reads it.
    """
    image_bytes = int(np.prod(shape))
    offsets = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunk = group.column(group.num_columns - 1)
        # The pixels are the end of the column chunk; what lies before them is the page's header.
        start = chunk.data_page_offset + chunk.total_compressed_size - group.num_rows * image_bytes
        is_plain = (
            chunk.path_in_schema == "image"
            and chunk.physical_type == "FIXED_LEN_BYTE_ARRAY"
            and chunk.compression == "UNCOMPRESSED"
            and not chunk.has_dictionary_page
            and set(chunk.encodings) <= {"PLAIN", "RLE"}
            and metadata.schema.column(group.num_columns - 1).max_definition_level == 0  # not nullable
            and chunk.data_page_offset < start < chunk.data_page_offset + TWO_PAGE_HEADERS
        )
        if not is_plain:
            return None
        offsets.append(start)
    return offsets
