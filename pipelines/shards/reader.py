"""Random access to the pixels of a data set's files.

A local file of storage "uint8" is read image by image at computed offsets: one system call an image, by `preadv`, whose
failures are exceptions, while a memory map would kill the process. Everything else (object stores, storage "float32",
files that another program wrote) is read by row groups, of which the most recently used are kept.
"""

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_core.errors import InputError
from pipelines.shards.format import PixelStorage, group_sizes, pixel_offsets, rows_per_group, shard_schema
from pipelines.storage.locations import Location

CACHE_BYTES = 2 << 30  # pixels of row groups that a process keeps
# Threads take turns to read images of fewer bytes: a system call of a microsecond gives the interpreter's lock away, and
# handing it over costs more than a second reader gains.
SMALL_IMAGE = 1 << 16
MAX_OPEN_FILES = 256  # a data set may have more files than a process may open
UNKNOWN, BY_GROUP = -1, -2  # in place of a row group's offset: its file was not opened yet, or is read by row groups


@contextlib.contextmanager
def open_for_arrow(path: Location) -> Iterator[Any]:
    """An open file for pyarrow, without readahead: pyarrow asks for whole ranges."""
    if isinstance(path, Path):
        with pa.OSFile(str(path)) as file:
            yield file
    else:
        with path.fs.open(path.path, "rb", cache_type="none") as file:
            yield file


class Descriptor:
    """An open file, closed when no thread uses it any more."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY)

    def read(self, into: np.ndarray, start: int) -> int:
        """Fill an array with the file's bytes from `start` on; returns how many were read."""
        return os.preadv(self._number, [into.data], start)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # os.open failed
            os.close(self._number)


