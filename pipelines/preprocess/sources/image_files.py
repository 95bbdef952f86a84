"""Image files as they lie in a folder, a zip or a tar, each under its path there.

Images are recognised by the suffix in any case, and without a known one by their first bytes (kinds.py); of an animation,
the first frame counts. Links are followed within the source. A path is a key (names.py) and nothing else: nothing is ever
written under it.
"""

import abc
import functools
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, NamedTuple

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.folders import FETCHED_TOGETHER, entries, heads
from pipelines.preprocess.sources.items import (
    LARGEST_FILE,
    Item,
    Value,
    attempt,
    base_name,
    damage_as,
    is_storage_error,
    open_bytes,
)
from pipelines.preprocess.sources.kinds import HEAD_BYTES, IMAGE, count, kind_of_file, kind_of_name
from pipelines.preprocess.sources.names import key_of, name_of
from pipelines.storage.locations import Location

REPEATED, LINK, SPARSE, SPECIAL = "name that comes again", "link to nothing in it", "sparse file", "special file"
BYTES_AFTER = "bytes after its end"
END_BYTES = 22 + 2**16  # in which a zip's last record lies, with its comment
MOST_LINKS = 40  # that lead to one another, as many as Linux follows


class Listing(NamedTuple):
    """items: the images, ascending by key. others: the number of other files of each kind."""

    items: list[Item]
    others: dict[str, int]


@dataclass(frozen=True)
class FileSource(abc.ABC):
    """Files that are listed once."""

    path: Location

    @property
    def name(self) -> str:
        return key_of(base_name(self.path))

    @functools.cached_property
    def _listing(self) -> Listing:
        return self._list()

    @abc.abstractmethod
    def _list(self) -> Listing: ...

    def items(self) -> list[Item]:
        return self._listing.items

    def others(self) -> dict[str, int]:
        return self._listing.others

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without the listing


@dataclass(frozen=True)
class FolderSource(FileSource):
    """A folder, searched through; links are followed. An item carries its size."""

    def _list(self) -> Listing:
        items, kinds, unclear = [], [], []
        for entry in entries(self.path):
            kind = entry.problem or kind_of_name(entry.name)
            if kind == IMAGE:
                items.append(Item(key_of(entry.name), size=entry.size))
            elif kind is None:
                unclear.append(entry)
            else:
                kinds.append(kind)
        names = [entry.name for entry in unclear]
        for entry, head in zip(unclear, heads(self.path, names, HEAD_BYTES), strict=True):
            kind = kind_of_file(entry.name, head)
            if kind == IMAGE:
                items.append(Item(key_of(entry.name), size=entry.size))
            else:
                kinds.append(kind)
        return Listing(sorted(items), count(kinds))

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        for first in range(0, len(items), FETCHED_TOGETHER):
            yield from self._fetch(items[first : first + FETCHED_TOGETHER])

    def _fetch(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        fetched: dict[Item, bytes | Exception] = {}  # from an object store
        if not isinstance(self.path, Path):
            wanted = [item for item in items if item.size <= LARGEST_FILE]
            root = self.path.path.rstrip("/")
            paths = [f"{root}/{name_of(item.key)}" for item in wanted]
            fetched = dict(zip(wanted, self.path.fs.cat_ranges(paths, None, None) if paths else (), strict=True))

        def read(item: Item) -> bytes:
            content = fetched[item] if fetched else (self.path / name_of(item.key)).read_bytes()
            if isinstance(content, Exception):
                raise content
            return content

        for item in items:
            # A file that is gone or closed to us concerns one image; any other error concerns the disk or network.
            try:
                yield item.key, attempt(functools.partial(read, item), item.size)
            except (FileNotFoundError, PermissionError) as error:
                yield item.key, error

    def facts(self) -> dict[str, Any]:
        items = self.items()
        return {"kind": "folder", "files": len(items), "bytes": sum(item.size for item in items)}


@dataclass(frozen=True)
class ArchiveSource(FileSource):
    """One file that holds others. size: its bytes."""

    size: int
    kind: ClassVar[str]

    @property
    def name(self) -> str:
        return PurePosixPath(key_of(base_name(self.path))).stem

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "files": {key_of(base_name(self.path)): self.size}}


