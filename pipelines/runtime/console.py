"""What a process says: printed for a person, and appended as values to a file for the program that started it.

A program that wants a job's lines and result, not its whole output, names a file in DDPM_EVENTS; each line of it is JSON,
{"line": ...} or {"result": {...}}.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pipelines.runtime.progress import ProgressLine

EVENTS = "DDPM_EVENTS"


class Output:
    """A standard stream that nobody has to read: a closed pipe or a full disk beneath it is not an error of the work, and
    what its encoding cannot say is escaped."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or io.StringIO()  # without one, as after >&-

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: of a file that is closed
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # else Python tries once more at its end, and complains
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def unread_output() -> Iterator[None]:
    """Within the block, and after it, whether somebody reads the output decides nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


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
        with (
            contextlib.suppress(OSError),
            Path(path).open("a", encoding="utf-8") as file,
        ):
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
                    with contextlib.suppress(ValueError):  # what a killed job left half-written runs into the next line
                        event = json.loads(line)
                        if isinstance(event, dict):
                            yield event
