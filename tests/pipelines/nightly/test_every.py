"""The keeper of --every: a simulated week, what a command may do to it, and keepers that die or meet."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import psutil
import pytest
from filelock import SoftFileLease
from support.processes import ROOT

from ddpm_core.errors import InputError
from pipelines.nightly.every import Clock, keep, times

BERLIN = ZoneInfo("Europe/Berlin")


class SimulatedClock(Clock):
    """Waiting moves the time; at its end the keeper is interrupted, as by SIGTERM."""

    def __init__(self, start: datetime, end: datetime) -> None:
        super().__init__(start.tzinfo)
        self.seconds, self.end = start.timestamp(), end.timestamp()

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, self.zone)

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.seconds += seconds
        if self.seconds >= self.end:
            raise KeyboardInterrupt


class SimulatedRuns:
    """Commands that take the given hours on the clock and end with the given codes, in turn."""

    def __init__(self, clock: SimulatedClock, hours: Sequence[float], codes: Sequence[int] = (0,)) -> None:
        self.clock, self.hours, self.codes = clock, hours, codes
        self.starts: list[datetime] = []
        self.stopped: list[int] = []

    def __call__(self, command: Sequence[str]) -> "SimulatedRun":
        self.starts.append(self.clock.now())
        return SimulatedRun(self, len(self.starts) - 1)


class SimulatedRun:
    def __init__(self, runs: SimulatedRuns, number: int) -> None:
        self.runs, self.number = runs, number
        self.end = runs.clock.seconds + 3600 * runs.hours[number % len(runs.hours)]

    def poll(self) -> int | None:
        return None if self.runs.clock.seconds < self.end else self.runs.codes[self.number % len(self.runs.codes)]

    def wait(self) -> int:
        return -int(signal.SIGTERM) if self.number in self.runs.stopped else (self.poll() or 0)

    def terminate(self) -> None:
        self.runs.stopped.append(self.number)

    def kill(self) -> None:
        raise AssertionError("nobody asked twice")


def week(
    tmp_path: Path, every: str, start: str, days: float, hours: Sequence[float] = (1.0,), codes: Sequence[int] = (0,)
) -> tuple[SimulatedRuns, list[str]]:
    """What a keeper started in that time, and what it said."""
    begin = datetime.fromisoformat(start).replace(tzinfo=BERLIN)
    clock = SimulatedClock(begin, datetime.fromtimestamp(begin.timestamp() + days * 86400, BERLIN))
    runs, said = SimulatedRuns(clock, hours, codes), list[str]()
    with pytest.raises(KeyboardInterrupt):
        keep(every, [sys.executable], tmp_path, said.append, clock=clock, start=runs)
    return runs, said


@pytest.mark.parametrize(
    ("start", "offsets"),
    [
        # 29 March 2026 has no 02:30: it comes at 03:00, when the clocks have been put forward.
        ("2026-03-27T12:00", ["28 02:30+01", "29 03:00+02", "30 02:30+02", "31 02:30+02"]),
        # 25 October has two: the first is taken.
        ("2026-10-23T12:00", ["24 02:30+02", "25 02:30+02", "26 02:30+01", "27 02:30+01"]),
    ],
)
def test_every_night_of_a_week_in_which_the_clocks_change_has_one_run(
    tmp_path: Path, start: str, offsets: list[str]
) -> None:
    runs, said = week(tmp_path, "30 2 * * *", start, 7)
    told = [f"{time:%d %H:%M}{(time.utcoffset() or timedelta()).total_seconds() / 3600:+03.0f}" for time in runs.starts]
    assert told[:4] == offsets
    assert len({time.date() for time in runs.starts}) == len(runs.starts) == 7
    assert sum("ended with exit code 0" in line for line in said) == 7


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
def test_half_hours_are_half_an_hour_apart_when_the_clocks_change(tmp_path: Path, day: str) -> None:
    runs, _ = week(tmp_path, "*/30 * * * *", f"{day}T00:10", 0.25, hours=[0.1])
    assert len(runs.starts) == 12
    assert {b.timestamp() - a.timestamp() for a, b in itertools.pairwise(runs.starts)} == {1800.0}


def test_a_run_that_is_still_going_is_not_started_twice_and_the_missed_time_is_told(tmp_path: Path) -> None:
    runs, said = week(tmp_path, "0 2 * * *", "2026-06-01T00:00", 4, hours=[30.0, 1.0])
    assert [time.day for time in runs.starts] == [1, 3, 4]
    missed = [line for line in said if "missed" in line]
    assert missed == ["every: 2026-06-02 02:00+02:00 is missed: the run of 2026-06-01 02:00+02:00 still goes on"]


def test_no_end_of_a_run_ends_the_keeper_and_each_is_told(tmp_path: Path) -> None:
    runs, said = week(tmp_path, "0 2 * * *", "2026-06-01T00:00", 6, codes=[0, 2, 3, 1, -9, 0])
    assert len(runs.starts) == 6
    ends = [line.split("ended with ")[1] for line in said if "ended" in line]
    assert ends == [
        "exit code 0",
        "exit code 2, a wrong input",
        "exit code 3, an alarm",
        "exit code 1, a failure",
        "signal 9",
        "exit code 0",
    ]


def test_times_that_were_missed_while_nothing_kept_are_not_made_up_for_but_the_last_run_is_told(tmp_path: Path) -> None:
    week(tmp_path, "0 2 * * *", "2026-06-01T00:00", 1, codes=[3])
    runs, said = week(tmp_path, "0 2 * * *", "2026-06-05T12:00", 0.5)
    assert runs.starts == []
    assert said == [
        "every: the last run started at 2026-06-01 02:00+02:00 and ended with exit code 3",
        "every: the next run starts at 2026-06-06 02:00+02:00",
    ]
    assert json.loads((tmp_path / "every.json").read_text())["exit_code"] == 3


def test_an_interrupt_is_passed_to_the_run_once_and_its_end_is_recorded(tmp_path: Path) -> None:
    runs, said = week(tmp_path, "0 2 * * *", "2026-06-01T00:00", 0.125, hours=[9.0])
    assert runs.stopped == [0]
    assert said[-1].endswith("ended with signal 15")
    assert json.loads((tmp_path / "every.json").read_text())["exit_code"] == -15


def test_a_clock_that_was_set_forward_or_stood_still_starts_one_run_not_all_that_it_jumped_over(tmp_path: Path) -> None:
    begin = datetime(2026, 6, 1, tzinfo=BERLIN)

    class Suspended(SimulatedClock):
        def wait(self, seconds: float) -> None:
            asleep = self.seconds == begin.timestamp() + 3600
            super().wait(3.5 * 86400 if asleep else seconds)

    clock = Suspended(begin, begin + timedelta(days=5))
    runs = SimulatedRuns(clock, [1.0])
    with pytest.raises(KeyboardInterrupt):
        keep("0 2 * * *", [sys.executable], tmp_path, lambda line: None, clock=clock, start=runs)
    assert [f"{time:%d %H}" for time in runs.starts] == ["04 13", "05 02"]


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ("0 2 * *", "has 4 fields"),
        ("@daily", "has 1 fields"),
        ("0 0 2 * * *", "has 6 fields"),
        ("0 25 * * *", "bad hour"),
        ("0 2 30 2 *", "bad day-of-month"),
        ("0 2 L * *", "L and # are not known"),
        ("0 2 * * 1#2", "L and # are not known"),
        ("0 2 */2 * 1", "name the days themselves"),
    ],
)
def test_a_wrong_expression_is_refused_in_one_sentence_before_anything_is_written(
    tmp_path: Path, every: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as error:
        keep(every, [sys.executable], tmp_path / "new", print)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_command_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'no-such-program' cannot be started"):
        keep("0 2 * * *", ["no-such-program"], tmp_path, print)


def test_the_machines_own_zone_has_its_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        for zone in (Clock().zone, BERLIN):
            found = times("30 2 * * *", datetime(2026, 3, 28, 12, tzinfo=zone))
            assert [next(found).timestamp() for _ in range(2)] == [1774746000.0, 1774830600.0]
        autumn = datetime(2026, 10, 25, 0, 30, tzinfo=ZoneInfo("UTC")).timestamp()
        for seconds in (autumn, autumn + 3600):  # 02:30 twice
            assert datetime.fromtimestamp(seconds, Clock().zone).timestamp() == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


KEEPER = """
import sys, time
from datetime import datetime, timedelta
from pathlib import Path
from pipelines.nightly.every import Clock, keep
from jobs.cli import run, say

