"""LSUN as it is published: a zip that holds one LMDB, whose keys of 40 hex digits lead to WebP or JPEG bytes."""

import contextlib
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from ddpm_core.commit import committed_file, remove_leftovers
from ddpm_core.errors import InputError, one_line
from pipelines.preprocess.sources.items import Item, Value, attempt, base_name, is_storage_error
from pipelines.preprocess.sources.kinds import count, other_kind
from pipelines.preprocess.sources.names import key_of, name_of
from pipelines.runtime.progress import Progress, Say
from pipelines.storage.locations import Location

DATABASE, LOCK = "data.mdb", "lock.mdb"
CHUNK_BYTES = 4 << 20  # read at a time while unpacking
# Images are packed already, so that a database of them shrinks little; what is small may be of anything.
MOST_TIMES_LARGER, SMALL = 50, 64 << 20
MAGIC = 0xBEEFC0DE.to_bytes(4, "little")  # of an LMDB's first page, at byte 16


@dataclass(frozen=True)
class LmdbSource:
    """An LMDB folder. An item has a key alone. beside: the kinds of other files there, and their numbers."""

    path: Path
    beside: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return key_of(self.path.name.removesuffix("_lmdb"))

    def items(self) -> list[Item]:
        with self._cursor() as cursor:
            try:
                keys = [key.decode("utf-8", "surrogateescape") for key in cursor.iternext(keys=True, values=False)]
            except lmdb.Error as error:
                raise self._unreadable(error) from error
        return sorted(Item(key_of(key)) for key in keys)

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        with self._cursor() as cursor:
            for item in items:

                def value(key: str = item.key) -> Value:
                    name = name_of(key).encode("utf-8", "surrogateescape")
                    return cursor.value() if cursor.set_key(name) else b""

                yield item.key, attempt(value)

    def others(self) -> dict[str, int]:
        return dict(self.beside)

    def facts(self) -> dict[str, Any]:
        return lmdb_facts((self.path / DATABASE).stat().st_size)

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Any]:
        try:
            # lock=False: a lock file cannot be written to a read-only disk. readahead=False: listing the keys would
            # read the values between them.
            environment = lmdb.open(str(self.path), readonly=True, lock=False, readahead=False, max_readers=1)
        except lmdb.Error as error:
            raise self._unreadable(error) from error
        with environment:
            # LMDB maps as many pages as its header states. Touching one beyond the end of a cut file kills the process.
            expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            size = (self.path / DATABASE).stat().st_size
            if size < expected:
                raise self._unreadable(f"{DATABASE} has {size:,} bytes of {expected:,}")
            with environment.begin() as transaction:
                yield transaction.cursor()

    def _unreadable(self, reason: object) -> InputError:
        return InputError(
            f"source {str(self.path)!r} cannot be read as an LMDB ({reason}): copy or unpack it again from LSUN's zip"
        )


def lmdb_facts(size: int) -> dict[str, Any]:
    """The facts of an LMDB of `size` bytes, whether it lies in a folder or still in its zip."""
    return {"kind": "lmdb", "files": {DATABASE: size}}


def find_databases(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The LMDBs in a zip; LSUN's has one."""
    return [member for member in archive.infolist() if member.filename.rsplit("/", 1)[-1] == DATABASE]


def unpack(path: Location, archive: zipfile.ZipFile, scratch: Path | None, say: Say) -> LmdbSource:
    """The LMDB of LSUN's zip at `path`, in a folder of `scratch`; unpacked unless it is there with the size and CRC that
    the zip states. The folder is named after the zip: no name in the zip says where anything is written.

    Raises InputError if the zip holds several or is damaged, or if there is no room.
    """
    members = find_databases(archive)
    if len(members) > 1:
        raise InputError(
            f"source {str(path)!r} holds {len(members)} LMDBs ({members[0].filename!r}, {members[1].filename!r}, ...): "
            "unpack it and give the folder of one"
        )
    if scratch is None:
        raise InputError(
            f"source {str(path)!r} holds an LMDB of {members[0].file_size:,} bytes, which must be unpacked onto a local disk "
            "to be read: unpack it there and give the folder"
        )
    name = base_name(path).removesuffix(".zip").removesuffix("_lmdb")
    target = scratch / f"{name}_lmdb" / DATABASE
    if not _is_whole(target, members[0]):
        _extract(path, archive, members[0], target, Progress(f"unpack {name}", members[0].file_size, "bytes", say))
    names = [member.filename for member in archive.infolist() if not member.is_dir()]
    beside = count(other_kind(name) for name in names if name.rsplit("/", 1)[-1] not in (DATABASE, LOCK))
    return LmdbSource(target.parent, tuple(beside.items()))


def _is_whole(target: Path, member: zipfile.ZipInfo) -> bool:
    """Whether a file has the size and CRC-32 of a zip's member."""
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    crc = 0
    with target.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc == member.CRC


def _extract(
    path: Location, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, progress: Progress
) -> None:
    check_member(path, archive, member)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)  # of a killed run; they are as large as the database
    free = shutil.disk_usage(target.parent).free
    if free < member.file_size:
        raise InputError(
            f"{str(target.parent)!r} has {free:,} bytes free, but the LMDB in {str(path)!r} needs {member.file_size:,}: "
            "make room, or unpack it elsewhere and give the folder"
        )
    try:
        with archive.open(member) as packed, committed_file(target) as temporary, temporary.open("wb") as file:
            while chunk := packed.read(CHUNK_BYTES):
                file.write(chunk)
                progress.advance(len(chunk))
    # A wrong CRC, a broken or a cut stream, an encrypted member, a compression that Python does not know.
    except Exception as error:
        if is_storage_error(error):
            raise
        raise not_unpacked(path, error) from error


def check_member(path: Location, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises InputError for a member that is no LMDB by its first page, or that would be unpacked to far more than it can hold;
    nothing is unpacked."""
    if member.file_size > max(SMALL, MOST_TIMES_LARGER * member.compress_size):
        raise InputError(
            f"source {str(path)!r} holds {member.filename!r} of {member.compress_size:,} bytes that would be unpacked to "
            f"{member.file_size:,}, which no LMDB of images would: look at the zip, and unpack it yourself if it is one"
        )
    try:
        with archive.open(member) as packed:
            head = packed.read(20)
    except Exception as error:
        if is_storage_error(error):
            raise
        raise not_unpacked(path, error) from error
    if head[16:] != MAGIC:
        raise InputError(
            f"source {str(path)!r} holds {member.filename!r}, which is no LMDB: give LSUN's zip, or another source"
        )


def not_unpacked(path: Location, error: Exception) -> InputError:
    reason = one_line(error)
    return InputError(f"source {str(path)!r} cannot be unpacked ({reason}): download it again, or unpack it yourself")
