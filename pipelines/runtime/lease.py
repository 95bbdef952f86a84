"""Who writes to a folder: one command at a time, by a lease in it that a killed command does not keep.

The lease of a process that is gone is free at once on its own machine, and after LEASE on another. An object store has no
leases: there whole objects appear under their final names, and nothing of another command is deleted.
"""

import contextlib
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import SoftFileLease, Timeout
from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.commit import write_json
from ddpm_core.errors import InputError
from pipelines.runtime.locations import Location, check_writable
from pipelines.runtime.progress import Say

LEASE = 60.0  # seconds that a lease outlasts the last sign of life of who holds it on another machine
LOCK, HOLDER = ".lease", ".lease.json"
FILES = frozenset((LOCK, HOLDER))  # what may lie in a folder beside its own files


class Holder(TypedDict):
    """Who holds a lease. since: UTC."""

    machine: str
    process: int
    since: str


@contextlib.contextmanager
def sole_writer(folder: Location, what: str, say: Say = lambda line: None, *, wait: float = 0.0) -> Iterator[None]:
    """Within the block no other command writes to a folder, which is made if it is not there, and removed if it stays empty.

    Raises InputError if it cannot be written to, or another command writes to it, with who and since when. what: the folder in
    words. wait: seconds for a holder that is about to end.
    """
    if not isinstance(folder, Path):
        yield
        return
    check_writable(folder, what)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(folder / LOCK, lease_duration=LEASE)
    try:
        acquire(lock, folder, what, say, wait)
        try:
            since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            write_json(folder / HOLDER, {"machine": platform.node(), "process": os.getpid(), "since": since})
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder is gone, or its disk
                (folder / HOLDER).unlink(missing_ok=True)
            lock.release()
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


def acquire(lock: SoftFileLease, folder: Path, what: str, say: Say, wait: float) -> None:
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


def holder_of(folder: Path) -> Holder | None:
    """Who holds the lease of a folder; None if nobody says so, as in the moment in which it is taken."""
    with contextlib.suppress(OSError, InputError):
        return typed.read_json(folder / HOLDER, Holder, what="holder", advice="")
    return None


def describe(holder: Holder | None) -> str:
    if holder is None:
        return "another command"
    return f"process {holder['process']} on {typed.shown(holder['machine'])} since {holder['since'][:30]}"


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
