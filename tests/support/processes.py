"""Processes that tests start, find, wait for and kill."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))  # PYTHONPATH of a process of its own


def workers_of(folder: str) -> list[int]:
    """Ray Train's worker processes whose current folder or command line belongs to a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if command.startswith("ray::") and folder in command:
                found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")