class Fast(Clock):
    # A minute passes in a tenth of a second.
    began = time.time()
    def now(self):
        return super().now() + timedelta(seconds=600 * (time.time() - self.began))
    def wait(self, seconds):
        time.sleep(min(seconds / 600, 0.05))

run(lambda: keep("*/5 * * * *", sys.argv[2:], Path(sys.argv[1]), say, clock=Fast()))
"""


@pytest.fixture
def keeper(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts a keeper as a process of its own, in which a minute takes a tenth of a second."""
    script = tmp_path / "keeper.py"
    script.write_text(KEEPER)

    def start(folder: Path, *command: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, str(script), str(folder), *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
            # A shell's background jobs, such as a test suite may be one, ignore ctrl-C, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    return start


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} was not said: {seen}")


def test_of_two_keepers_the_second_says_who_keeps_and_is_done_and_a_killed_one_is_replaced_at_once(
    tmp_path: Path, keeper: Callable[..., "subprocess.Popen[str]"]
) -> None:
    folder, command = tmp_path / "nightly", [sys.executable, "-c", "print('a night', 'of work', flush=True)"]
    first = keeper(folder, *command)
    read_until(first, "a night of work")
    second = keeper(folder, *command)
    out, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert f"is kept already, by process {first.pid} on {socket.gethostname()}: nothing to do" in out
    assert "waiting" not in out
    first.kill()
    first.wait()
    assert (folder / "every.lease").exists()
    third = keeper(folder, *command)
    begun = time.monotonic()
    out = read_until(third, "a night of work")
    assert time.monotonic() - begun < 20  # the lease itself lasts for 60 s
    assert "the last run started at" in out
    third.terminate()
    assert third.wait(30) == 130
    assert not (folder / "every.lease").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_keeper_reaches_the_run_which_is_waited_for(
    tmp_path: Path, keeper: Callable[..., "subprocess.Popen[str]"], number: signal.Signals
) -> None:
    slow = """
import signal, sys, time
def end(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(100)
"""
    (tmp_path / "slow.py").write_text(slow)
    process = keeper(tmp_path / "nightly", sys.executable, str(tmp_path / "slow.py"))
    read_until(process, "ready")
    if number == signal.SIGINT:  # as a terminal sends it: to every process of the group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out.count("saved") == 1
    assert "ended with exit code 130, interrupted" in out
    assert out.index("saved") < out.index("interrupted: run the same command again")


