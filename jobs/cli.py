"""What every command line here shares: typed options, one sentence for an error, exit codes.

0 done, 1 failed or diverged, 2 wrong input, 3 done with an alarm, 130 interrupted.
"""

import errno
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

import tyro
from tyro._errors import (  # its only way to say what is wrong as a value; pyproject.toml pins the version
    BadValue,
    InstantiationFailure,
    InvalidChoice,
    MissingArgs,
    ParseErrorEvent,
    UnrecognizedArgs,
    on_parse_error,
)

from ddpm_core.errors import DivergedError, InputError, one_line
from jobs import interrupted
from pipelines.runtime.console import say, unread_output
from pipelines.runtime.environment import prepare

__all__ = ["MISSING", "Positional", "Suppress", "parse", "run", "say"]

# Jobs take these from here: this package comes first, so that ctrl-C while tyro is imported shows no traceback.
MISSING, Positional, Suppress = tyro.MISSING, tyro.conf.Positional, tyro.conf.Suppress

Config = TypeVar("Config")
# What to do about the refusals of a disk that are nobody's bug.
OF_DISKS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow it, or give another place"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP), "give another place"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "look at the disk"),
}
STOPPED = "interrupted: run the same command again to go on"
WHAT = "what it is about"  # a word without an option


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
    prog = f"python jobs/{sys.argv[0].rsplit('/', 1)[-1]} {first}".strip()

    def refuse(event: ParseErrorEvent) -> NoReturn:
        raise InputError(f"{_sentence(event)}: see {prog} --help")

    try:
        with on_parse_error(refuse):
            return tyro.cli(config, args=arguments, description=description, prog=prog, default=default)
    except InputError:
        raise
    except ValueError as error:  # the rules of a configuration, such as a width that no group norm divides
        raise InputError(f"{error}: see {prog} --help") from None


def _sentence(event: ParseErrorEvent) -> str:
    """The start of a sentence on why the options are refused."""
    match event:
        case MissingArgs(unrecognized_tokens=[token, *_]) | UnrecognizedArgs(tokens=[token, *_]):
            return f"option {token} is unknown"
        case MissingArgs(missing_arguments=missing):
            names = [WHAT if each.arg.is_positional() else each.arg.display_name() for each in missing]
            return f"{', '.join(dict.fromkeys(names))} must be given"
        case InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{argument.display_name()} is {value!r}: give one of {', '.join(choices)}"
        case BadValue(argument=argument):
            return f"{argument.display_name()} has no value: give one after it"
        case InstantiationFailure(argument=argument, message=message) if argument is not None:
            numbers = {"FLOAT": "a number", "INT": "a whole number"}
            wanted = [words for kind, words in numbers.items() if kind in (argument.lowered.metavar or "")]
            given = re.findall(r"'([^']*)'", message)
            if wanted and given:
                return f"{argument.display_name()} is {given[-1]!r}: give {wanted[0]}"
            return f"{argument.display_name()} cannot be understood ({' '.join(message.split())})"
        case InstantiationFailure(message=message):
            return message
    return "the options cannot be understood"


def run(main: Callable[[], None]) -> NoReturn:
    """Run a job and leave with its exit code. Any other exception is a bug: one sentence says where its traceback is.

    SIGTERM, which `ray job stop` sends, ends it as ctrl-C does: workers are let go and what was begun can go on.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    prepare()
    signal.signal(signal.SIGTERM, interrupt)
    with unread_output():
        try:
            main()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except DivergedError as error:
            print(f"diverged: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except KeyboardInterrupt:
            print(STOPPED, file=sys.stderr, flush=True)
            sys.exit(130)
        except Exception as error:
            if interrupted(error):
                print(STOPPED, file=sys.stderr, flush=True)
                sys.exit(130)
            disk = disk_error(error)
            if disk is not None:
                print(f"error: {disk}", file=sys.stderr, flush=True)
                sys.exit(2)
            print(f"failed: {bug(error)}", file=sys.stderr, flush=True)
            sys.exit(1)
        sys.exit(0)


def disk_error(error: BaseException) -> str | None:
    """A sentence on a disk, file or server that refuses to be read or written, None for an error of another kind."""
    from pipelines.runtime.locations import NETWORK_ERRORS  # takes a moment, which --help does not have to wait for

    cause = getattr(error, "cause", None)  # of what a worker of Ray's raised
    if isinstance(cause, BaseException):
        return disk_error(cause)
    if isinstance(error, NETWORK_ERRORS):
        kind = type(error).__name__
        return f"a server cannot be reached ({kind}: {one_line(error)}): look at the network, then give the same command again"
    if not isinstance(error, OSError) or error.errno not in OF_DISKS:
        # Libraries that write files themselves, such as safetensors and SQLite, have errors of their own.
        full = any(words in str(error) for words in (os.strerror(errno.ENOSPC), "database or disk is full"))
        return f"a disk is full ({one_line(error)}): make room, then give the same command again" if full else None
    what = "a file" if error.filename is None else repr(error.filename)
    return f"{what} cannot be read or written ({error.strerror}): {OF_DISKS[error.errno]}, then give the same command again"


def bug(error: BaseException) -> str:
    """A sentence on an error that is this program's fault, its traceback saved in a new file."""
    with tempfile.NamedTemporaryFile("w", prefix="ddpm-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    return (
        f"{type(error).__name__}: {one_line(error)}. This is an error of the program, not of the command: please report it "
        f"with {file.name}, which holds the whole story; what is finished is kept, and the same command goes on from it"
    )
