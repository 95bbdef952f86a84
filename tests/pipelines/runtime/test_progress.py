"""Progress in a log and in a terminal: when it is said, what it estimates, and that a terminal is left as it was."""

import itertools
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT

from pipelines.runtime import progress
from pipelines.runtime.console import EVENTS, EventReader, line_of, say
from pipelines.runtime.progress import Progress, ProgressLine, sparkline


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.delenv("DDPM_PROGRESS_SECONDS", raising=False)
    return clock


def test_a_log_gets_lines_that_become_rarer_from_five_seconds_to_a_minute(clock: Clock) -> None:
    said: list[tuple[float, str]] = []
    stage = Progress("train", 7200, "steps", lambda line: said.append((clock.now - 1000.0, line)))
    for step in range(7200):
        clock.now += 1.0
        stage.at(step + 1)
    seconds = [at for at, _ in said]
    assert seconds[0] == 5.0
    pauses = [later - earlier for earlier, later in itertools.pairwise(seconds[:-1])]
    for at, pause in zip(seconds, pauses, strict=False):
        assert 0.0 <= pause - min(max(5.0, 0.05 * (at + pause)), 60.0) < 1.0
    assert (min(pauses), max(pauses)) == (5.0, 60.0)
    assert len(said) < 200
    assert said[-1][1] == "train: 7,200 of 7,200 steps | 1 steps/s | in 2:00:00"


def test_nothing_is_estimated_from_the_first_units_and_then_it_is_right(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers that start in 30 s and then take 20 s a unit of 10, so that both end their first almost together."""
    monkeypatch.setenv("DDPM_PROGRESS_SECONDS", "0")
    said: list[ProgressLine] = []
    stage = Progress("evaluate", 400, "samples", lambda line: said.append(line))  # type: ignore[arg-type]
    truth = []
    for round_ in range(1, 21):
        for worker in range(2):
            clock.now = 1000.0 + 30.0 + 20.0 * round_ + 0.1 * worker
            stage.advance(10)
            truth.append(20.0 * (20 - round_))
    assert [line.standing.left for line in said[:2]] == [None, None]
    assert "left" not in said[0]
    assert "samples/s" not in said[0]
    for line, left in list(zip(said, truth, strict=True))[3:-1:2]:  # when both have ended a unit
        assert line.standing.left == pytest.approx(left, rel=0.02)
    assert said[-1].standing.final


def test_a_curve_shows_the_lowest_and_the_highest_mean() -> None:
    assert sparkline([1.0, 2.0, 3.0, 8.0]) == "▁▂▃█"
    assert sparkline([5.0] * 3) == "▁▁▁"
    assert sparkline([]) == ""
    assert sparkline([float(value) for value in range(1000)], width=8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([float("nan"), 1.0])) == 2


def test_progress_that_another_process_said_is_progress_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = EventReader(tmp_path / "events.jsonl")
    monkeypatch.setenv(EVENTS, str(reader.path))
    stage = Progress("preprocess", 2, "images", say)
    stage.at(1)
    say("preprocess: done")
    one, other = (line_of(event) for event in reader.read())
    assert isinstance(one, ProgressLine)
    assert capsys.readouterr().out == f"{one}\n{other}\n"
    assert (one.standing.done, one.standing.total, other) == (1, 2, "preprocess: done")


SCRIPT = """
import sys, time
from jobs.cli import run, say
from pipelines.runtime.progress import Progress, WarningLine

def main():
    say("train: it begins")
    stage = Progress("train", 5, "steps", say, workers=2)
    for step in range(5):
        time.sleep(0.3)
        stage.at(step + 1, f"loss {1 / (step + 1):.2f}", 1 / (step + 1))
        if step == 2:
            say(WarningLine("waiting: [none] of 2 workers"))
    say(f"rich: {'rich' in sys.modules}")
    Progress("evaluate", 5, "samples", say)
    raise KeyboardInterrupt

run(main)
"""


def test_a_terminal_draws_stages_and_is_left_as_it_was(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("DDPM_PROGRESS_SECONDS", None)
    master, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, str(script)], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    parts = []
    try:
        while part := os.read(master, 4096):
            parts.append(part)
    except OSError:  # Linux's way to say that the last writer is gone
        pass
    os.close(master)
    assert process.wait() == 130
    raw = b"".join(parts).decode()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw).replace("\r", "")
    assert re.search(r"train ━+.* of 5 steps .*\| loss 0\.\d+ .*\| 2 workers \| █", shown)
    assert shown.count("waiting: [none] of 2 workers") > 1  # it stays in sight
    assert "train: 5 of 5 steps | " in shown
    assert "rich: True" in shown
    assert "evaluate ━" in shown
    last = shown.rstrip().splitlines()[-1]
    assert last.startswith("interrupted: what is finished is kept, and this goes on from it: python ")
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")  # the cursor is there again


def test_a_log_does_without_rich(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DDPM_PROGRESS_SECONDS": "0"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["train: it begins", "train: 1 of 5 steps | loss 1.00"]
    assert "rich: False" in lines
    assert "\x1b" not in done.stdout