MARKER = "filelock/2\npid=4242\nhost=elsewhere\nmode=lease\ntoken=abc\nduration=1.5\n"


def test_a_keeper_of_another_host_that_gives_no_sign_of_life_is_waited_out(tmp_path: Path) -> None:
    (tmp_path / "every.lease").write_text(MARKER)
    clock, said = SimulatedClock(datetime(2026, 6, 1, tzinfo=BERLIN), datetime(2026, 6, 2, tzinfo=BERLIN)), list[str]()
    begun = time.monotonic()

    class Mixed(SimulatedClock):
        """Real while the lease is waited for, which filelock times itself; simulated afterwards."""

        def wait(self, seconds: float) -> None:
            if said[-1].startswith("every: process 4242"):
                time.sleep(seconds)
            else:
                super().wait(seconds)

    clock = Mixed(datetime(2026, 6, 1, tzinfo=BERLIN), datetime(2026, 6, 2, tzinfo=BERLIN))
    runs = SimulatedRuns(clock, [1.0])
    with pytest.raises(KeyboardInterrupt):
        keep("0 2 * * *", [sys.executable], tmp_path, said.append, clock=clock, start=runs, lease_seconds=1.5)
    assert time.monotonic() - begun >= 1.5
    assert said[0].startswith("every: process 4242 on elsewhere kept ")
    assert len(runs.starts) == 1


