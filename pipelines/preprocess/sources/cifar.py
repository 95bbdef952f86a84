"""CIFAR-10 as its authors publish it: batches of 10,000 images, as Python pickles or binary, in a tar.gz or unpacked.

    python: a pickled dict whose b"data" is uint8 [rows, 3072]
    binary: rows of 1 byte for the class and 3,072 for the pixels, without a header
    3,072:  1,024 red, then 1,024 green, then 1,024 blue, each row by row of 32

Rows are numbered through the batches in their order, so that the keys are those of every other copy of CIFAR-10. Nothing
in a pickle is executed: it may rebuild arrays of bytes and nothing else.
"""

import contextlib
import functools
import io
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.items import (
    Item,
    Value,
    base_name,
    byte_size,
    choose_split,
    damage_as,
    is_storage_error,
    open_bytes,
    split_name,
)
from pipelines.preprocess.sources.kinds import count, other_kind
from pipelines.preprocess.sources.names import key_of
from pipelines.storage.locations import Location

Layout = Literal["python", "binary"]
FOLDERS: dict[str, Layout] = {"cifar-10-batches-py": "python", "cifar-10-batches-bin": "binary"}
SUFFIXES: dict[Layout, str] = {"python": "", "binary": ".bin"}
BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
IMAGE_BYTES = 3 * 32 * 32
LARGEST_TAR = 1 << 30  # bytes when it is unpacked; CIFAR-10's has 180 MB, and a compressed file of 1 MB can hold 1 GB


def batch_files(split: str, layout: Layout) -> tuple[str, ...]:
    """The names of a split's files, in order."""
    return tuple(f"{batch}{SUFFIXES[layout]}" for batch in BATCHES[split])


def layout_of_files(names: Sequence[str]) -> Layout | None:
    """The layout whose batches are among a folder's files."""
    for layout in SUFFIXES:
        if any(name in names for split in BATCHES for name in batch_files(split, layout)):
            return layout
    return None


def layout_of_tar(path: Location) -> Layout | None:
    """The layout of a tar, compressed or not, by the folder of its first file; None if it is not CIFAR-10."""
    try:
        with open_bytes(path) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            first = next((member.name for member in archive if member.isreg()), "")
    except Exception as error:  # TarError, and whatever a decompressor raises for what is damaged
        if is_storage_error(error):
            raise
        return None
    return next((FOLDERS[part] for part in first.split("/") if part in FOLDERS), None)


