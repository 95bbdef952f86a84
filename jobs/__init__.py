"""The command lines. This package is imported first: ctrl-C while a job imports the rest is no error either."""

import sys
from types import TracebackType


def leave(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What Python shows of an exception that nothing caught."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted: nothing was begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = leave
