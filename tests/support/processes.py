"""Processes that tests start, find, wait for and kill."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))  # PYTHONPATH of a process of its own


def workers_of(actor: str, driver: int | None = None) -> list[int]:
    """The worker processes of an actor's class that the Ray of a driver (this process, if none is named) runs here."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended in this moment
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{actor}"):
                found.append(process.pid)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")
