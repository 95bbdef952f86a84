"""Trying again what a server or a lock refuses for a while."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from ddpm_core.errors import InputError

PATIENCE = 300.0  # seconds in all
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between tries, each twice the one before

Result = TypeVar("Result")


class UnansweredError(InputError):
    """What does not answer, for longer than it is waited for."""


logger = logging.getLogger(__name__)

_tried: ContextVar[bool] = ContextVar("tried", default=False)  # by a caller further out, who is the one to wait


@contextmanager
def at_once() -> Iterator[None]:
    """In the block every call is tried once, and what it raises comes through."""
    token = _tried.set(True)
    try:
        yield
    finally:
        _tried.reset(token)


def pauses() -> Iterator[float]:
    """How long to wait after each failed try."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def reason(error: BaseException) -> str:
    """What an error says, on one short line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (first if len(first) <= 200 else f"{first[:200]}...").rstrip(".")


def persist(action: Callable[[], Result], passes: Callable[[Exception], bool], what: str) -> Result:
    """action()'s result, tried again for PATIENCE seconds while what it raises `passes`. `what` does not answer meanwhile:
    said once, and when it is over. UnansweredError when it is not. Within another persist() or at_once(), one try."""
    if _tried.get():
        return action()
    ends: float | None = None
    for pause in pauses():
        try:
            with at_once():
                result = action()
        except Exception as error:
            if not passes(error):
                raise
            now = time.monotonic()
            if ends is None:
                ends = now + PATIENCE
                logger.warning("%s does not answer (%s): trying again for %.0f s", what, reason(error), PATIENCE)
            if now >= ends:
                raise UnansweredError(
                    f"{what} has not answered for {PATIENCE:.0f} s ({reason(error)}): start it or repair the way to it, then "
                    "give the same command again"
                ) from error
            time.sleep(min(pause, ends - now))
        else:
            if ends is not None:
                logger.warning("%s answers again", what)
            return result
    raise AssertionError("pauses() does not end")
