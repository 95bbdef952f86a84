"""Who writes to a folder: one command at a time, by a lease in it that a killed command does not keep.

The lease of a process that is gone is free at once on its own machine, and after LEASE on another. On a disk it is a file
(filelock's), in an object store a few objects (store_lease.py).
"""

import contextlib
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import SoftFileLease, Timeout
from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.errors import InputError
from pipelines.storage.locations import STORAGE_ERRORS, Location, check_writable, commit_json, delete
from pipelines.storage.store_lease import StoreLease

LEASE = 60.0  # seconds that a lease outlasts the last sign of life of who holds it on another machine
MAKING = 600.0  # seconds to wait for another command that makes the very same thing
LOCK, HOLDER = ".lease", ".lease.json"
FILES = frozenset((LOCK, HOLDER))  # what may lie in a folder beside its own files


class Holder(TypedDict):
    """Who holds a lease. since: UTC."""

    machine: str
    process: int
    since: str


@contextlib.contextmanager
def sole_writer(
    folder: Location, what: str, say: Callable[[str], object] = lambda line: None, *, wait: float = 0.0
) -> Iterator[None]:
    """Within the block no other command writes to a folder, which is made if it is not there, and removed if it stays empty.

    Raises InputError if it cannot be written to, or another command writes to it, with who and since when. what: the folder in
    words. wait: seconds for a holder that is about to end.
    """
    check_writable(folder, what)
    made = []
    if isinstance(folder, Path):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    lock = lease(folder / LOCK)
    try:
        acquire(lock, folder, what, say, wait)
        try:
            since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            commit_json(folder / HOLDER, {"machine": platform.node(), "process": os.getpid(), "since": since})
            yield
        finally:
            with contextlib.suppress(*STORAGE_ERRORS):  # the folder is gone, or its disk
                holder = holder_of(folder)
                if holder is not None and (holder["machine"], holder["process"]) == (platform.node(), os.getpid()):
                    delete(folder / HOLDER)  # if nobody else has taken it over
            lock.release()
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


def lease(place: Location) -> SoftFileLease | StoreLease:
    """That of a name, which is not yet held."""
    if isinstance(place, Path):
        return SoftFileLease(place, lease_duration=LEASE)
    return StoreLease(place, lasts=LEASE, machine=f"{machine()}{process_space()}", is_alive=is_alive)


def acquire(
    lock: SoftFileLease | StoreLease, folder: Location, what: str, say: Callable[[str], object], wait: float
) -> None:
    """Take the lease, from a holder on another machine only after that has given no sign of life for LEASE. Raises InputError if
    its holder lives."""
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        holder = holder_of(folder)
        if holder is None or holder["machine"] != platform.node() or not is_alive(holder["process"]):
            who = "another command" if holder is None else f"process {holder['process']} on {holder['machine']}"
            say(f"waiting for up to {LEASE:.0f} s: {who} wrote to {str(folder)!r}, and may be gone")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=LEASE + 5.0, poll_interval=1.0)
                return
            holder = holder_of(folder)
        raise InputError(
            f"{what} {str(folder)!r} is written to by {describe(holder)}: wait until that has ended, or stop it, and give the "
            "same command again"
        ) from None


def holder_of(folder: Location) -> Holder | None:
    """Who holds the lease of a folder; None if nobody says so, as in the moment in which it is taken."""
    with contextlib.suppress(*STORAGE_ERRORS, InputError):
        return typed.read_json(folder / HOLDER, Holder, what="holder", advice="")
    return None


def describe(holder: Holder | None) -> str:
    if holder is None:
        return "another command"
    return f"process {holder['process']} on {typed.shown(holder['machine'])} since {holder['since'][:30]}"


def machine() -> str:
    """This machine's name: the host's name tells containers of one image apart, the machine's id hosts that were copied."""
    with contextlib.suppress(OSError):
        return f"{platform.node()}-{hashlib.sha256(Path('/etc/machine-id').read_bytes()).hexdigest()[:8]}"
    return platform.node()


def process_space() -> str:
    """What tells containers of one host name apart, in which a number is another process: Linux' namespace of process ids."""
    with contextlib.suppress(OSError):
        return f"-{Path('/proc/self/ns/pid').stat().st_ino}"
    return ""


def is_alive(process: int) -> bool:
    """Whether a process of this machine, and of this container, runs."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