class ZipSource(ArchiveSource):
    """A zip. An item has a key and its unpacked size; of two members of one name the last counts."""

    kind = "zip"

    def _list(self) -> Listing:
        archive = _cached_zip(self)
        self._check_table(archive.infolist())
        members = [member for member in archive.infolist() if not member.is_dir()]
        by_name = {member.filename: member for member in members}
        items, kinds = [], [REPEATED] * (len(members) - len(by_name))
        for name, member in by_name.items():
            target = _resolve(archive, member)
            kind = LINK if target is None else kind_of_name(name) or kind_of_file(name, _head(archive, target))
            if target is not None and kind == IMAGE:
                items.append(Item(key_of(name), size=target.file_size))
            else:
                kinds.append(kind)
        return Listing(sorted(items), count(kinds))

    def _check_table(self, members: Sequence[zipfile.ZipInfo]) -> None:
        """Raises InputError if the table of contents does not name all members that are there."""
        first = min((member.header_offset for member in members), default=0)
        with open_bytes(self.path) as file:
            if first > 0 and file.read(4) == b"PK\x03\x04":
                raise InputError(
                    f"source {str(self.path)!r} has files in its first {first:,} bytes that its table of contents does "
                    "not name, as if two zips were joined: unpack it and give the folder"
                )
            file.seek(max(0, self.size - END_BYTES))
            end = file.read()
        # The number of members, modulo 2^16; all ones if it stands elsewhere (zip64).
        stated = int.from_bytes(end[end.rfind(b"PK\x05\x06") :][10:12], "little")
        if stated not in (len(members) % 2**16, 0xFFFF):
            raise InputError(
                f"source {str(self.path)!r} has a damaged table of contents, which names {len(members):,} of {stated:,} "
                "files: download or make it again"
            )

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        archive = _cached_zip(self)
        for item in items:
            yield item.key, attempt(functools.partial(_read_member, archive, name_of(item.key)), item.size)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    target = _resolve(archive, archive.getinfo(name))
    if target is None:
        raise FileNotFoundError(f"{name!r} is a link that leads nowhere")
    return archive.read(target.filename)  # whose errors name the member


