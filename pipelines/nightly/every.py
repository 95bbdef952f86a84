"""A command at the times of a cron expression, on a cluster that has no scheduler.

`keep` stays in the foreground for ever, at the price of a small process: neither Ray nor torch nor MLflow is imported
here. A lease on its folder lets one keeper work at a time; what a command does is its own affair, and its end, good or
bad, does not end the keeper.
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Protocol

from cronsim import CronSim, CronSimError
from filelock import SoftFileLease, Timeout

from ddpm_core.commit import write_json
from ddpm_core.errors import InputError

MEANINGS = {0: "", 2: ", a wrong input", 3: ", an alarm", 130: ", interrupted"}


def times(every: str, after: datetime) -> CronSim:
    """The datetimes of a cron expression later than `after`, in its time zone; a change of the clocks is met as
    Debian's cron does: what falls into the lost hour comes after it, what falls into the doubled one comes once.

    InputError for what is not five fields that cron, systemd and Kubernetes read alike.
    """
    wanted = "give the five fields of cron, such as '0 2 * * *' for every night at two"
    if len(fields := every.split()) != 5:
        raise InputError(f"--every is {every!r}, which has {len(fields)} fields: {wanted}")
    try:
        found = CronSim(" ".join(fields), after)
    except CronSimError as error:
        raise InputError(f"--every is {every!r}, and cron calls it a {str(error).lower()}: {wanted}") from None
    if not all(isinstance(value, int) and value >= 0 for value in found.days | found.weekdays):
        raise InputError(
            f"--every is {every!r}: L and # are not known to every scheduler: name the days by their numbers"
        )
    day, weekday = fields[2], fields[4]
    if "*" not in (day, weekday) and (day[0] == "*" or weekday[0] == "*"):
        raise InputError(f"--every is {every!r}: schedulers differ on */n beside another day: name the days themselves")
    return found


class _Local(tzinfo):
    """The machine's time zone with its changes; astimezone() alone knows the offset of one moment."""

    def utcoffset(self, when: datetime | None) -> timedelta | None:
        return None if when is None else when.replace(tzinfo=None).astimezone().utcoffset()

    def dst(self, when: datetime | None) -> timedelta | None:
        return None

    def tzname(self, when: datetime | None) -> str | None:
        return None if when is None else when.replace(tzinfo=None).astimezone().tzname()

    def fromutc(self, when: datetime) -> datetime:
        return datetime.fromtimestamp(when.replace(tzinfo=UTC).timestamp()).replace(tzinfo=self)


class Clock:
    """The time of day in a zone, and waiting."""

    def __init__(self, zone: tzinfo | None = None) -> None:
        self.zone = zone or _Local()

    def now(self) -> datetime:
        return datetime.now(self.zone)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


class Child(Protocol):
    """What is used of subprocess.Popen."""

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def _start(command: Sequence[str]) -> Child:
    # A session of its own: ctrl-C in a terminal reaches the keeper alone, which passes it on once.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def keep(
    every: str,
    command: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
    *,
    clock: Clock | None = None,
    start: Callable[[Sequence[str]], Child] = _start,
    lease_seconds: float = 60.0,
) -> None:
    """Start `command` at each time of the cron expression `every`, for ever, with its output passed through.

    Returns at once where another keeper holds `folder`, and at the end of the running command where one took it over.
    KeyboardInterrupt reaches the command as SIGTERM; it is waited for, and the interrupt goes on.
    """
    clock = clock or Clock()
    times(every, clock.now())
    if not command or shutil.which(command[0]) is None:
        raise InputError(f"the command is {list(command)}: {command[0] if command else 'nothing'!r} cannot be started")
    folder.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(folder / "every.lease", lease_duration=lease_seconds)
    if not _claim(lease, folder, say, clock):
        return
    try:
        _Keeper(every, command, folder / "every.json", say, clock, start).run(lease)
    finally:
        lease.release()


