"""Random access to the pixels of a data set's files.

A local file of storage "uint8" is read image by image at computed offsets: one system call an image, by `preadv`, whose
failures are errors that can be told, where a memory map would kill the process. Everything else (object stores, storage
"float32", files that were written anew) is read by row groups, of which the most recently used are kept.
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
import torch

from ddpm_core import images
from ddpm_core.errors import InputError
from pipelines.runtime.locations import Location, is_local
from pipelines.shards.format import PixelStorage, group_sizes, image_offsets, rows_per_group, shard_schema

CACHE_BYTES = 2 << 30  # pixels of row groups that a process keeps
# Below this size of an image threads take turns: a call of a microsecond that lets go of the interpreter costs more in
# the handing over than a second reader wins.
SMALL = 1 << 16
OPEN_FILES = 256  # a data set may have more files than a process may open
UNKNOWN, BY_GROUP = -1, -2  # offsets of row groups whose file was not opened yet, or is read by row groups


@contextlib.contextmanager
def opened(place: Location) -> Iterator[Any]:
    """A file for pyarrow. Nothing is read ahead: pyarrow asks for the whole ranges that it wants."""
    if isinstance(place, Path):
        with pa.OSFile(str(place)) as file:
            yield file
    else:
        with place.fs.open(place.path, "rb", cache_type="none") as file:
            yield file


class Descriptor:
    """An open file; closed when the last thread that reads it has let it go."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY)

    def read(self, into: np.ndarray, start: int) -> int:
        """Fill an array with the bytes from `start` on; returns how many there were."""
        return os.preadv(self._number, [into.data], start)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it never opened
            os.close(self._number)


