"""What every command line here shares: typed options, one sentence for an error, exit codes.

0 done, 1 failed or diverged, 2 wrong input, 3 done with an alarm, 130 interrupted.
"""

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

import tyro

from ddpm_core.errors import DivergedError, InputError

Config = TypeVar("Config")


def say(line: str) -> None:
    """A line of progress. In a terminal, lines that count down write over each other; a log gets each at once."""
    if not sys.stdout.isatty():
        print(line, flush=True)
    else:
        end = "" if line.endswith(" left") and not line.endswith("0:00 left") else "\n"
        print(f"\r\x1b[2K{line}", end=end, flush=True)


def parse(
    config: type[Config],
    arguments: list[str],
    *,
    description: str,
    default: Config | Any = tyro.MISSING_NONPROP,
    first: str = "",
) -> Config:
    """The options as a `config`; --help prints them all and exits. `first` is the word that stood before the options.
    InputError in one sentence for what is wrong."""
    complaint = io.StringIO()
    prog = f"python jobs/{sys.argv[0].rsplit('/', 1)[-1]} {first}".strip()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, args=arguments, description=description, prog=prog, default=default)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise InputError(f"{_sentence(complaint.getvalue())}: see {prog} --help") from None
    except InputError:
        raise
    except ValueError as error:  # the rules of a configuration, such as a width that no group norm divides
        raise InputError(f"{error}: see {prog} --help") from None


def _sentence(message: str) -> str:
    """tyro's framed message (frame, title, paragraphs) as the start of a sentence: what is missing, unknown, or as it
    says. Where the output is not UTF-8, the frame is made of spaces."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in message.splitlines()]
    body = "\n".join([line for line in lines if line.strip("-")][1:])
    complaint, _, unknown = body.partition("Unrecognized options:")
    if unknown.split():
        return f"option {unknown.split()[0].rstrip(',')} is unknown"
    if complaint.startswith("Missing"):
        required = [line.split()[0] for line in complaint.splitlines() if line.startswith("--")]
        return f"{', '.join(required) or 'what it is about'} must be given"
    return " ".join(complaint.split("For full helptext")[0].split("Argument helptext")[0].split()).rstrip(".")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a job and leave with its exit code. Any other exception is a bug, and shows its traceback.

    SIGTERM, which `ray job stop` sends, ends it as ctrl-C does: workers are let go and what was begun can go on.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except DivergedError as error:
        print(f"diverged: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(0)
