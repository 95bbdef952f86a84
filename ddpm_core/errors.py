"""The two exceptions of this project, and any error on one line. Every other exception is a bug and may show its traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence: the thing, what it is, what was wanted,
    what to do. The command lines print it alone and exit with code 2."""


class DivergedError(ArithmeticError):
    """A training loss or gradient became NaN or infinite. The last good checkpoint is kept."""

    def __init__(self, message: str, run_id: str = "") -> None:
        super().__init__(message)
        self.run_id = run_id  # MLflow's, of the run that diverged


def one_line(error: BaseException) -> str:
    """What an error says, as a part of a sentence: its first line that is not empty, of at most 500 characters, else its
    type's name."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (first if len(first) <= 500 else f"{first[:500]}...").rstrip(".")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The nearest of some names as a part of a sentence, nothing if none is near."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
