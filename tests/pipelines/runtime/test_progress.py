"""Progress in a log and in a terminal: when it is said, what it estimates, and that a terminal is left as it was."""

import fcntl
import itertools
import os
import pickle
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import ROOT

from pipelines.runtime import progress
from pipelines.runtime.console import EVENTS, EventReader, line_of, say
from pipelines.runtime.progress import PACE, Progress, ProgressLine, StageStanding, sparkline


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.delenv(PACE, raising=False)
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
    monkeypatch.setenv(PACE, "0")
    said: list[ProgressLine] = []
    stage = Progress("evaluate", 400, "samples", lambda line: said.append(line))  # type: ignore[arg-type]
    truth = []
    for round_ in range(1, 21):
        for worker in range(2):
            clock.now = 1000.0 + 30.0 + 20.0 * round_ + 0.1 * worker
            stage.advance(10)
            truth.append(20.0 * (20 - round_))
    assert said.pop(0) == "evaluate: 0 of 400 samples"  # to who asks for a pace
    assert [line.standing.left for line in said[:2]] == [None, None]
    assert "left" not in said[0]
    assert "samples/s" not in said[0]
    for line, left in list(zip(said, truth, strict=True))[3:-1:2]:  # when both have ended a unit
        assert line.standing.left == pytest.approx(left, rel=0.02)
    assert said[-1].standing.final


@pytest.mark.parametrize("total", [0, 3])
def test_a_stage_that_was_done_before_has_no_speed(total: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PACE, "0.5")
    lines: list[str] = []
    Progress("preprocess", total, "images", lines.append, done=total)
    assert lines == [f"preprocess: {total} of {total} images | in 0:00"]


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
    standing = StageStanding("preprocess", 1, 2, "images", 1.0, 1.0, 1.0)
    say(ProgressLine(standing, "of another: preprocess: 1 of 2 images"))
    say("preprocess: done")
    one, other = (line_of(event) for event in reader.read())
    assert isinstance(one, ProgressLine)
    assert capsys.readouterr().out == f"{one}\n{other}\n"
    assert (one, one.standing, other) == ("of another: preprocess: 1 of 2 images", standing, "preprocess: done")
    sent = pickle.loads(pickle.dumps(one))
    assert (sent, sent.standing) == (one, standing)


def test_a_stage_that_ends_early_says_so() -> None:
    standing = StageStanding("train", 3, 5, "steps", 65.0, 1.0, 2.0)
    assert not standing.final
    ended = replace(standing, ended=True)
    assert ended.final
    assert ProgressLine(ended) == "train: 3 of 5 steps | 1 steps/s | ended after 1:05"


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


def in_a_terminal(script: Path, code: str, columns: int, ends_with: int = 0) -> str:
    """All that a terminal of so many columns gets of a script, control sequences included."""
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    for name in (PACE, "COLUMNS"):
        environment.pop(name, None)
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, str(script)], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    parts = []
    try:
        while part := os.read(master, 4096):
            parts.append(part)
    except OSError:  # Linux's way to say that the last writer is gone
        pass
    os.close(master)
    assert process.wait() == ends_with
    return b"".join(parts).decode()


def text_of(raw: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw).replace("\r", "")


def test_a_terminal_draws_stages_and_is_left_as_it_was(tmp_path: Path) -> None:
    raw = in_a_terminal(tmp_path / "job.py", SCRIPT, 120, 130)
    shown = text_of(raw)
    assert re.search(r"train ━+.* of 5 steps .*\| loss 0\.\d+ .*\| 2 workers \| █", shown)
    assert shown.count("waiting: [none] of 2 workers") > 1  # it stays in sight
    assert "train: 5 of 5 steps | " in shown
    assert "rich: True" in shown
    assert "evaluate ━" in shown
    last = shown.rstrip().splitlines()[-1]
    assert last.startswith("interrupted: what is finished is kept, and this goes on from it: python ")
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")  # the cursor is there again


TRIALS = """
import queue, time
from jobs.cli import run, say
from pipelines.runtime.progress import ProgressLine, StageStanding
from pipelines.sweep.lines import TrialLines

def main():
    lines = queue.Queue()
    with TrialLines(lines, say):
        for trial in ("linear, seed 0", "quad, seed 1"):
            standing = StageStanding("train", 3, 40, "steps", 2.0, 3.0, 12.0, "851 images/s | loss 0.0908 | gradient 0.241")
            lines.put((trial, ProgressLine(standing)))
        time.sleep(1.0)
        lines.put(("quad, seed 1", "diverged: loss is not finite"))
        lines.put(("quad, seed 1", None))
        time.sleep(1.0)
        lines.put(("linear, seed 0", ProgressLine(StageStanding("train", 40, 40, "steps", 9.0, 4.0, 0.0))))
        lines.put(("linear, seed 0", None))

run(main)
"""


def test_a_terminal_draws_a_bar_for_each_trial_of_a_sweep_while_it_runs(tmp_path: Path) -> None:
    """In 80 columns, where what is left of a standing has no room."""
    raw = in_a_terminal(tmp_path / "job.py", TRIALS, 80)
    shown = text_of(raw)
    both = re.compile(
        r"linear, seed 0: train ━+.* 3 of 40 steps \| 0:12 left.*…\nquad, seed 1: train   ━+.* 3 of 40 .*…\n"
    )
    assert both.search(shown)
    _, ended, later = shown.partition("sweep: quad, seed 1: train: 3 of 40 steps")
    assert ended
    assert "linear, seed 0: train ━" in later
    assert "quad, seed 1: train   ━" not in later
    last = shown.rstrip().splitlines()[-1]
    assert last.endswith("sweep: linear, seed 0: train: 40 of 40 steps | 4 steps/s | in 0:09")
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")  # the cursor is there again


def test_a_log_does_without_rich(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), PACE: "0"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["train: it begins", "train: 0 of 5 steps", "train: 1 of 5 steps | loss 1.00"]
    assert "rich: False" in lines
    assert "\x1b" not in done.stdout