def _resolve(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> zipfile.ZipInfo | None:
    """The file that a member is, or that it is a link to; None if the archive does not hold that."""
    for _ in range(MOST_LINKS):
        if not stat.S_ISLNK(member.external_attr >> 16):
            return member
        try:
            leads_to = archive.read(member).decode()
            member = archive.getinfo(_target(member.filename, leads_to))
        except Exception as error:  # it is damaged, no text, or leads out of the archive
            if is_storage_error(error):
                raise
            return None
    return None


def _target(link: str, leads_to: str) -> str:
    """The path of what a symbolic link in an archive leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(link), leads_to))


def _head(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The first bytes of a member; none of a damaged or an encrypted one."""

    def read() -> bytes:
        with archive.open(member) as file:
            return file.read(HEAD_BYTES)

    head = attempt(read)
    return head if isinstance(head, bytes) else b""


@functools.lru_cache(maxsize=4)
def _cached_zip(source: ZipSource) -> zipfile.ZipFile:
    """An open zip, so that a process reads its table of contents once."""
    return open_zip(source.path)


def open_zip(path: Location) -> zipfile.ZipFile:
    """Raises InputError if the table of contents is missing, as after a download that broke off."""
    with damage_as(
        lambda reason: InputError(f"source {str(path)!r} cannot be read as a zip ({reason}): download it again")
    ):
        try:
            return zipfile.ZipFile(path if isinstance(path, Path) else open_bytes(path))
        except UnicodeDecodeError as error:
            raise InputError(
                f"source {str(path)!r} marks a name as UTF-8 that is not ({error.object!r}): unpack it and give the folder"
            ) from error


class TarSource(ArchiveSource):
    """An uncompressed tar, or several one after the other. An item carries the first byte of its file and the size."""

    kind = "tar"

    def _list(self) -> Listing:
        with damage_as(self._damaged), open_bytes(self.path) as file:
            return self._list_open(file)

    def _list_open(self, file: BinaryIO) -> Listing:
        members: dict[str, tarfile.TarInfo] = {}  # of two of one name the last counts, as when the tar is unpacked
        repeated, start = 0, 0
        while True:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if not member.isdir():
                        name = posixpath.normpath(member.name)
                        repeated += name in members
                        members[name] = _followed(member, members)
                end = archive.offset
            # A tar ends with blocks of zeros, but tarfile takes a header that it cannot read for the end too.
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise self._damaged(f"no header at byte {end:,} of {self.size:,}")
            start = _skip_zeros(file, end)
            file.seek(start)
            if not is_tar(file.read(tarfile.BLOCKSIZE)):
                break
        items, kinds = [], [REPEATED] * repeated
        for member in members.values():
            place = _linked(member, members)
            kind = _kind_of_member(member, place, file)
            if kind == IMAGE and place is not None:
                items.append(Item(key_of(member.name), place.offset_data, place.size))
            else:
                kinds.append(kind)
        others = count(kinds)
        if start < self.size:
            self._check_rest(file, start)
            others[BYTES_AFTER] = self.size - start
        return Listing(sorted(items), others)

    def _check_rest(self, file: BinaryIO, start: int) -> None:
        """Raises InputError if what follows the archive's end holds members of a tar."""
        file.seek(start)
        last = b""
        while chunk := file.read(1 << 20):
            if b"ustar" in last + chunk:
                raise self._damaged(f"no header at byte {start:,} of {self.size:,}")
            last = chunk[-4:]

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"source {str(self.path)!r} is a damaged tar ({reason}): download or make it again")

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        with open_bytes(self.path) as file:
            for item in items:

                def read(item: Item = item) -> bytes:
                    file.seek(item.offset)
                    return file.read(item.size)

                yield item.key, attempt(read, item.size)


def is_tar(head: bytes) -> bool:
    """Whether a file's first block is a tar's header with a right checksum."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _skip_zeros(file: BinaryIO, start: int) -> int:
    """The first byte of the first block from `start` on that is not all zeros; the file's size if there is none."""
    file.seek(start)
    while chunk := file.read(1 << 20):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return start + zeros - zeros % tarfile.BLOCKSIZE
        start += len(chunk)
    return start


def _followed(member: tarfile.TarInfo, earlier: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """A member, where a hard link lies: at the data of the earlier file of that name, which may be replaced later."""
    target = earlier.get(posixpath.normpath(member.linkname)) if member.islnk() else None
    if target is not None and target.isreg():
        member.type, member.offset_data, member.size = target.type, target.offset_data, target.size
    return member


def _linked(member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member that holds a member's data: itself, or what a symbolic link leads to; None if that is not in the tar."""
    for _ in range(MOST_LINKS):
        if not member.issym():
            return None if member.islnk() else member
        target = members.get(_target(member.name, member.linkname))
        if target is None:
            return None
        member = target
    return None


def _kind_of_member(member: tarfile.TarInfo, place: tarfile.TarInfo | None, file: BinaryIO) -> str:
    """IMAGE, or what kind of other member it is. place: the member that holds its data."""
    if place is None:
        return LINK
    if not place.isreg():
        return SPECIAL
    if place.issparse():
        return SPARSE
    kind = kind_of_name(member.name)
    if kind is None:
        file.seek(place.offset_data)
        kind = kind_of_file(member.name, file.read(min(HEAD_BYTES, place.size)))
    return kind
