"""Progress a person can follow: counted in what they care about, with the time left; a line at a time."""

import os
import time
from collections.abc import Callable

Say = Callable[[str], None]


class ProgressLine(str):
    """A line that says how far a stage is. A terminal may write the stage's next line over it, unless it is `final`."""

    final: bool

    def __new__(cls, text: str, *, final: bool) -> "ProgressLine":
        line = super().__new__(cls, text)
        line.final = final
        return line


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:20:00."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress:
    """Says where a stage is, at most once in DDPM_PROGRESS_SECONDS (5) and always at its end."""

    def __init__(self, stage: str, total: int, unit: str, say: Say, *, done: int = 0) -> None:
        self.stage, self.total, self.unit, self.say = stage, total, unit, say
        self.first = self.done = done  # work done before this process is no measure of its speed
        self.started = time.monotonic()
        self.interval = float(os.environ.get("DDPM_PROGRESS_SECONDS", "5"))
        self._said = self.started - self.interval

    def advance(self, amount: int, extra: str = "") -> None:
        """Count `amount` more; `extra` is shown behind the rate."""
        self.at(self.done + amount, extra)

    def at(self, done: int, extra: str = "") -> None:
        """Say that `done` is reached."""
        self.done = done
        now = time.monotonic()
        if self.done >= self.total or now - self._said >= self.interval:
            self._said = now
            self.say(ProgressLine(self._text(now, extra), final=self.done >= self.total))

    def _text(self, now: float, extra: str) -> str:
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        left = duration((self.total - self.done) / max(rate, 1e-9))
        speed = f"{rate:,.0f}" if rate >= 10.0 else f"{rate:.2g}"
        middle = f" | {extra}" if extra else ""
        return (
            f"{self.stage}: {self.done:,} of {self.total:,} {self.unit} | {speed} {self.unit}/s{middle} | {left} left"
        )
