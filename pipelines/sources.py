"""Raw data in: where encoded images come from. A source lists its keys in order and reads a range of them."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import lmdb
from PIL import Image

from ddpm_core.errors import InputError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class Source(Protocol):
    """Encoded images under keys. Small and picklable: workers open the files themselves."""

    @property
    def name(self) -> str:
        """What a person calls it."""

    def keys(self) -> list[str]:
        """Every key, ascending, without reading an image."""

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """The encoded bytes of ascending keys."""


@dataclass(frozen=True)
class LmdbSource:
    """An LMDB folder as LSUN publishes it: 40-hex keys to WebP or JPEG bytes."""

    path: str

    @property
    def name(self) -> str:
        return Path(self.path).name.removesuffix("_lmdb")

    def _open(self) -> lmdb.Environment:
        # An Environment cannot be pickled, and a lock file cannot be written to a read-only disk.
        return lmdb.open(self.path, readonly=True, lock=False, readahead=False, max_readers=1)

    def keys(self) -> list[str]:
        try:
            with self._open() as environment, environment.begin() as transaction:
                return [bytes(key).decode() for key in transaction.cursor().iternext(keys=True, values=False)]
        except (lmdb.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"source {self.path!r} cannot be read as an LMDB ({error}): give the folder that LSUN's zip unpacks to"
            ) from error

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        with self._open() as environment, environment.begin() as transaction:
            for key in keys:
                yield key, bytes(transaction.get(key.encode()) or b"")


@dataclass(frozen=True)
class FolderSource:
    """A folder of image files, searched through; the key is the path below the folder."""

    path: str

    @property
    def name(self) -> str:
        return Path(self.path).name

    def keys(self) -> list[str]:
        root = Path(self.path)
        files = (file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        return sorted(file.relative_to(root).as_posix() for file in files)

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for key in keys:
            yield key, (Path(self.path) / key).read_bytes()


def open_source(path: Path) -> Source:
    """The source at a path, recognised by what is there. InputError where nothing or nothing known is."""
    if not path.exists():
        raise InputError(f"source {str(path)!r} does not exist: give an LMDB folder or a folder of images")
    if not path.is_dir():
        raise InputError(f"source {str(path)!r} is a file: give an LMDB folder or a folder of images")
    return LmdbSource(str(path)) if (path / "data.mdb").is_file() else FolderSource(str(path))


def list_keys(source: Source, path: Path) -> list[str]:
    """The source's keys. InputError where there are none or the first value is no image."""
    keys = source.keys()
    if not keys:
        raise InputError(f"source {str(path)!r} holds no images: give an LMDB folder or a folder of images")
    _, first = next(iter(source.read(keys[:1])))
    try:
        with Image.open(io.BytesIO(first)) as image:
            image.verify()
    except Exception as error:
        raise InputError(
            f"source {str(path)!r} holds no images (its first value, {keys[0]!r}, is {len(first)} bytes that decode as none): "
            "give an LMDB or folder with WebP, JPEG or PNG images"
        ) from error
    return keys
