"""What every command line here shares: typed options, one sentence for an error, exit codes.

0 done, 1 failed or diverged, 2 wrong input, 3 done with an alarm, 130 interrupted.
"""

import errno
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TypeVar, cast, get_args

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

from ddpm_core.errors import DivergedError, InputError, did_you_mean, one_line
from ddpm_core.ranges import FilePath
from jobs import interrupted
from jobs.help import grouped, name_of
from pipelines.runtime.console import close_display, say, unread_output
from pipelines.runtime.environment import prepare
from pipelines.runtime.options import Checked
from pipelines.runtime.progress import PACE
from pipelines.runtime.recipe import Recipe, options, write_recipe

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
# What the libraries of object stores raise without a number, or with one that says nothing of a disk.
STORE_LIBRARIES = ("fsspec", "s3fs", "gcsfs", "adlfs")
OF_STORES = (errno.EBUSY, errno.EREMOTEIO, errno.ETIMEDOUT, None)
FILE_PATH = get_args(FilePath)[1]
FILES = ("config", "save-config")  # options that no recipe holds
COMPLETION = ("--tyro-write-completion", "--tyro-print-completion")  # tyro's own: SHELL, and the file to write
ONCE = ("dry-run",)  # a recipe repeats a command, not the look at what it would do
WHAT = "what it is about"  # a word without an option


@dataclass(frozen=True, kw_only=True)
class RecipeFiles(Checked):
    """Where the options come from besides, and where they go."""

    config: FilePath | None = None
    """A TOML file of options by their names, with a table for what comes before a dot; what is given here wins."""
    save_config: FilePath | None = None
    """Write all options, as they are in the end, to such a file, and go on."""


def given_recipe(arguments: list[str]) -> Recipe | None:
    """The file that --config names among some words. Raises InputError if it cannot be read."""
    path = None
    for number, word in enumerate(arguments):
        if word.startswith("--config="):
            path = word.partition("=")[2]
        elif word == "--config":
            path = "".join(arguments[number + 1 : number + 2])
    if path is None or FILE_PATH.refusal(path):
        return None  # what is wrong with it is the parser's to say
    return Recipe.read(Path(path).expanduser())  # a submitted job finds its own in what was uploaded


def parse(
    config: type[Config],
    arguments: list[str],
    *,
    description: str,
    default: Config | Any = tyro.MISSING_NONPROP,
    first: str = "",
    words: Sequence[str] = (),
) -> Config:
    """The options as a `config`; --help prints them all and exits. Those that are not given come from the file of --config, if
    there is one. InputError in one sentence for what is wrong.

    first: the word that stood before the options. words: what else might have stood there.
    """
    prog = f"python jobs/{sys.argv[0].rsplit('/', 1)[-1]} {first}".strip()
    if set(arguments[:1]) & set(COMPLETION):
        prog = sys.argv[0].rsplit("/", 1)[-1]  # the word that a shell completes the options of
    known = {option.name: option for part in (config, RecipeFiles) for option in options(part)}
    recipe = given_recipe(arguments)
    stated, positional = recipe.words({n: o for n, o in known.items() if n not in FILES}) if recipe else ([], [])
    source = f" (with {recipe.path!r})" if recipe else ""
    fields: list[Any] = [
        ("options", Annotated[config, tyro.conf.arg(name="")]),
        ("files", Annotated[RecipeFiles, tyro.conf.arg(name="")], RecipeFiles()),
    ]
    if default is not tyro.MISSING_NONPROP:
        fields[0] = (*fields[0], default)
    command = make_dataclass("Command", fields, frozen=True, kw_only=True)

    def refuse(event: ParseErrorEvent) -> NoReturn:
        raise InputError(f"{_sentence(event, [*(f'--{name}' for name in known), *words])}{source}: see {prog} --help")

    def parsed(given: list[str]) -> Any:
        try:
            with on_parse_error(refuse), grouped():
                return tyro.cli(command, args=given, description=description, prog=prog)
        except InputError as error:  # of a configuration, or from refuse()
            raise (error if source in str(error) else InputError(f"{error}{source}")) from None
        except ValueError as error:  # the rules of a configuration, such as a width that no group norm divides
            raise InputError(f"{error}{source}: see {prog} --help") from None

    # What of the file may have several values is not the last before the arguments, whose first it would take for another.
    given = [*stated, *([f"--config={recipe.path}"] if recipe and stated else []), *arguments]
    try:
        result = parsed(given)
    except InputError:
        if not positional:
            raise
        result = parsed([*given[: len(given) - len(arguments)], *positional, *arguments])
    if result.files.save_config is not None:
        from pipelines.storage.locations import absolute  # here: --help need not wait for it

        place = absolute(result.files.save_config, option="--save-config")
        write_recipe(place, result.options, title=f"{prog} --config {place.name}", without=ONCE)
    return cast(Config, result.options)


