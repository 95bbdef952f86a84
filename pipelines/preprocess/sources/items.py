"""What every source of images offers: its items in order, and the values of any of them in any process."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from ddpm_core.errors import InputError
from pipelines.runtime.locations import Location

Value = bytes | np.ndarray | Exception
REMOTE_BLOCK = 4 << 20  # bytes read ahead from an object store: long enough to pay for the request, no 50 MiB a seek


class Item(NamedTuple):
    """One image: its key, and where its value lies. What offset and size count is the source's to say."""

    key: str
    offset: int = 0
    size: int = 0


class Source(Protocol):
    """Images under keys. Small and picklable: workers open the files themselves."""

    @property
    def name(self) -> str:
        """What a person calls the data set."""

    def items(self) -> list[Item]:
        """Every image, ascending by key, without reading a value."""

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        """The values of ascending items: encoded bytes, or pixels as uint8 [H, W, C]. A value that is broken is an
        exception in its place; a disk or network that fails is raised, since trying again may help."""

    def facts(self) -> dict[str, Any]:
        """What tells this source from another, the same for every copy of it, wherever that lies: JSON."""


def label(place: Location) -> str:
    """The last part of a place, also of a bucket."""
    return place.name or str(place).rstrip("/").rsplit("/", 1)[-1]


def byte_size(place: Location) -> int:
    return int(place.stat().st_size)


def open_bytes(place: Location) -> BinaryIO:
    """A file for reading at random, local or not."""
    if isinstance(place, Path):
        return place.open("rb")
    return place.open("rb", block_size=REMOTE_BLOCK)


def split_name(name: str, split: str | None) -> str:
    """What a data set's split is called; the training images are the data set itself."""
    return name if split in (None, "train") else f"{name}_{split}"


def choose_split(split: str | None, there: Sequence[str], place: Location) -> str | None:
    """The split to read: the one asked for, else `train`, else the only one. InputError where that is none."""
    if split is not None and not there:
        raise InputError(f"--split is {split!r}, but source {str(place)!r} has no splits: leave it out")
    if split is None and there:
        split = "train" if "train" in there else there[0] if len(there) == 1 else None
        if split is None:
            raise InputError(f"source {str(place)!r} has the splits {', '.join(there)}: choose one with --split")
    if split is not None and split not in there:
        raise InputError(
            f"--split is {split!r}, but source {str(place)!r} has only {', '.join(there)}: give one of these"
        )
    return split
