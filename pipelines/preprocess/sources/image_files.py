"""Image files as they lie in a folder, a zip or a tar, each under its path there.

PNG, JPEG, WebP, BMP, TIFF and GIF, told by the suffix in any case; of an animation, the first frame counts. Hidden files
and macOS's `__MACOSX` are no images. A path is a key and nothing else: nothing is ever written under it.
"""

import functools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.items import Item, Value, label, open_bytes
from pipelines.runtime.locations import Location

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
AT_ONCE = 32  # files fetched from an object store together, each of which answers late


def is_image_name(name: str) -> bool:
    """Whether a path, divided by slashes, is called like a visible image."""
    path = PurePosixPath(name)
    hidden = any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in path.parts)
    return not hidden and path.suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class FolderSource:
    """A folder, searched through; links to files are followed, links to folders are not. Items carry their size."""

    place: Location

    @property
    def name(self) -> str:
        return label(self.place)

    def items(self) -> list[Item]:
        return sorted(Item(name, size=size) for name, size in self._files() if is_image_name(name))

    def _files(self) -> Iterator[tuple[str, int]]:
        if isinstance(self.place, Path):
            for folder, _, files in os.walk(self.place):
                below = Path(folder).relative_to(self.place)
                for file in files:
                    path = self.place / below / file
                    if is_image_name(file) and path.is_file():
                        yield (below / file).as_posix(), path.stat().st_size
        else:
            root = self.place.path.rstrip("/") + "/"
            for path, facts in self.place.fs.find(self.place.path, detail=True).items():
                yield path.removeprefix(root), int(facts["size"])

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        for first in range(0, len(items), AT_ONCE):
            batch = items[first : first + AT_ONCE]
            for item, value in zip(batch, self._fetch(batch), strict=True):
                if isinstance(value, Exception) and not isinstance(value, (FileNotFoundError, PermissionError)):
                    raise value
                yield item.key, value

    def _fetch(self, items: Sequence[Item]) -> Iterator[Value]:
        if not isinstance(self.place, Path):
            root = self.place.path.rstrip("/")
            yield from self.place.fs.cat_ranges([f"{root}/{item.key}" for item in items], None, None)
            return
        for item in items:
            try:
                yield (self.place / item.key).read_bytes()
            except OSError as error:
                yield error

    def facts(self) -> dict[str, Any]:
        items = self.items()
        return {"kind": "folder", "files": len(items), "bytes": sum(item.size for item in items)}


@dataclass(frozen=True)
class ZipSource:
    """A zip. Items are found by key and carry their unpacked size; of two members of one name the last counts."""

    place: Location
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(label(self.place)).stem

    def items(self) -> list[Item]:
        members = {member.filename: member for member in _opened_zip(self).infolist() if not member.is_dir()}
        return sorted(Item(name, size=member.file_size) for name, member in members.items() if is_image_name(name))

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        archive = _opened_zip(self)
        for item in items:
            value: Value
            try:
                value = archive.read(item.key)
            # A damaged, a cut, an encrypted member, and one packed in a way that Python does not know.
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
                value = error
            yield item.key, value

    def facts(self) -> dict[str, Any]:
        return {"kind": "zip", "files": {label(self.place): self.size}}


@functools.lru_cache(maxsize=4)
def _opened_zip(source: ZipSource) -> zipfile.ZipFile:
    """Its table of contents is read once a process."""
    return open_zip(source.place)


def open_zip(place: Location) -> zipfile.ZipFile:
    """InputError where its table of contents is missing, as after a download that broke off."""
    try:
        return zipfile.ZipFile(place if isinstance(place, Path) else open_bytes(place))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"source {str(place)!r} cannot be read as a zip ({error}): download it again") from error


@dataclass(frozen=True)
class TarSource:
    """An uncompressed tar. An item carries the first byte of its file and the size; links and devices are no images."""

    place: Location
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(label(self.place)).stem

    def items(self) -> list[Item]:
        found: dict[str, Item] = {}  # of two members of one name the last counts, as when it is unpacked
        with open_bytes(self.place) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    for member in archive:
                        if member.isreg() and not member.issparse() and is_image_name(member.name):
                            found[member.name] = Item(member.name, member.offset_data, member.size)
                    end = archive.offset
            except tarfile.TarError as error:
                raise self._damaged(str(error)) from error
            # tarfile takes a header that it cannot read for the end.
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise self._damaged(f"no header at byte {end:,} of {self.size:,}")
        return sorted(found.values())

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"source {str(self.place)!r} is a damaged tar ({reason}): download or make it again")

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        with open_bytes(self.place) as file:
            for item in items:
                file.seek(item.offset)
                yield item.key, file.read(item.size)

    def facts(self) -> dict[str, Any]:
        return {"kind": "tar", "files": {label(self.place): self.size}}