def _sentence(event: ParseErrorEvent, known: Iterable[str]) -> str:
    """The start of a sentence on why the options are refused. known: what else may be given."""
    match event:
        case MissingArgs(unrecognized_tokens=[token, *_]) | UnrecognizedArgs(tokens=[token, *_]):
            name = token.partition("=")[0]
            return f"option {name} is unknown{did_you_mean(name, known)}"
        case MissingArgs(missing_arguments=missing):
            names = [WHAT if each.arg.is_positional() else each.arg.display_name() for each in missing]
            line = name_of(missing[0].arg)
            return (
                f"{', '.join(dict.fromkeys(names))} must be given: on the command line, or as {line} = ... in a TOML file that "
                "--config names"
            )
        case InvalidChoice(argument=argument, value=value, choices=choices):
            near = did_you_mean(value, choices)
            return f"{argument.display_name()} is {value!r}{near}: give one of {', '.join(choices)}"
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
    if sys.stdout is not None and sys.stdout.isatty():
        os.environ.setdefault(PACE, "0.5")
    signal.signal(signal.SIGTERM, interrupt)
    with unread_output():
        try:
            try:
                main()
            finally:
                close_display()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except DivergedError as error:
            print(f"diverged: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except KeyboardInterrupt:
            print(stopped(), file=sys.stderr, flush=True)
            sys.exit(130)
        except Exception as error:
            if interrupted(error):
                print(stopped(), file=sys.stderr, flush=True)
                sys.exit(130)
            disk = disk_error(error)
            if disk is not None:
                print(f"error: {disk}", file=sys.stderr, flush=True)
                sys.exit(2)
            print(f"failed: {bug(error)}", file=sys.stderr, flush=True)
            sys.exit(1)
        sys.exit(0)


def stopped() -> str:
    """What an interrupted command says last."""
    return f"interrupted: what is finished is kept, and this goes on from it: {shlex.join(['python', *sys.argv])}"


def from_a_store(error: BaseException) -> bool:
    """Whether the library of an object store raised an error, or what it was raised from."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").partition(".")[0] in STORE_LIBRARIES for frame, _ in frames)


def disk_error(error: BaseException) -> str | None:
    """A sentence on a disk, file or server that refuses to be read or written, None for an error of another kind."""
    from pipelines.storage.locations import NETWORK_ERRORS  # takes a moment, which --help does not have to wait for

    cause = getattr(error, "cause", None)  # of what a worker of Ray's raised
    if isinstance(cause, BaseException):
        return disk_error(cause)
    if isinstance(error, NETWORK_ERRORS):
        kind = type(error).__name__
        return f"a server cannot be reached ({kind}: {one_line(error)}): look at the network, then give the same command again"
    if isinstance(error, OSError) and error.errno in OF_STORES and from_a_store(error):
        return f"an object store refuses ({one_line(error)}): look at it and at who may use it, then give the same command again"
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