def test_a_keeper_of_another_host_that_lives_is_left_alone(tmp_path: Path) -> None:
    marker, said = tmp_path / "every.lease", list[str]()
    marker.write_text(MARKER)

    class Beating(Clock):
        def wait(self, seconds: float) -> None:
            time.sleep(seconds)
            marker.touch()

    keep("0 2 * * *", [sys.executable], tmp_path, said.append, clock=Beating(), lease_seconds=1.5)
    assert said[-1] == f"every: {tmp_path} is kept already, by process 4242 on elsewhere: nothing to do"


def test_a_keeper_whose_lease_was_taken_over_ends_when_its_run_has_ended(tmp_path: Path) -> None:
    said = list[str]()

    class Overtaken(SimulatedClock):
        def wait(self, seconds: float) -> None:
            if any("starts" in line and sys.executable in line for line in said):
                (tmp_path / "every.lease").unlink(missing_ok=True)
                (tmp_path / "every.lease").write_text(MARKER.replace("1.5", "0.3"))
                time.sleep(0.05)  # the heartbeat notices in real time
            super().wait(seconds)

    clock = Overtaken(datetime(2026, 6, 1, tzinfo=BERLIN), datetime(2026, 6, 9, tzinfo=BERLIN))
    runs = SimulatedRuns(clock, [2.0])
    keep("0 2 * * *", [sys.executable], tmp_path, said.append, clock=clock, start=runs, lease_seconds=0.3)
    assert said[-2].endswith("over: this one ends")
    assert "process 4242 took" in said[-2]
    assert "ended with exit code 0" in said[-1]
    assert (tmp_path / "every.lease").exists()  # the other's


def test_a_keeper_whose_folder_was_cleared_goes_on(tmp_path: Path) -> None:
    said, cleared = list[str](), list[float]()

    class Clearing(SimulatedClock):
        def wait(self, seconds: float) -> None:
            if not cleared and any("starts" in line for line in said):
                shutil.rmtree(tmp_path / "nights")
                (tmp_path / "nights").mkdir()
                cleared.append(self.seconds)
            if cleared and not (tmp_path / "nights" / "every.lease").exists():
                time.sleep(0.05)  # the heartbeat notices in real time
            super().wait(seconds)

    clock = Clearing(datetime(2026, 6, 1, tzinfo=BERLIN), datetime(2026, 6, 8, tzinfo=BERLIN))
    runs = SimulatedRuns(clock, [2.0])
    with pytest.raises(KeyboardInterrupt):
        keep(
            "0 2 * * *", [sys.executable], tmp_path / "nights", said.append, clock=clock, start=runs, lease_seconds=0.3
        )
    assert len(runs.starts) == 7
    assert not any("over: this one ends" in line for line in said)
    assert (tmp_path / "nights" / "every.json").exists()


def test_a_keeper_is_a_small_process_without_torch_ray_or_mlflow() -> None:
    code = (
        "import sys, os, pipelines.nightly.every, jobs.cli\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'numpy') if name in sys.modules], os.getpid(), flush=True)\n"
        "sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("[] ")
        assert psutil.Process(process.pid).memory_info().rss < 64 << 20  # torch alone takes 200 MB
        process.communicate("")


def test_the_lease_of_a_keeper_beats(tmp_path: Path) -> None:
    """The contender's evidence: filelock renews the marker every third of the lease."""
    with SoftFileLease(tmp_path / "every.lease", lease_duration=0.3):
        before = (tmp_path / "every.lease").stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / "every.lease").stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
