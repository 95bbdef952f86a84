"""Every file below a folder, on a disk or in an object store."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.kinds import count, other_kind
from pipelines.storage.locations import Location

FETCHED_TOGETHER = 32  # files that are asked of an object store at the same time, because each answer takes long
BROKEN_LINK, LOOP, SPECIAL = "broken link", "link to a folder above it", "special file"


class FolderEntry(NamedTuple):
    """A path below the folder, with slashes. size: a file's bytes. problem: why there is no file to read, else empty."""

    name: str
    size: int
    problem: str = ""


def entries(folder: Location) -> Iterator[FolderEntry]:
    """Every file below a folder, in no order. Links are followed, to folders too unless they lead back to a folder above
    them. Raises InputError if a folder cannot be listed."""
    if isinstance(folder, Path):
        yield from _local_entries(folder)
        return
    root = folder.path.rstrip("/") + "/"
    for name, facts in folder.fs.find(folder.path, detail=True).items():
        if not name.endswith("/"):  # what some stores keep in place of an empty folder
            yield FolderEntry(name.removeprefix(root), int(facts["size"] or 0))


def _local_entries(root: Path) -> Iterator[FolderEntry]:
    def identity(path: str) -> tuple[int, int]:
        facts = os.stat(path)
        return facts.st_dev, facts.st_ino

    pending = [("", frozenset({identity(str(root))}))]
    while pending:
        below, above = pending.pop()  # below: the folder's path with a slash at its end; above: itself and all above it
        for entry in _scan(root, below):
            name = below + entry.name
            try:
                facts = entry.stat()
            except OSError:  # nothing is there, or a link leads to itself
                yield FolderEntry(name, 0, BROKEN_LINK)
                continue
            if stat.S_ISREG(facts.st_mode):
                yield FolderEntry(name, facts.st_size)
            elif not stat.S_ISDIR(facts.st_mode):
                yield FolderEntry(name, 0, SPECIAL)
            elif (place := identity(entry.path)) in above:
                yield FolderEntry(name, 0, LOOP)
            else:
                pending.append((f"{name}/", above | {place}))


def _scan(root: Path, below: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(root / below) as listing:
            return list(listing)
    except OSError as error:
        raise InputError(
            f"source {str(root)!r} has a folder {below!r} that cannot be listed ({error.strerror}): make it readable, or "
            "remove it"
        ) from error


def heads(folder: Location, names: Sequence[str], size: int) -> Iterator[bytes]:
    """The first `size` bytes of files below a folder; none of a file that cannot be read."""
    if isinstance(folder, Path):
        for name in names:
            try:
                with (folder / name).open("rb") as file:
                    yield file.read(size)
            except OSError:
                yield b""
        return
    root = folder.path.rstrip("/")
    for first in range(0, len(names), FETCHED_TOGETHER):
        paths = [f"{root}/{name}" for name in names[first : first + FETCHED_TOGETHER]]
        for head in folder.fs.cat_ranges(paths, 0, size):
            yield head if isinstance(head, bytes) else b""


def kinds_beside(
    folder: Location, own: Sequence[str], kind_of: Callable[[str], str] = other_kind
) -> tuple[tuple[str, int], ...]:
    """(kind, number) of all files below a folder but some, which a source reads."""
    names = frozenset(own)
    kinds = (entry.problem or kind_of(entry.name) for entry in entries(folder) if entry.name not in names)
    return tuple(count(kinds).items())
