"""What a process says: printed for a person, and appended as values to a file for the program that started it.

A program that wants a job's lines and result, not its whole output, names a file in DDPM_EVENTS; each line of it is JSON,
{"line": ...} or {"result": {...}}.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.runtime.progress import ProgressLine

EVENTS = "DDPM_EVENTS"


def say(line: str) -> None:
    """A line for a person. In a terminal, progress lines write over each other; a log gets each at once."""
    emit({"line": line})
    if not sys.stdout.isatty():
        print(line, flush=True)
    else:
        end = "" if isinstance(line, ProgressLine) and not line.final else "\n"
        print(f"\r\x1b[2K{line}", end=end, flush=True)


def emit_result(**values: Any) -> None:
    """What a job came to, for the program that started it."""
    emit({"result": values})


def emit(event: dict[str, Any]) -> None:
    path = os.environ.get(EVENTS)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:  # of one short line, which no other cuts in two
            file.write(json.dumps(event) + "\n")


class EventReader:
    """The events that processes append to a file, from its present end on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self._position = path.stat().st_size

    def read(self) -> Iterator[dict[str, Any]]:
        """Those that have come since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if line.endswith(b"\n"):
                    self._position += len(line)
                    yield json.loads(line)
