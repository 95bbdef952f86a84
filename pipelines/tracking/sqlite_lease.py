"""Which machine writes to an SQLite database: one at a time, for its locks do not hold over network file systems.

Every process that writes keeps a file in `DATABASE.writers/`, named for its machine, whose time it renews until it ends. A
machine that is gone leaves files that count for EXPIRED seconds more.
"""

import atexit
import contextlib
import hashlib
import os
import platform
import threading
from pathlib import Path

from ddpm_core.errors import InputError

RENEWED, EXPIRED = 20.0, 180.0  # seconds

_held: set[Path] = set()
_lock = threading.Lock()
_renewing = 0  # the process in which renew() runs: a forked child has its parent's variables, but not its threads


def machine() -> str:
    """This machine's name: that of containers of one image differs in the host's name, that of copied hosts in the id."""
    with contextlib.suppress(OSError):
        return f"{platform.node()}-{hashlib.sha256(Path('/etc/machine-id').read_bytes()).hexdigest()[:8]}"
    return platform.node()


def claim(database: Path) -> None:
    """Write to `database` from now to the end of this process. InputError where another machine does."""
    global _renewing
    folder = database.with_name(f"{database.name}.writers")
    me = machine()
    mine = folder / f"{me}.{os.getpid()}"
    with _lock:
        if mine in _held:
            return
        folder.mkdir(parents=True, exist_ok=True)
        mine.touch()
        now = mine.stat().st_mtime  # by the clock of the file system, which all machines share
        for other in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it ended in this moment
                who, _, process = other.name.rpartition(".")
                if (who == me and not is_alive(int(process))) or now - other.stat().st_mtime > EXPIRED:
                    other.unlink()
                elif who != me:
                    release(mine)
                    raise InputError(
                        f"tracking database {str(database)!r} is written to by the machine {who!r} too, and SQLite serves only "
                        "one: start an `mlflow server` and set MLFLOW_TRACKING_URI to its address on every machine (if "
                        f"{who!r} no longer runs, wait {EXPIRED / 60:.0f} minutes)"
                    )
        _held.add(mine)
        if _renewing != os.getpid():
            if not _renewing:
                atexit.register(release_all)
            _renewing = os.getpid()
            threading.Thread(target=renew, name="sqlite-writers", daemon=True).start()


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def renew() -> None:
    """Renew this process's files."""
    waiting = threading.Event()
    while True:
        waiting.wait(RENEWED)
        with _lock:
            for mine in list(_held):
                with contextlib.suppress(OSError):  # a deleted folder, or a file system that is away for a while
                    os.utime(mine)


def release(mine: Path) -> None:
    """Take a file away, and the folder with the last one."""
    with contextlib.suppress(OSError):
        mine.unlink(missing_ok=True)
        mine.parent.rmdir()


def release_all() -> None:
    for mine in list(_held):
        if mine.name.endswith(f".{os.getpid()}"):  # a forked child's parent keeps its own
            release(mine)