class GroupCache:
    """The most recently used row groups: at most `limit` bytes of them, or one. Each is read once, however many threads
    want it."""

    def __init__(self, limit: int, read: Callable[[int], np.ndarray]) -> None:
        self._limit, self._read = limit, read
        self._lock = threading.Lock()
        self._held: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        self._bytes = 0

    def visit(self, groups: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Each group and its pixels. Those that another thread is reading come last, so that threads share the reading."""
        others = []
        for group in groups:
            with self._lock:
                future = self._held.get(group)
                mine = future is None
                if future is None:
                    future = self._held[group] = Future()
                self._held.move_to_end(group)
            if mine:
                self._fill(group, future)
            if future.done():
                yield group, future.result()
            else:
                others.append((group, future))
        for group, future in others:
            yield group, future.result()

    def _fill(self, group: int, future: Future[np.ndarray]) -> None:
        try:
            pixels = self._read(group)
        except BaseException as error:
            with self._lock:
                del self._held[group]
            future.set_exception(error)
            raise
        with self._lock:
            self._bytes += pixels.nbytes
            for old in [other for other in self._held if self._held[other].done()]:
                if self._bytes <= self._limit:
                    break
                self._bytes -= self._held.pop(old).result().nbytes
            future.set_result(pixels)


class ShardReader:
    """Pixels by global index. Safe for threads; files are opened when they are needed."""

    def __init__(self, folder: Location, manifest: Mapping[str, Any]) -> None:
        self._folder, self._manifest = folder, manifest
        self.shape, self.storage = tuple(manifest["shape"]), manifest["storage"]
        self._width = int(np.prod(self.shape))
        self._rows = rows_per_group(self.shape)
        counts = np.array([shard["images"] for shard in manifest["shards"]], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.groups = group_sizes(counts.tolist(), self.shape)
        self._first_group = np.concatenate([[0], np.cumsum(-(-counts // self._rows))])
        self.by_image = is_local(folder) and self.storage == "uint8"
        self._offsets = np.full(len(self.groups), UNKNOWN if self.by_image else BY_GROUP, np.int64)
        self._footers: dict[int, pq.FileMetaData] = {}
        self._descriptor = functools.lru_cache(maxsize=OPEN_FILES)(lambda shard: Descriptor(str(self._place(shard))))
        self._turn = threading.Lock() if self._width < SMALL else contextlib.nullcontext()
        self._cache = GroupCache(CACHE_BYTES, self._read_group)

    def pixels(self, wanted: np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,C] of global indices, int64 [B]."""
        result = np.empty((len(wanted), *self.shape), np.uint8)
        shards = np.searchsorted(self.starts, wanted, side="right") - 1
        in_shard, rows = np.divmod(wanted - self.starts[shards], self._rows)
        groups = self._first_group[shards] + in_shard
        for shard in np.unique(shards[self._offsets[groups] == UNKNOWN]).tolist():
            self._locate(shard)
        offsets = self._offsets[groups]
        by_image = offsets >= 0
        places = np.flatnonzero(by_image)
        starts = (offsets + rows * self._width)[places].tolist()
        with self._turn:
            for place, shard, start in zip(places.tolist(), shards[places].tolist(), starts, strict=True):
                self._read_image(result[place], shard, start)
        for group, pixels in self._cache.visit(np.unique(groups[~by_image]).tolist()):
            at = groups == group
            result[at] = pixels[rows[at]]
        return result

    def table(self, shard: int, group: int, columns: list[str]) -> pa.Table:
        """Columns of a shard's row group. InputError where the file is damaged."""
        if shard not in self._footers:
            self._footers[shard] = self._footer(shard)
        with self._told(shard), opened(self._place(shard)) as file:
            table = pq.ParquetFile(file, metadata=self._footers[shard]).read_row_group(group, columns=columns)
        if table.column_names != columns:
            raise self.damaged(shard, f"it has columns {table.column_names} among {columns}")
        return table

    def groups_of(self, shard: int) -> range:
        """The global numbers of a shard's row groups."""
        return range(int(self._first_group[shard]), int(self._first_group[shard + 1]))

    def decode(self, shard: int, column: pa.ChunkedArray) -> np.ndarray:
        """A shard's `image` column as uint8 [n,H,W,C]. InputError where it is none."""
        with self._told(shard):
            return decode_images(column, self.shape, self.storage)

    def damaged(self, shard: int, reason: object) -> InputError:
        """The error that names a shard's file."""
        return InputError(
            f"data set {str(self._folder)!r} has a damaged file {self._manifest['shards'][shard]['file']!r} ({reason}): "
            "make it again"
        )

    def _place(self, shard: int) -> Location:
        return self._folder / self._manifest["shards"][shard]["file"]

    @contextlib.contextmanager
    def _told(self, shard: int) -> Iterator[None]:
        """Whatever goes wrong with a file, as the InputError that names it."""
        try:
            yield
        except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: another type, NaN among the pixels
            raise self.damaged(shard, " ".join(str(error).split())) from error

    def _footer(self, shard: int) -> pq.FileMetaData:
        """InputError where its row groups are not those that the manifest implies."""
        with self._told(shard), opened(self._place(shard)) as file:
            footer = pq.read_metadata(file)
        there = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        wanted = self.groups[self.groups_of(shard)].tolist()
        if there != wanted:
            raise self.damaged(shard, f"its row groups hold {there} images instead of {wanted}")
        return footer

    def _locate(self, shard: int) -> None:
        """Find where the row groups of a local file lie. Its footer is not kept: there may be thousands."""
        offsets = image_offsets(self._footer(shard), self.shape)
        self._offsets[self.groups_of(shard)] = BY_GROUP if offsets is None else offsets

    def _read_image(self, into: np.ndarray, shard: int, start: int) -> None:
        try:
            got = self._descriptor(shard).read(into, start)
        except OSError as error:
            raise self.damaged(shard, error) from error
        if got != self._width:
            raise self.damaged(shard, "it ends early")

    def _read_group(self, group: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first_group, group, side="right")) - 1
        table = self.table(shard, group - self.groups_of(shard).start, ["image"])
        return self.decode(shard, table.column("image"))


def decode_images(column: pa.ChunkedArray, shape: Sequence[int], storage: PixelStorage) -> np.ndarray:
    """An `image` column -> uint8 [n,H,W,C]. ValueError where its type is another."""
    if column.type != shard_schema(shape, storage).field("image").type:
        raise ValueError(f"its images are {column.type}")
    if not len(column):
        return np.empty((0, *shape), np.uint8)
    array = pa.concat_arrays(column.chunks) if column.num_chunks > 1 else column.chunk(0)
    if storage == "uint8":
        width = int(np.prod(shape))
        flat = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
        return flat.reshape(-1, *shape)
    values = torch.from_numpy(array.to_numpy_ndarray().copy())  # torch wants memory that it may write to
    return images.to_uint8(values.permute(0, 3, 1, 2)).numpy()
