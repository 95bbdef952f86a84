"""Format 2 of a shard: a Parquet file whose images lie at computable offsets, and the hashes of its content.

Columns: `key` (string), `sha256` (32 bytes, of the image's uint8 HWC pixels) and `image`. With storage "uint8" an image
is a fixed-size binary: required, plain, uncompressed (natural images shrink by 6 % only) and without statistics, a row
group in one data page, so that its bytes are a slice of the file. With storage "float32" it is Arrow's fixed-shape
tensor [height, width, channels] of the scaled values, dictionary-encoded: 256 values, about a byte each. The schema's
metadata `ddpm` says the shape, the storage and the affine map to [-1, 1].
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_core.pixel_range import OFFSET, SCALE, scaled_values

FORMAT = 2
PixelStorage = Literal["uint8", "float32"]
GROUP_ROWS, GROUP_BYTES = 1024, 16 << 20  # a row group's limits
# A header of a data page without statistics takes 17 to 33 bytes, so at least 34 of overhead are two pages.
TWO_HEADERS = 34


def rows_per_group(shape: Sequence[int]) -> int:
    """Images in each row group but a shard's last, which may hold fewer."""
    return max(1, min(GROUP_ROWS, GROUP_BYTES // int(np.prod(shape))))


def group_sizes(images_per_shard: Iterable[int], shape: Sequence[int]) -> np.ndarray:
    """Images in each row group of a data set, in order, int64."""
    rows = rows_per_group(shape)
    return np.array(
        [min(rows, count - first) for count in images_per_shard for first in range(0, count, rows)], np.int64
    )


class ContentHash:
    """Of a shard's content, whatever the file's encoding: sha256 over its keys and its images' digests, in order."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, key: str, digest: bytes) -> None:
        self._sha256.update(key.encode() + b"\0" + digest)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def dataset_sha256(shards: Iterable[str]) -> str:
    """Of a data set's content, from its shards' content hashes in order."""
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def image_sha256(pixels: np.ndarray) -> bytes:
    """The digest of uint8 [H,W,C]."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()


def shard_facts(shape: Sequence[int], storage: PixelStorage) -> dict[str, Any]:
    """What the schema's metadata says: pixel / divide_by + then_add is the value in [-1, 1]."""
    return {
        "format": FORMAT,
        "shape": list(shape),
        "layout": "HWC",
        "storage": storage,
        "divide_by": SCALE,
        "then_add": OFFSET,
    }


def shard_schema(shape: Sequence[int], storage: PixelStorage) -> pa.Schema:
    """The schema of a shard of images [height, width, channels]."""
    tensor = pa.fixed_shape_tensor(pa.float32(), list(shape))
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("sha256", pa.binary(32), nullable=False),
            pa.field("image", pa.binary(int(np.prod(shape))) if storage == "uint8" else tensor, nullable=False),
        ],
        metadata={"ddpm": json.dumps(shard_facts(shape, storage), sort_keys=True)},
    )


class ShardWriter:
    """Writes a shard image by image; its memory is a row group. The bytes depend on the content alone."""

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
            # One page a row group: no limit of a page is ever reached. A header without checksum and statistics.
            data_page_size=2**31 - 1,
            max_rows_per_page=GROUP_ROWS,
            write_page_checksum=False,
            write_page_index=False,
        )

    def append(self, key: str, image: np.ndarray) -> bytes:
        """Add uint8 [H,W,C]; returns its sha256 digest. Keys must ascend over the data set."""
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


def image_offsets(metadata: pq.FileMetaData, shape: Sequence[int]) -> list[int] | None:
    """Where each row group's first image lies in a file of storage "uint8"; the others follow it without a gap. None
    where the file is not laid out like that: whoever wrote it anew, pyarrow still reads it."""
    width = int(np.prod(shape))
    offsets = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunk = group.column(group.num_columns - 1)
        start = chunk.data_page_offset + chunk.total_compressed_size - group.num_rows * width
        plain = (
            chunk.path_in_schema == "image"
            and chunk.physical_type == "FIXED_LEN_BYTE_ARRAY"
            and chunk.compression == "UNCOMPRESSED"
            and not chunk.has_dictionary_page
            and set(chunk.encodings) <= {"PLAIN", "RLE"}
            and metadata.schema.column(group.num_columns - 1).max_definition_level == 0
            and chunk.data_page_offset < start < chunk.data_page_offset + TWO_HEADERS
        )
        if not plain:
            return None
        offsets.append(start)
    return offsets
