"""Calling again what a server or a lock refuses for a while."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from ddpm_core.errors import InputError, one_line

PATIENCE = 300.0  # seconds from the first failed try to the last
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between tries, each twice the one before

Result = TypeVar("Result")


class UnansweredError(InputError):
    """A server or database has not answered for PATIENCE seconds."""


logger = logging.getLogger(__name__)

_tried_once: ContextVar[bool] = ContextVar(
    "tried_once", default=False
)  # some caller further out tries again, or nobody


@contextmanager
def without_retries() -> Iterator[None]:
    """In the block with_retries() tries once, and what that raises comes through."""
    token = _tried_once.set(True)
    try:
        yield
    finally:
        _tried_once.reset(token)


def pauses() -> Iterator[float]:
    """How many seconds to wait after each failed try, without end."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def with_retries(action: Callable[[], Result], is_transient: Callable[[Exception], bool], what: str) -> Result:
    """action()'s result. What it raises is tried again for PATIENCE seconds if it `is_transient`, and raised at once if not.

    That `what` does not answer is logged at its first failure, and that it does again at the end. Raises UnansweredError
    if it does not. Inside another with_retries() this one tries once, or their waiting would multiply.
    """
    if _tried_once.get():
        return action()
    deadline: float | None = None
    for pause in pauses():
        try:
            with without_retries():
                result = action()
        except Exception as error:
            if not is_transient(error):
                raise
            now = time.monotonic()
            if deadline is None:
                deadline = now + PATIENCE
                logger.warning("%s does not answer (%s): trying again for %.0f s", what, one_line(error), PATIENCE)
            if now >= deadline:
                raise UnansweredError(
                    f"{what} has not answered for {PATIENCE:.0f} s ({one_line(error)}): start it or repair the way to it, then "
                    "give the same command again"
                ) from error
            time.sleep(min(pause, deadline - now))
        else:
            if deadline is not None:
                logger.warning("%s answers again", what)
            return result
    raise AssertionError("pauses() does not end")
