"""Files of object stores that several processes of a node read, such as weights: fetched once, kept on its disk.

    ~/.cache/ddpm/files/KEY/NAME        KEY: of the URL and of the object's checksum, so that another object is another file

The files that were used last stay, up to LIMIT bytes.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from upath import UPath

from ddpm_core.commit import committed_file
from pipelines.storage.locations import Location

LIMIT = 16 << 30  # bytes


def cache_folder() -> Path:
    """This user's cache on this node, made if it is not there; /tmp is everybody's."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddpm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def on_this_node(place: Location) -> Path:
    """A file as one of a disk of this node: itself, or its copy in the cache. Raises FileNotFoundError if it is not there, and
    whatever its store raises."""
    if isinstance(place, Path):
        return place
    key = hashlib.sha256(f"{place} {place.fs.checksum(place.path)}".encode()).hexdigest()[:32]
    folder = cache_folder() / "files"
    copy = folder / key / place.name
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f"{key}.lock"):  # of several workers that want it, one fetches
        if copy.is_file():
            os.utime(copy)
            return copy
        with FileLock(folder / "room.lock"):
            make_room(folder, place.stat().st_size)
        with committed_file(copy) as temporary:
            place.fs.get_file(place.path, str(temporary))
    return copy


def make_room(folder: Path, size: int) -> None:
    """Delete files that were not used for longest, until so many bytes fit. Who reads one at the moment reads on."""
    kept = []
    for copy in folder.glob("*/[!.]*"):  # not what is being fetched
        with contextlib.suppress(FileNotFoundError):
            kept.append(((facts := copy.stat()).st_mtime, facts.st_size, copy))
    total = size + sum(each for _, each, _ in kept)
    for _, each, copy in sorted(kept):
        if total <= LIMIT:
            return
        copy.unlink(missing_ok=True)
        total -= each


@dataclass(frozen=True)
class NodeFolder:
    """A folder in an object store, whose files are read from this node's disk."""

    place: UPath

    def __truediv__(self, name: str) -> Path:
        return on_this_node(self.place / name)

    def __str__(self) -> str:
        return str(self.place)
