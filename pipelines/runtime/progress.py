"""Progress a person can follow: counted in what they care about, with the time left; a line at a time."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Say = Callable[[str], None]

FIRST, SHARE, LAST = 5.0, 0.05, 60.0  # seconds between lines: at the start, as a share of what has passed, at most
SETTLED = 10.0  # seconds, at most, that workers end their first units apart
BLOCKS = "▁▂▃▄▅▆▇█"
PACE = "DDPM_PROGRESS_SECONDS"


class WarningLine(str):
    """A line that must not be missed: a terminal keeps the newest in sight while the work goes on."""


@dataclass(frozen=True)
class StageStanding:
    """How far a stage is. seconds: since its start. rate: a second, and left: seconds, None while that cannot be told. workers:
    those alive, None if it is not known. curve: of what is watched, such as the loss, in block characters. ended: it is over, if
    done or not."""

    stage: str
    done: int
    total: int
    unit: str
    seconds: float
    rate: float | None
    left: float | None
    extra: str = ""
    workers: int | None = None
    curve: str = ""
    ended: bool = False

    @property
    def final(self) -> bool:
        return self.ended or self.done >= self.total

    def parts(self) -> list[str]:
        """The standing in words, without the stage."""
        said = [f"{self.done:,} of {self.total:,} {self.unit}"]
        if self.rate is not None:
            said.append(f"{f'{self.rate:,.0f}' if self.rate >= 10.0 else f'{self.rate:.2g}'} {self.unit}/s")
        if self.extra:
            said.append(self.extra)
        if self.final:
            said.append(f"{'in' if self.done >= self.total else 'ended after'} {duration(self.seconds)}")
        elif self.left is not None:
            said.append(f"{duration(self.left)} left")
        return said


class ProgressLine(str):
    """A line that says how far a stage is, in the words of its `standing` if in no others. A terminal may draw that in place of
    the line, unless it is final."""

    standing: StageStanding

    def __new__(cls, standing: StageStanding, words: str = "") -> "ProgressLine":
        line = super().__new__(cls, words or f"{standing.stage}: {' | '.join(standing.parts())}")
        line.standing = standing
        return line

    def __getnewargs__(self) -> tuple[StageStanding, str]:  # type: ignore[override]  # str's own is for another __new__
        return self.standing, str(self)


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:20:00."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """A curve in block characters: the means of `width` consecutive parts of the values, the lowest and the highest as such."""
    parts = min(width, len(values))
    edges = [len(values) * number // parts for number in range(parts + 1)] if parts else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if not low < high < float("inf"):
        return BLOCKS[0] * parts
    return "".join(BLOCKS[min(int((mean - low) / (high - low) * len(BLOCKS)), len(BLOCKS) - 1)] for mean in means)


class Progress:
    """Says where a stage is, now and then and always at its end: after 5 s, and less often the longer it takes, once a minute at
    last. With DDPM_PROGRESS_SECONDS it is said once in so many, and at the start.

    The speed is that from the first work that was done on, so that the start of workers is no part of it; it is told when it has
    been measured for a while.
    """

    def __init__(
        self, stage: str, total: int, unit: str, say: Say, *, done: int = 0, workers: int | None = None
    ) -> None:
        self.stage, self.total, self.unit, self.say, self.workers = stage, total, unit, say, workers
        self.before = self.done = done  # work done before this process is no measure of its speed
        self.values: list[float] = []
        self.started = self._said = time.monotonic()
        # When work was done for the first time, and when by all workers, and how much there was then.
        self._first: tuple[float, int] | None = None
        self._base: tuple[float, int] | None = None
        every = os.environ.get(PACE)
        self.interval = None if every is None else float(every)
        if self.interval is not None:  # who looks on sees what is waited for
            self.say(ProgressLine(self.standing(self.started)))

    def advance(self, amount: int, extra: str = "") -> None:
        """Count `amount` more; `extra` is shown behind the rate."""
        self.at(self.done + amount, extra)

    def at(self, done: int, extra: str = "", value: float | None = None) -> None:
        """Say that `done` is reached. value: the newest of what is watched."""
        self.done = done
        now = time.monotonic()
        if value is not None:
            self.values.append(value)
        if self._first is None:
            self._first = self._base = now, done
        elif now - self._first[0] < min(SETTLED, (self._first[0] - self.started) / 2):
            # Several workers end their first units almost together: a speed between those would be far too high.
            self._base = now, done
        wait = self.interval if self.interval is not None else min(max(FIRST, SHARE * (now - self.started)), LAST)
        if self.done >= self.total or now - self._said >= wait:
            self._said = now
            self.say(ProgressLine(self.standing(now, extra)))

    def standing(self, now: float, extra: str = "") -> StageStanding:
        rate = self.rate(now)
        left = None if rate is None else (self.total - self.done) / rate
        return StageStanding(
            self.stage,
            self.done,
            self.total,
            self.unit,
            now - self.started,
            rate,
            left,
            extra,
            self.workers,
            sparkline(self.values) if len(self.values) > 1 else "",
        )

    def rate(self, now: float) -> float | None:
        """Work a second, None if too little is known of it."""
        if self.done == self.before:
            return None
        if self.done >= self.total:
            return (self.done - self.before) / max(now - self.started, 1e-9)
        if self._base is None:
            return None
        at, done = self._base
        return (self.done - done) / (now - at) if self.done > done and now > at else None
