"""CIFAR-10 as its authors publish it: batches of 10,000 images, as Python pickles or binary, in a tar.gz or unpacked.

Rows count through the batches in their order, so that the keys are those of every other copy of CIFAR-10. Nothing in a
pickle is executed: it may rebuild arrays of bytes and nothing else.
"""

import functools
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.items import Item, Value, byte_size, choose_split, label, open_bytes, split_name
from pipelines.runtime.locations import Location

Layout = Literal["python", "binary"]
FOLDERS: dict[str, Layout] = {"cifar-10-batches-py": "python", "cifar-10-batches-bin": "binary"}
SUFFIXES: dict[Layout, str] = {"python": "", "binary": ".bin"}
BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
PIXELS = 3 * 32 * 32  # an image: red, green and blue, each row by row


def layout_of_files(names: Sequence[str]) -> Layout | None:
    """The layout whose batches a folder holds."""
    batches = [batch for group in BATCHES.values() for batch in group]
    found = (layout for layout, suffix in SUFFIXES.items() if any(f"{batch}{suffix}" in names for batch in batches))
    return next(found, None)


def layout_of_tar(place: Location) -> Layout | None:
    """The layout of a compressed tar, by its first member; None where that is no CIFAR-10."""
    try:
        with open_bytes(place) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            first = archive.next()
    except (tarfile.TarError, EOFError, zlib.error):
        return None
    return None if first is None else FOLDERS.get(first.name.removeprefix("./").split("/", 1)[0])


@dataclass(frozen=True)
class CifarSource:
    """One split. An item's size is the number of its batch and its offset the row in it.

    Listing reads the batches, which a compressed tar needs anyway: a damaged one is found before any worker starts.
    """

    place: Location
    layout: Layout
    split: str
    files: tuple[tuple[str, int], ...]
    """Names and bytes: of the tar, or of the batches in the folder."""
    packed: bool

    @property
    def name(self) -> str:
        return split_name("cifar10", self.split)

    @property
    def batches(self) -> tuple[str, ...]:
        return tuple(f"{batch}{SUFFIXES[self.layout]}" for batch in BATCHES[self.split])

    def items(self) -> list[Item]:
        counts = {name: len(self._decode(name, data)) for name, data in self._contents(self.batches)}
        places = [(number, row) for number, name in enumerate(self.batches) for row in range(counts[name])]
        return [Item(f"{self.split}/{index:08d}", row, number) for index, (number, row) in enumerate(places)]

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        for item in items:
            yield item.key, _batch(self, item.size)[item.offset]

    def facts(self) -> dict[str, Any]:
        return {"kind": f"cifar10-{self.layout}", "split": self.split, "files": dict(self.files)}

    def batch(self, number: int) -> np.ndarray:
        """uint8 [rows, 32, 32, 3]."""
        name = self.batches[number]
        return self._decode(name, dict(self._contents([name]))[name])

    def _contents(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """The named batches, in the order they lie. InputError where one is missing or the tar is damaged."""
        missing = set(names)
        if not self.packed:
            for name in [name for name in names if (self.place / name).is_file()]:
                missing.remove(name)
                yield name, (self.place / name).read_bytes()
        else:
            try:
                with open_bytes(self.place) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
                    while missing and (member := archive.next()) is not None:
                        name = member.name.rsplit("/", 1)[-1]
                        if name in missing and (content := archive.extractfile(member)) is not None:
                            missing.remove(name)
                            yield name, content.read()
            except (tarfile.TarError, EOFError, zlib.error) as error:
                raise self._damaged(str(error)) from error
        if missing:
            raise self._damaged(f"it has no {', '.join(sorted(missing))}")

    def _decode(self, name: str, data: bytes) -> np.ndarray:
        try:
            rows = _unpickled(data) if self.layout == "python" else _without_labels(data)
        except Exception as error:  # a damaged pickle raises whatever it stumbles over
            raise self._damaged(f"{name}: {error}") from error
        return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    def _damaged(self, reason: str) -> InputError:
        return InputError(
            f"source {str(self.place)!r} cannot be read as CIFAR-10 ({reason}): download it again from its authors"
        )


@functools.lru_cache(maxsize=2)
def _batch(source: CifarSource, number: int) -> np.ndarray:
    """30 MB each: a range of rows lies in one or two."""
    return source.batch(number)


def _without_labels(data: bytes) -> np.ndarray:
    """uint8 [rows, 3072] of rows that begin with a byte for the class."""
    if not data or len(data) % (1 + PIXELS):
        raise ValueError(f"{len(data):,} bytes are no whole number of rows of {1 + PIXELS:,}")
    return np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)[:, 1:]


def _unpickled(data: bytes) -> np.ndarray:
    """uint8 [rows, 3072] of a pickled batch."""
    # The strings of Python 2, which pickled the batches, are bytes.
    batch = _PixelUnpickler(io.BytesIO(data), encoding="bytes").load()
    array = batch.get(b"data", batch.get("data")) if isinstance(batch, dict) else None
    if not isinstance(array, _Array) or array.rows.shape[1:] != (PIXELS,):
        raise ValueError(f"it holds no 'data' of rows of {PIXELS:,} bytes")
    return array.rows


class _Uint8:
    """Stands for the dtype of pixels, the only one that is let in."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of 'u1'")

    def __setstate__(self, state: object) -> None:
        """Byte order, names and alignment, of which a byte has none."""


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
            return name  # only ever an argument
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes where Python 2 shall read them
            return lambda text, _: text.encode("latin1")  # made anew: a pickle may set attributes of what it is given
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array of pixels needs")


def open_tar(place: Location, layout: Layout, split: str | None) -> CifarSource:
    """The tar.gz of CIFAR-10; split None is train."""
    chosen = choose_split(split, tuple(BATCHES), place)
    return CifarSource(place, layout, str(chosen), ((label(place), byte_size(place)),), packed=True)


def open_folder(place: Location, layout: Layout, split: str | None) -> CifarSource:
    """The unpacked batches; split None is train."""
    chosen = str(choose_split(split, tuple(BATCHES), place))
    names = [f"{batch}{SUFFIXES[layout]}" for batch in BATCHES[chosen]]
    files = tuple((name, byte_size(place / name)) for name in names if (place / name).is_file())
    return CifarSource(place, layout, chosen, files, packed=False)
