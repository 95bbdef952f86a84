"""Which machine writes to an SQLite database: one at a time, for SQLite's locks do not hold over network file systems.

Every process that writes keeps a file DATABASE.writers/MACHINE.PID and renews its time until it ends. Processes of one machine
may write together. The files of a machine that is gone count for EXPIRES_AFTER seconds more.
"""

import atexit
import contextlib
import os
import threading
from pathlib import Path

from ddpm_core.errors import InputError
from pipelines.storage.lease import is_alive, machine

RENEWED_EVERY, EXPIRES_AFTER = 20.0, 180.0  # seconds

_claims: set[Path] = set()  # this process's files, and those of the process that it was forked from
_lock = threading.Lock()
_renewing = 0  # the id of the process whose thread renews them: a forked child has no thread, but this variable


def claim(database: Path) -> None:
    """Claim the right to write to `database`, until this process ends. Raises InputError if another machine has it, or
    nothing can be written there."""
    folder = database.with_name(f"{database.name}.writers")
    own = folder / f"{machine()}.{os.getpid()}"
    with _lock:
        if own in _claims:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()  # before looking at the others': of two that claim at once, at least one sees the other
        except OSError as error:
            raise InputError(
                f"tracking database {str(database)!r} cannot be written to ({error.strerror or error}): make room, or give a "
                "--storage that can be written to"
            ) from error
        other = other_machine(own)
        if other is not None:
            release(own)
            raise InputError(
                f"tracking database {str(database)!r} is written to by the machine {other!r} too, and SQLite serves only one: "
                "start an `mlflow server` and set MLFLOW_TRACKING_URI to its address on every machine (if "
                f"{other!r} no longer runs, wait {EXPIRES_AFTER / 60:.0f} minutes)"
            )
        _claims.add(own)
        keep_renewing()


def other_machine(own: Path) -> str | None:
    """The name of another machine whose claim beside `own` counts, if there is one. Claims that no longer count are deleted."""
    me = own.name.rpartition(".")[0]
    now = own.stat().st_mtime  # by the clock of the file system, which all machines share; it may have been set back
    for path in own.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # its process ended in this moment
            owner, _, process = path.name.rpartition(".")
            if (owner == me and not is_alive(int(process))) or abs(now - path.stat().st_mtime) > EXPIRES_AFTER:
                path.unlink()
            elif owner != me:
                return owner
    return None


def keep_renewing() -> None:
    """Start the thread that renews this process's claims, unless it runs; have them released when the process ends."""
    global _renewing
    if _renewing == os.getpid():
        return
    if not _renewing:  # a forked child has its parent's handler
        atexit.register(release_all)
    _renewing = os.getpid()
    threading.Thread(target=renew, name="sqlite-writers", daemon=True).start()


def renew() -> None:
    """Renew the time of this process's claims, for ever."""
    pause = threading.Event()
    while True:
        pause.wait(RENEWED_EVERY)
        with _lock:
            for path in list(_claims):
                with contextlib.suppress(OSError):  # a deleted folder, or a file system that is away for a while
                    path.touch()  # makes it again if a clock that jumped had it deleted


def release(path: Path) -> None:
    """Delete a claim, and the folder with the last one."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def release_all() -> None:
    """Delete this process's claims; a forked child leaves its parent's."""
    for path in list(_claims):
        if path.name.endswith(f".{os.getpid()}"):
            release(path)
