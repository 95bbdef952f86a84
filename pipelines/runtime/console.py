"""What a process says: printed for a person, and appended as values to a file for the program that started it.

A program that wants a job's lines and result, not its whole output, names a file in DDPM_EVENTS; each line of it is JSON,
{"line": ...}, with a "standing" if it is one of progress, or {"result": {...}}.
"""

import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from pipelines.runtime.progress import ProgressLine, StageStanding, WarningLine

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


class Display:
    """The stages that are under way, drawn below what a terminal shows: a bar with its standing in words for each, and the last
    warning. What is said meanwhile goes above."""

    def __init__(self) -> None:
        from rich.console import Group  # here: a log does without rich
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column
        from rich.text import Text

        # Of a line that is too long for the terminal, this loses its end; the bar and what is before it stay.
        standing = TextColumn("{task.fields[standing]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        stage = TextColumn("{task.description}", markup=False)
        self.bars = Progress(stage, BarColumn(bar_width=24), standing, expand=True)
        self.tasks: dict[str, Any] = {}  # the bar of each stage
        self.warning = Text(style="yellow")
        self.live = Live(Group(self.bars, self.warning), refresh_per_second=4, transient=True)
        self.live.start()

    def show(self, standing: StageStanding) -> None:
        """Draw a stage that is not done."""
        words = standing.parts()
        if standing.left is not None:
            words.insert(1, words.pop())  # where it is in sight
        if standing.workers is not None:
            words.append(f"{standing.workers} worker{'' if standing.workers == 1 else 's'}")
        if standing.curve:
            words.append(standing.curve)
        if standing.stage not in self.tasks:
            self.tasks[standing.stage] = self.bars.add_task(standing.stage, total=standing.total, standing="")
        task = self.tasks[standing.stage]
        self.bars.update(task, completed=standing.done, total=standing.total, standing=" | ".join(words))

    def end(self, stage: str) -> None:
        if stage in self.tasks:
            self.bars.remove_task(self.tasks.pop(stage))

    def print(self, line: str) -> None:
        """A line above the bars, which scrolls."""
        self.live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if isinstance(line, WarningLine):
            self.warning.plain = line

    def close(self) -> None:
        self.live.stop()


_display: Display | None = None
_lock = threading.Lock()  # a driver's threads speak too


def say(line: str) -> None:
    """A line for a person. A log gets each; a terminal draws how far stages are, and gets what they came to."""
    standing = line.standing if isinstance(line, ProgressLine) else None
    emit({"line": line} if standing is None else {"line": line, "standing": asdict(standing)})
    with _lock:
        _say(line, standing)


def _say(line: str, standing: StageStanding | None) -> None:
    global _display
    if _display is None and (standing is None or standing.final or not sys.stdout.isatty()):
        print(line, flush=True)
        return
    if _display is None:
        _display = Display()
    if standing is not None and not standing.final:
        _display.show(standing)
        return
    if standing is not None:
        _display.end(standing.stage)
    _display.print(line)
    if standing is not None and not _display.tasks:
        close_display()


def close_display() -> None:
    """Stop drawing; what is said later is printed as in a log, until a stage begins."""
    global _display
    if _display is not None:
        _display.close()
        _display = None


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


def line_of(event: dict[str, Any]) -> str:
    """What an event says, one of progress as such."""
    standing = event.get("standing")
    return (
        str(event.get("line", "")) if standing is None else ProgressLine(StageStanding(**standing), str(event["line"]))
    )


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