def _claim(lease: SoftFileLease, folder: Path, say: Callable[[str], None], clock: Clock) -> bool:
    """Whether the lease is held now. A dead keeper's is taken over: at once on its own host, elsewhere when its time
    has passed without a sign of life."""
    with tempfile.TemporaryDirectory() as scratch, SoftFileLease(Path(scratch) / "lease") as own:
        here = own.owner.hostname if own.owner else ""  # as leases write it: with the PID namespace of a container
    seen: tuple[int, int] | None = None
    while True:
        with contextlib.suppress(Timeout):
            lease.acquire(blocking=False)
            return True
        owner, beat = lease.owner, _beat(Path(lease.lock_file))
        if owner is not None and beat is not None:
            who = f"process {owner.pid} on {owner.hostname.split('?')[0]}"
            if owner.hostname == here or (seen is not None and beat != seen):
                say(f"every: {folder} is kept already, by {who}: nothing to do")
                return False
            if seen is None:
                seen = beat
                say(f"every: {who} kept {folder}: waiting {lease.lease_duration:.0f} s for a sign of life from it")
        clock.wait(0.2)


def _beat(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _told(when: datetime) -> str:
    return when.isoformat(" ", "minutes")


class _Keeper:
    """The command that runs now, if one does, and when the next is due."""

    def __init__(
        self,
        every: str,
        command: Sequence[str],
        state: Path,
        say: Callable[[str], None],
        clock: Clock,
        start: Callable[[Sequence[str]], Child],
    ) -> None:
        self.every, self.command, self.state, self.say, self.clock, self.start = (
            every,
            command,
            state,
            say,
            clock,
            start,
        )
        self.child: Child | None = None
        self.started = self.due = next(times(every, clock.now()))

    def run(self, lease: SoftFileLease) -> None:
        self._say_last()
        self.say(f"every: the next run starts at {_told(self.due)}")
        try:
            while self._keeps(lease):
                self._step()
        except KeyboardInterrupt:
            self._stop()
            raise
        owner = lease.owner
        self.say(f"every: process {owner.pid if owner else '?'} took {self.state.parent} over: this one ends")
        if self.child is not None:
            self._ended(self.child.wait())

    def _keeps(self, lease: SoftFileLease) -> bool:
        """Whether no other keeper has taken the folder over. A lease that was lost to the disk is taken again."""
        if lease.compromise is None:
            return True
        try:
            lease.release(force=True)
            lease.acquire(blocking=False)
        except Timeout:
            return False
        except OSError as error:  # a share that is away for a while
            self.say(f"every: the lease in {self.state.parent} cannot be renewed ({error}): trying again")
            self.clock.wait(60.0)
        return True

    def _step(self) -> None:
        if self.child is not None and (code := self.child.poll()) is not None:
            self._ended(code)
            self.say(f"every: the next run starts at {_told(self.due)}")
        now = self.clock.now()
        # Seconds of one time zone are subtracted as the clocks on the wall show them, so UTC's are taken.
        left = self.due.timestamp() - now.timestamp()
        if left > 0:
            # Not all of it at once: the machine's clock may be set, or stand still in a suspended machine.
            self.clock.wait(min(left, 60.0 if self.child is None else 1.0))
            return
        due, self.due = self.due, next(times(self.every, now))
        if self.child is not None:
            self.say(f"every: {_told(due)} is missed: the run of {_told(self.started)} still goes on")
            return
        self.say(f"every: {_told(due)} starts {shlex.join(self.command)}")
        self.child, self.started = self.start(self.command), now
        self._record()

    def _ended(self, code: int) -> None:
        self.child = None
        how = f"exit code {code}{MEANINGS.get(code, ', a failure')}" if code >= 0 else f"signal {-code}"
        self.say(f"every: the run of {_told(self.started)} ended with {how}")
        self._record(ended=self.clock.now().isoformat(), exit_code=code)

    def _stop(self) -> None:
        if self.child is None:
            return
        self.say(f"every: the run of {_told(self.started)} is asked to stop")
        self.child.terminate()
        try:
            self._ended(self.child.wait())
        except KeyboardInterrupt:  # asked twice
            self.child.kill()
            self._ended(self.child.wait())

    def _record(self, **end: Any) -> None:
        who = {"host": socket.gethostname(), "keeper": os.getpid(), "command": list(self.command)}
        try:
            write_json(self.state, {"started": self.started.isoformat(), **end, **who})
        except OSError as error:  # a full disk must not end the nights
            self.say(f"every: {self.state} cannot be written ({error})")

    def _say_last(self) -> None:
        if self.state.exists():
            last = json.loads(self.state.read_text())
            end = f"ended with exit code {last['exit_code']}" if "exit_code" in last else "was not seen to end"
            self.say(f"every: the last run started at {_told(datetime.fromisoformat(last['started']))} and {end}")
