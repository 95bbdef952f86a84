"""Image files as they lie in a folder, a zip or a tar, each under its path there.

PNG, JPEG, WebP, BMP, TIFF and GIF, recognised by the suffix in any case; of an animation, the first frame counts. Hidden
files and macOS's `__MACOSX` are no images. A path is a key and nothing else: nothing is ever written under it.
"""

import functools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.items import Item, Value, base_name, open_bytes
from pipelines.runtime.locations import Location

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
FETCHED_TOGETHER = 32  # files that are asked of an object store at the same time, because each answer takes long


def is_image_name(name: str) -> bool:
    """Whether a path with slashes has the name of a visible image."""
    path = PurePosixPath(name)
    hidden = any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in path.parts)
    return not hidden and path.suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class FolderSource:
    """A folder, searched through; links to files are followed, links to folders are not. An item carries its size."""

    path: Location

    @property
    def name(self) -> str:
        return base_name(self.path)

    def items(self) -> list[Item]:
        return sorted(Item(name, size=size) for name, size in self._files() if is_image_name(name))

    def _files(self) -> Iterator[tuple[str, int]]:
        """(path below the folder, size) of every file that may be an image."""
        if isinstance(self.path, Path):
            for folder, _, files in os.walk(self.path):
                below = Path(folder).relative_to(self.path)
                for name in files:
                    file = self.path / below / name
                    if is_image_name(name) and file.is_file():
                        yield (below / name).as_posix(), file.stat().st_size
        else:
            # find() lists a store by pages of keys: one request for a thousand files, sizes included.
            root = self.path.path.rstrip("/") + "/"
            for name, facts in self.path.fs.find(self.path.path, detail=True).items():
                yield name.removeprefix(root), int(facts["size"])

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        for first in range(0, len(items), FETCHED_TOGETHER):
            batch = items[first : first + FETCHED_TOGETHER]
            for item, value in zip(batch, self._fetch(batch), strict=True):
                # A file that is gone or closed to us concerns one image; any other error concerns the disk or network.
                if isinstance(value, Exception) and not isinstance(value, (FileNotFoundError, PermissionError)):
                    raise value
                yield item.key, value

    def _fetch(self, items: Sequence[Item]) -> Iterator[Value]:
        if not isinstance(self.path, Path):
            # cat_ranges() asks for all at once and gives errors as values; None, None is the whole file.
            root = self.path.path.rstrip("/")
            yield from self.path.fs.cat_ranges([f"{root}/{item.key}" for item in items], None, None)
            return
        for item in items:
            try:
                yield (self.path / item.key).read_bytes()
            except OSError as error:
                yield error

    def facts(self) -> dict[str, Any]:
        items = self.items()
        return {"kind": "folder", "files": len(items), "bytes": sum(item.size for item in items)}


@dataclass(frozen=True)
class ArchiveSource:
    """One file that holds others. size: its bytes."""

    path: Location
    size: int
    kind: ClassVar[str]

    @property
    def name(self) -> str:
        return PurePosixPath(base_name(self.path)).stem

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "files": {base_name(self.path): self.size}}


class ZipSource(ArchiveSource):
    """A zip. An item has a key and its unpacked size; of two members of one name the last counts."""

    kind = "zip"

    def items(self) -> list[Item]:
        members = {member.filename: member for member in _cached_zip(self).infolist() if not member.is_dir()}
        return sorted(Item(name, size=member.file_size) for name, member in members.items() if is_image_name(name))

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        archive = _cached_zip(self)
        for item in items:
            value: Value
            try:
                value = archive.read(item.key)
            # A damaged, a cut or an encrypted member, and one whose compression Python does not know.
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
                value = error
            yield item.key, value


@functools.lru_cache(maxsize=4)
def _cached_zip(source: ZipSource) -> zipfile.ZipFile:
    """An open zip, so that a process reads its table of contents once."""
    return open_zip(source.path)


def open_zip(path: Location) -> zipfile.ZipFile:
    """Raises InputError if the table of contents is missing, as after a download that broke off."""
    try:
        return zipfile.ZipFile(path if isinstance(path, Path) else open_bytes(path))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"source {str(path)!r} cannot be read as a zip ({error}): download it again") from error


class TarSource(ArchiveSource):
    """An uncompressed tar. An item carries the first byte of its file and the size; links and devices are no images."""

    kind = "tar"

    def items(self) -> list[Item]:
        items: dict[str, Item] = {}  # of two members of one name the last counts, as when the tar is unpacked
        with open_bytes(self.path) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    for member in archive:
                        if member.isreg() and not member.issparse() and is_image_name(member.name):
                            items[member.name] = Item(member.name, member.offset_data, member.size)
                    end = archive.offset
            except tarfile.TarError as error:
                raise self._damaged(str(error)) from error
            # A tar ends with blocks of zeros, but tarfile takes a header that it cannot read for the end too.
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise self._damaged(f"no header at byte {end:,} of {self.size:,}")
        return sorted(items.values())

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"source {str(self.path)!r} is a damaged tar ({reason}): download or make it again")

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        with open_bytes(self.path) as file:
            for item in items:
                file.seek(item.offset)
                yield item.key, file.read(item.size)
