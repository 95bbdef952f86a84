"""A lease in an object store, by the one thing that stores have for it: an object is made only if its name is free.

    LEASE/00000007      who holds it for the seventh time, and its signs of life

Whoever makes the next number holds the lease: the store lets one of several win. Only the holder writes to its object, with a
new count of signs of life now and then, and at the end that it is free. Another may make the next number if the newest is free,
if its process is known to be gone, or if its count has stood still for so long by the other's own clock: no two clocks are
compared. The newest number is never deleted, so that an old look at the folder can win nothing.
"""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from filelock import Timeout
from typing_extensions import TypedDict
from upath import UPath

from ddpm_core import typed
from ddpm_core.commit import json_text
from ddpm_core.errors import InputError, one_line
from pipelines.storage.locations import commit_json, delete, entries

SIGNS = 4  # of life within the time that a lease lasts

logger = logging.getLogger(__name__)


class Held(TypedDict):
    """What a lease's object says. holder: of its own in the world. signs: of life, counted."""

    holder: str
    machine: str
    process: int
    signs: int
    free: bool


@dataclass(frozen=True)
class Seen:
    """What somebody who waits saw last, and since when by its own clock."""

    holder: str
    signs: int
    since: float


class StoreLease:
    """Held by one process at a time, with filelock's interface. lasts: seconds that it outlasts the last sign of life of its
    holder. machine: this one's name. is_alive: whether a process of it runs."""

    def __init__(self, place: UPath, *, lasts: float, machine: str, is_alive: Callable[[int], bool]) -> None:
        self.place, self.lasts, self.machine, self.is_alive = place, lasts, machine, is_alive
        self._held: Held = {"holder": "", "machine": machine, "process": os.getpid(), "signs": 0, "free": False}
        self._number = 0  # that it holds, 0 if none
        self._seen: Seen | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, timeout: float = 0.0, poll_interval: float = 1.0) -> None:
        """Take the lease. timeout: seconds to wait for it, below 0 for as long as it takes. Raises Timeout if another has it all
        the while, InputError if the store makes objects whose name is taken."""
        deadline = time.monotonic() + timeout
        while not self._try():
            if timeout >= 0 and time.monotonic() >= deadline:
                raise Timeout(str(self.place))
            time.sleep(poll_interval)
        self._ended.clear()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others have it. A store that does not answer is no error: it becomes free by itself."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._number:
            with contextlib.suppress(Exception):  # every store raises its own
                if self._numbers()[-1:] == [self._number]:
                    commit_json(self._object(self._number), {**self._held, "free": True})
        self._number = 0

    def _try(self) -> bool:
        numbers = self._numbers()
        newest = numbers[-1] if numbers else 0
        if newest and not self._is_free(newest):
            return False
        self._held = {**self._held, "holder": uuid.uuid4().hex, "signs": 0}
        if not self._make(newest + 1):
            return False
        if self._make(newest + 1, again=True):
            delete(self._object(newest + 1))
            raise InputError(
                f"the object store of {str(self.place)!r} makes an object although its name is taken (no If-None-Match), so "
                "that two commands could write there at once: give a store that does, or a folder that every node can reach"
            )
        self._number = newest + 1
        for number in numbers:
            with contextlib.suppress(Exception):  # the next holder tries again
                delete(self._object(number))
        return True

    def _make(self, number: int, *, again: bool = False) -> bool:
        """Whether the object of a number could be made. A try whose answer was lost was made all the same: it is ours then."""
        place = self._object(number)
        try:
            place.fs.pipe_file(place.path, json_text(self._held).encode(), mode="create")
        except FileExistsError:
            held = self._read(number)
            return not again and held is not None and held["holder"] == self._held["holder"]
        return True

    def _is_free(self, number: int) -> bool:
        held = self._read(number)
        if held is None:  # deleted in this moment: there is a newer one
            return False
        if held["free"] or (held["machine"] == self.machine and not self.is_alive(held["process"])):
            return True
        now = time.monotonic()
        if self._seen is None or (self._seen.holder, self._seen.signs) != (held["holder"], held["signs"]):
            self._seen = Seen(held["holder"], held["signs"], now)
        return now - self._seen.since > self.lasts

    def _renew(self) -> None:
        """Give signs of life, until the lease is given back or somebody else has it."""
        told = False
        while not self._ended.wait(self.lasts / SIGNS):
            try:
                if self._numbers()[-1:] != [self._number]:
                    logger.warning(
                        "%s was taken over by another command, since this one gave no sign of life for %.0f s",
                        self.place,
                        self.lasts,
                    )
                    return
                self._held["signs"] += 1
                commit_json(self._object(self._number), self._held)
                told = False
            except Exception as error:  # every store raises its own; the next sign may come through
                if not told:
                    logger.warning("%s: no sign of life could be given (%s)", self.place, one_line(error))
                told = True

    def _numbers(self) -> list[int]:
        """All that there are, ascending."""
        return sorted(int(path.name) for path in entries(self.place) if path.name.isdecimal())

    def _object(self, number: int) -> UPath:
        return self.place / f"{number:08d}"

    def _read(self, number: int) -> Held | None:
        """What an object says, None if it is gone. Raises InputError if it is damaged."""
        with contextlib.suppress(FileNotFoundError):
            return typed.read_json(self._object(number), Held, what="lease", advice="give the same command again")
        return None
