"""The command lines. This package is imported first: ctrl-C while a job imports the rest is no error either."""

import gc
import sys
from types import TracebackType


def interrupted(error: BaseException | None) -> bool:
    """Whether ctrl-C is what an error comes from: Python and libraries wrap it in errors of their own."""
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or interrupted(error.__cause__ or error.__context__)
    )


def leave(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What Python shows of an exception that nothing caught."""
    if interrupted(error):
        print("interrupted: nothing was begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = leave
# What a job imports is half a million objects that stay. By default they are looked through each 700, a quarter of the time.
gc.set_threshold(10_000)