class GroupCache:
    """The most recently used row groups: at most `limit` bytes of them, or one. Each is read once, however many threads
    want it."""

    def __init__(self, limit: int, read: Callable[[int], np.ndarray]) -> None:
        self._limit, self._read = limit, read
        self._lock = threading.Lock()
        self._futures: OrderedDict[int, Future[np.ndarray]] = OrderedDict()  # the least recently used first
        self._bytes = 0

    def visit(self, groups: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Each group and its pixels. Those that another thread is reading come last, so that threads share the reading."""
        pending = []
        for group in groups:
            with self._lock:
                future = self._futures.get(group)
                is_new = future is None
                if future is None:
                    future = self._futures[group] = Future()
                self._futures.move_to_end(group)
            if is_new:
                self._fill(group, future)
            if future.done():
                yield group, future.result()
            else:
                pending.append((group, future))
        for group, future in pending:
            yield group, future.result()

    def _fill(self, group: int, future: Future[np.ndarray]) -> None:
        """Read a group, and drop others to make room for it. An error goes to every thread that waits for the group."""
        try:
            pixels = self._read(group)
        except BaseException as error:
            with self._lock:
                del self._futures[group]  # so that the next visit tries again
            future.set_exception(error)
            raise
        with self._lock:
            self._bytes += pixels.nbytes
            # This group's own future is not done yet, so it stays even if it alone exceeds the limit.
            for old in [number for number in self._futures if self._futures[number].done()]:
                if self._bytes <= self._limit:
                    break
                self._bytes -= self._futures.pop(old).result().nbytes
            future.set_result(pixels)


class ShardReader:
    """Pixels by global index. Safe for threads; files are opened on first use."""

    def __init__(self, folder: Location, manifest: Mapping[str, Any]) -> None:
        self._folder, self._manifest = folder, manifest
        self.shape, self.storage = tuple(manifest["shape"]), manifest["storage"]
        self._image_bytes = int(np.prod(self.shape))
        self._rows_per_group = rows_per_group(self.shape)
        counts = np.array([shard["images"] for shard in manifest["shards"]], np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(counts)])  # the first image of each shard, and the total
        self.group_sizes = group_sizes(counts.tolist(), self.shape)
        self._first_groups = np.concatenate([[0], np.cumsum(-(-counts // self._rows_per_group))])
        self.by_image = isinstance(folder, Path) and self.storage == "uint8"
        self._offsets = np.full(len(self.group_sizes), UNKNOWN if self.by_image else BY_GROUP, np.int64)
        self._footers: dict[int, pq.FileMetaData] = {}
        self._descriptor = functools.lru_cache(maxsize=MAX_OPEN_FILES)(lambda shard: Descriptor(str(self._path(shard))))
        self._turn = threading.Lock() if self._image_bytes < SMALL_IMAGE else contextlib.nullcontext()
        self._cache = GroupCache(CACHE_BYTES, self._read_group)

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,C] of global indices, int64 [B]. Raises InputError if a file is damaged."""
        result = np.empty((len(indices), *self.shape), np.uint8)
        shards = np.searchsorted(self.shard_starts, indices, side="right") - 1
        group_in_shard, rows = np.divmod(indices - self.shard_starts[shards], self._rows_per_group)
        groups = self._first_groups[shards] + group_in_shard
        for shard in np.unique(shards[self._offsets[groups] == UNKNOWN]).tolist():
            self._locate(shard)
        offsets = self._offsets[groups]
        by_image = offsets >= 0
        positions = np.flatnonzero(by_image)
        # An image's first byte: that of its row group's pixels, and the images before it in the group.
        starts = (offsets + rows * self._image_bytes)[positions].tolist()
        with self._turn:
            for position, shard, start in zip(positions.tolist(), shards[positions].tolist(), starts, strict=True):
                self._read_image(result[position], shard, start)
        for group, pixels in self._cache.visit(np.unique(groups[~by_image]).tolist()):
            in_group = groups == group
            result[in_group] = pixels[rows[in_group]]
        return result

    def table(self, shard: int, group: int, columns: list[str]) -> pa.Table:
        """Columns of a shard's row group, counted from 0 in the shard. Raises InputError if the file is damaged."""
        if shard not in self._footers:
            self._footers[shard] = self._read_footer(shard)
        with self._name_damaged(shard), open_for_arrow(self._path(shard)) as file:
            table = pq.ParquetFile(file, metadata=self._footers[shard]).read_row_group(group, columns=columns)
        if table.column_names != columns:
            raise self.damaged(shard, f"it has columns {table.column_names} among {columns}")
        return table

    def groups_of(self, shard: int) -> range:
        """The numbers of a shard's row groups in the whole data set."""
        return range(int(self._first_groups[shard]), int(self._first_groups[shard + 1]))

    def decode(self, shard: int, column: pa.ChunkedArray) -> np.ndarray:
        """A shard's `image` column as uint8 [n,H,W,C]. Raises InputError if it is of another type."""
        with self._name_damaged(shard):
            return decode_images(column, self.shape, self.storage)

    def damaged(self, shard: int, reason: object) -> InputError:
        """The error that names a shard's file."""
        return InputError(
            f"data set {str(self._folder)!r} has a damaged file {self._manifest['shards'][shard]['file']!r} ({reason}): "
            "make it again"
        )

    def _path(self, shard: int) -> Location:
        return self._folder / self._manifest["shards"][shard]["file"]

    @contextlib.contextmanager
    def _name_damaged(self, shard: int) -> Iterator[None]:
        """Turns whatever a shard's file raises into the InputError that names the file."""
        try:
            yield
        except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: another type, NaN among the pixels
            raise self.damaged(shard, " ".join(str(error).split())) from error

    def _read_footer(self, shard: int) -> pq.FileMetaData:
        """A file's footer. Raises InputError if its row groups are not those that the manifest implies."""
        with self._name_damaged(shard), open_for_arrow(self._path(shard)) as file:
            footer = pq.read_metadata(file)
        counts = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        expected = self.group_sizes[self.groups_of(shard)].tolist()
        if counts != expected:
            raise self.damaged(shard, f"its row groups hold {counts} images instead of {expected}")
        return footer

    def _locate(self, shard: int) -> None:
        """Find where the row groups of a local file lie. Its footer is not kept: there may be thousands."""
        offsets = pixel_offsets(self._read_footer(shard), self.shape)
        self._offsets[self.groups_of(shard)] = BY_GROUP if offsets is None else offsets

    def _read_image(self, into: np.ndarray, shard: int, start: int) -> None:
        try:
            count = self._descriptor(shard).read(into, start)
        except OSError as error:
            raise self.damaged(shard, error) from error
        if count != self._image_bytes:
            raise self.damaged(shard, "it ends early")

    def _read_group(self, group: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        table = self.table(shard, group - self.groups_of(shard).start, ["image"])
        return self.decode(shard, table.column("image"))


def decode_images(column: pa.ChunkedArray, shape: Sequence[int], storage: PixelStorage) -> np.ndarray:
    """An `image` column -> uint8 [n,H,W,C]. Raises ValueError if it is of another type."""
    if column.type != shard_schema(shape, storage).field("image").type:
        raise ValueError(f"its images are {column.type}")
    if not len(column):
        return np.empty((0, *shape), np.uint8)
    array = pa.concat_arrays(column.chunks) if column.num_chunks > 1 else column.chunk(0)
    if storage == "uint8":
        width = int(np.prod(shape))
        # buffers(): validity bits (none here), values. A sliced array begins `offset` values into its buffer.
        flat = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
        return flat.reshape(-1, *shape)
    import torch  # here: pixels of storage "uint8" do without

    from ddpm_core import images

    values = torch.from_numpy(array.to_numpy_ndarray().copy())  # torch wants memory that it may write to
    return images.to_uint8(values.permute(0, 3, 1, 2)).numpy()