@dataclass(frozen=True)
class CifarSource:
    """One split. An item's size is the number of its batch and its offset the row in it.

    files: names and bytes of the tar, or of the batches in the folder. beside: the kinds of other files in the folder, and
    their numbers. Listing reads the batches, which a compressed tar needs anyway: a damaged one is noticed before any worker
    starts.
    """

    path: Location
    layout: Layout
    split: str
    files: tuple[tuple[str, int], ...]
    packed: bool
    beside: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return split_name("cifar10", self.split)

    @property
    def batches(self) -> tuple[str, ...]:
        return batch_files(self.split, self.layout)

    def items(self) -> list[Item]:
        counts = {name: len(self._decode(name, data)) for name, data in self._contents(self.batches)}
        rows = [(number, row) for number, name in enumerate(self.batches) for row in range(counts[name])]
        return [Item(f"{self.split}/{index:08d}", row, number) for index, (number, row) in enumerate(rows)]

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        for item in items:
            yield item.key, _cached_batch(self, item.size)[item.offset]

    def facts(self) -> dict[str, Any]:
        return {
            "kind": f"cifar10-{self.layout}",
            "split": self.split,
            "files": {key_of(name): size for name, size in self.files},
        }

    def others(self) -> dict[str, int]:
        if not self.packed:
            return dict(self.beside)
        with self._members() as (_, members):
            names = [member.name.rsplit("/", 1)[-1] for member in members if not member.isdir()]
        return count(self.kind_beside(name) for name in names if name not in self.batches)

    def kind_beside(self, name: str) -> str:
        """What a file that is none of the split's is counted as."""
        split = next((split for split in BATCHES if name in batch_files(split, self.layout)), None)
        return other_kind(name) if split is None else f"file of the split {split!r}"

    def batch(self, number: int) -> np.ndarray:
        """The images of batch `number` of the split, uint8 [rows,32,32,3]."""
        name = self.batches[number]
        return self._decode(name, dict(self._contents([name]))[name])

    def _contents(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of the named batches, in the order they lie. Raises InputError if one is missing or the tar is
        damaged."""
        missing = set(names)
        paths = [self.path / name for name in names if not self.packed and (self.path / name).is_file()]
        for name, data in self._packed(missing) if self.packed else ((path.name, path.read_bytes()) for path in paths):
            missing.remove(name)
            yield name, data
        if missing:
            raise self._damaged(f"it has no {', '.join(sorted(missing))}")

    def _packed(self, missing: set[str]) -> Iterator[tuple[str, bytes]]:
        """Those files of the tar that are missing, from its beginning until none is."""
        with self._members() as (archive, members):
            while missing and (member := next(members, None)) is not None:
                name = member.name.rsplit("/", 1)[-1]
                if name in missing and (content := archive.extractfile(member)) is not None:
                    yield name, content.read()

    @contextlib.contextmanager
    def _members(self) -> Iterator[tuple[tarfile.TarFile, Iterator[tarfile.TarInfo]]]:
        """The tar and its members, to be read from its beginning. Raises InputError if it is damaged, or larger than any
        CIFAR-10 by what it states."""
        with (
            damage_as(self._damaged),
            open_bytes(self.path) as file,
            tarfile.open(fileobj=file, mode="r|*") as archive,
        ):
            yield archive, self._within_limit(archive)

    def _within_limit(self, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for member in archive:
            end = member.offset_data + member.size
            if end > LARGEST_TAR:
                raise self._damaged(f"it would be unpacked to {end:,} bytes or more, which CIFAR-10 has not")
            yield member

    def _decode(self, name: str, data: bytes) -> np.ndarray:
        """The images of a batch's bytes, uint8 [rows,32,32,3]."""
        try:
            rows = _unpickle(data) if self.layout == "python" else _drop_labels(data)
        except Exception as error:  # a damaged pickle raises whatever it comes across
            raise self._damaged(f"{name}: {error}") from error
        return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    def _damaged(self, reason: str) -> InputError:
        return InputError(
            f"source {str(self.path)!r} cannot be read as CIFAR-10 ({reason}): download it again from its authors"
        )


@functools.lru_cache(maxsize=2)
def _cached_batch(source: CifarSource, number: int) -> np.ndarray:
    """The two newest batches, 30 MB each: a shard's rows lie in one or two."""
    return source.batch(number)


def _drop_labels(data: bytes) -> np.ndarray:
    """uint8 [rows,3072] of a binary batch."""
    if not data or len(data) % (1 + IMAGE_BYTES):
        raise ValueError(f"{len(data):,} bytes are no whole number of rows of {1 + IMAGE_BYTES:,}")
    return np.frombuffer(data, np.uint8).reshape(-1, 1 + IMAGE_BYTES)[:, 1:]


def _unpickle(data: bytes) -> np.ndarray:
    """uint8 [rows,3072] of a pickled batch."""
    # The batches were pickled by Python 2, whose strings are bytes.
    batch = _PixelUnpickler(io.BytesIO(data), encoding="bytes").load()
    array = batch.get(b"data", batch.get("data")) if isinstance(batch, dict) else None
    if not isinstance(array, _Array) or array.rows.shape[1:] != (IMAGE_BYTES,):
        raise ValueError(f"it holds no 'data' of rows of {IMAGE_BYTES:,} bytes")
    return array.rows


class _Uint8:
    """Stands for the dtype of pixels, the only one that is allowed."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of 'u1'")

    def __setstate__(self, state: object) -> None:
        """Ignores byte order, field names and alignment, which a byte does not have."""


class _Array:
    """Stands for the array of pixels: its state is (version, shape, dtype, column-major, bytes)."""

    def __init__(self, *_: object) -> None:
        self.rows: np.ndarray = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        _, shape, dtype, column_major, content = state
        if not isinstance(dtype, _Uint8):
            raise pickle.UnpicklingError("it holds an array without a dtype")
        self.rows = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_major else "C")


class _PixelUnpickler(pickle.Unpickler):
    """Gives a pickle stand-ins for the few names that numpy's arrays call, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Uint8
        if (module, name) == ("numpy", "ndarray"):
            return name  # only ever an argument of _reconstruct
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in a pickle for Python 2
            # A function of its own for each call: a pickle may set attributes of what it is given.
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array of pixels needs")


def open_tar(path: Location, layout: Layout, split: str | None) -> CifarSource:
    """CIFAR-10's tar, compressed or not; without a split, train."""
    chosen = str(choose_split(split, tuple(BATCHES), path))
    return CifarSource(path, layout, chosen, ((base_name(path), byte_size(path)),), packed=True)


def open_folder(path: Location, layout: Layout, split: str | None) -> CifarSource:
    """The unpacked batches; without a split, train."""
    chosen = str(choose_split(split, tuple(BATCHES), path))
    names = [name for name in batch_files(chosen, layout) if (path / name).is_file()]
    return CifarSource(path, layout, chosen, tuple((name, byte_size(path / name)) for name in names), packed=False)
