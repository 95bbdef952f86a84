"""What every source of images offers: its items in order, and the values of any of them in any process."""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from ddpm_core.errors import InputError, one_line
from pipelines.storage.locations import STORAGE_ERRORS, Location

Value = bytes | np.ndarray | Exception
# Bytes that a read at random fetches from an object store: enough to pay for the request, unlike fsspec's 50 MiB a seek.
REMOTE_BLOCK = 4 << 20
LARGEST_FILE = 1 << 30  # bytes of an encoded image; a zip of 10 MB can hold 10 GB
ADDRESS = re.compile(r"\s*<[^<>]* at 0x[0-9a-f]+>|\b0x[0-9a-f]{8,}")  # as in "<_io.BytesIO object at 0x7f24dc4eb7e0>"


class Item(NamedTuple):
    """One image: its key, and where its value lies. Each source says what it counts by offset and size."""

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
        """(key, value) of ascending items: encoded bytes, or pixels as uint8 [H,W,C]. A value that is broken is an
        exception in its place; a disk or network that fails is raised, because trying again may help."""

    def others(self) -> dict[str, int]:
        """What the source holds beside its images, and is not read: the number of each kind."""

    def facts(self) -> dict[str, Any]:
        """What tells this source from another, as JSON; the same for every copy of it, wherever that lies."""


def attempt(read: Callable[[], Value], size: int = 0) -> Value:
    """The value that `read` gives, or the exception that says why it is broken: that of one image stops no other.

    size: the value's bytes, if they are known. A disk or network that fails is raised, because trying again may help.
    """
    if size > LARGEST_FILE:
        return ValueError(f"{size:,} bytes, more than an image's file may have ({LARGEST_FILE:,})")
    try:
        return read()
    except Exception as error:  # a decompressor raises whatever it comes across
        if is_storage_error(error):
            raise
        return error


@contextlib.contextmanager
def damage_as(error_of: Callable[[str], InputError]) -> Iterator[None]:
    """Turns whatever damaged content raises in the block into the InputError that `error_of` makes of its message. A disk or
    network that fails is raised, because trying again may help."""
    try:
        yield
    except Exception as error:  # a decompressor raises whatever it comes across
        if isinstance(error, InputError) or is_storage_error(error):
            raise
        raise error_of(str(error)) from error


def is_storage_error(error: Exception) -> bool:
    """Whether a disk or network failed. Decompressors and Arrow raise OSError for damaged content too, but without errno."""
    if isinstance(error, OSError):
        # A seek to a place that a damaged file states is none of the disk's faults.
        return isinstance(error, ConnectionError | TimeoutError) or error.errno not in (None, errno.EINVAL)
    return isinstance(error, STORAGE_ERRORS)


def message_of(error: Exception) -> str:
    """What an error says, on one line that is the same in every run: without addresses in memory and places on the disk."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return ADDRESS.sub("", message) or type(error).__name__


def reason_of(error: Exception) -> str:
    """Why an image is left out: the error's type and what it says."""
    kind, message = type(error).__name__, message_of(error)
    return kind if message == kind else f"{kind}: {message}"


def base_name(path: Location) -> str:
    """The last part of a path; of a bucket, its name."""
    return path.name or str(path).rstrip("/").rsplit("/", 1)[-1]


def byte_size(path: Location) -> int:
    return int(path.stat().st_size)


def open_bytes(path: Location) -> BinaryIO:
    """A file for reading at random, local or not."""
    if isinstance(path, Path):
        return path.open("rb")
    return path.open("rb", block_size=REMOTE_BLOCK)


def split_name(name: str, split: str | None) -> str:
    """What a data set's split is called: the training images as the data set itself, others with their split's name."""
    return name if split in (None, "train") else f"{name}_{split}"


def choose_split(split: str | None, available: Sequence[str], path: Location) -> str | None:
    """The split to read: the one asked for, else `train`, else the only one. Raises InputError if there is no such."""
    if split is not None and not available:
        raise InputError(f"--split is {split!r}, but source {str(path)!r} has no splits: leave it out")
    if split is None and available:
        split = "train" if "train" in available else available[0] if len(available) == 1 else None
        if split is None:
            raise InputError(f"source {str(path)!r} has the splits {', '.join(available)}: choose one with --split")
    if split is not None and split not in available:
        raise InputError(
            f"--split is {split!r}, but source {str(path)!r} has only {', '.join(available)}: give one of these"
        )
    return split
