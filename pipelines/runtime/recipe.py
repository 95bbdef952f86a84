"""A recipe: the options of a command in a TOML file, by their own names; what comes before a dot is a table.

    shards = "/shared/church"       --shards /shared/church
    horizontal-flip = true          --horizontal-flip
    keep-every = "None"             --keep-every None

    [unet]
    ch-mult = [1, 1, 2, 2, 4, 4]    --unet.ch-mult 1 1 2 2 4 4

Reading turns it into the words of a command line, so that a value means the same in both.
"""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import tyro

from ddpm_core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from pipelines.storage.locations import Location

RECIPE = "config.toml"  # in the folder of whatever was made by it
PRESET = "preset"  # no option: the word that stands first says it, but in a file it is a key like any other
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    Path: "a text in quotes",
}


@dataclass(frozen=True)
class Option:
    """An option of a command. name: without its dashes, such as unet.ch-mult."""

    name: str
    hint: Any
    positional: bool = False

    def words(self, value: Any) -> list[str]:
        """A value from a file as words of the command line."""
        table, dot, name = self.name.rpartition(".")
        if isinstance(value, bool):
            return [f"--{table}{dot}{'' if value else 'no-'}{name}"]
        if isinstance(value, list):
            return [f"--{self.name}", *map(str, value)]
        return [str(value)] if self.positional else [f"--{self.name}={value}"]


def options(config: type[Any], prefix: str = "") -> Iterator[Option]:
    """The options that a configuration is on the command line, those of its nested configurations too."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        inner, marks = unwrapped(hints[field.name])
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from options(typing.cast(type[Any], inner), prefix if flat else f"{prefix}{name}.")
        elif field.name == PRESET or tyro.conf.Suppress not in marks:
            yield Option(prefix + name, hints[field.name], tyro.conf.Positional in marks)


def unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(a type, what is said of it)."""
    return (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every option of a configuration."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, (_, marks) = getattr(config, field.name), unwrapped(hints[field.name])
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from values(value, prefix if flat else f"{prefix}{name}.")
        elif field.name == PRESET or tyro.conf.Suppress not in marks:
            yield prefix + name, value


def keep_recipe(folder: "Location", config: Any) -> None:
    """Commit the options that a folder was made by into it: --config FOLDER/config.toml repeats the job."""
    write_recipe(folder / RECIPE, config, title=f"Given to its job by --config, this repeats {folder.name}")


def write_recipe(place: "Location", config: Any, *, title: str, without: Iterable[str] = ()) -> None:
    """Commit the options of a configuration as a file that --config takes. title: its first line. without: options to leave
    out. Raises InputError for a path that is not UTF-8, which TOML cannot hold."""
    text = recipe_text({name: value for name, value in values(config) if name not in without}, title)
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a recipe cannot hold {text.splitlines()[text[: error.start].count(chr(10))]!r}, which is not UTF-8: rename it"
        ) from error
    from pipelines.storage.locations import committed  # here: --help need not wait for it

    with committed(place) as temporary:
        temporary.write_bytes(content)


def recipe_text(flat: Mapping[str, Any], title: str) -> str:
    """Options as TOML, those without a dot first."""
    tables: dict[str, list[str]] = {"": []}
    for name, value in flat.items():
        table, _, key = name.rpartition(".")
        tables.setdefault(table, []).append(f"{key} = {toml_value(value)}")
    parts = ["\n".join([*([f"[{table}]"] if table else []), *lines]) for table, lines in tables.items() if lines]
    return f"# {title}\n\n" + "\n\n".join(parts) + "\n"


def toml_value(value: Any) -> str:
    """A bool, number, text, path, None or tuple of those as TOML. None, which TOML lacks, is the word of the command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    # JSON's escapes are TOML's, except that TOML wants one for DEL too.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True)
class Recipe:
    """A recipe's file, read. values: by the options' names, with dashes."""

    path: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Raises InputError if there is none, or it is no TOML."""
        try:
            tables = tomllib.loads(path.read_bytes().decode())
        except OSError as error:
            raise InputError(
                f"--config is {str(path)!r}, which cannot be read ({error.strerror}): give a TOML file"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"--config is {str(path)!r}, which is no TOML ({error}): correct it") from error
        return cls(str(path), dict(flattened(tables)))

    def words(self, known: Mapping[str, Option]) -> tuple[list[str], list[str]]:
        """(options, positional arguments) that say the same on a command line. Raises InputError for a key that is no option, or
        a value of another type."""
        from ddpm_core.typed import shown  # here: --help need not wait for pydantic

        several: list[str] = []  # first, so that none takes what comes after
        single: list[str] = []
        positional: list[str] = []
        for name, value in self.values.items():
            option = known.get(name)
            if option is None:
                raise InputError(
                    f"{self.path!r} has the key {name!r}, which is no option here{did_you_mean(name, known)}"
                )
            if not fits(value, option.hint):
                raise InputError(f"{self.path!r} has {name} = {shown(value)}: give {wanted(option.hint)}")
            if name.rpartition(".")[2] == PRESET:
                continue
            into = positional if option.positional else several if isinstance(value, list) else single
            into += option.words(value)
        return [*several, *single], positional


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is in a table."""
    for key, value in table.items():
        name = prefix + key.replace("_", "-")
        if isinstance(value, dict):
            yield from flattened(value, f"{name}.")
        else:
            yield name, value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of TOML is of an option's type. Ranges and choices are for the command line to refuse."""
    hint, _ = unwrapped(hint)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(choice) for choice in get_args(hint))
    if origin is tuple:
        return isinstance(value, list) and all(fits(each, part) for each in value for part in get_args(hint)[:1])
    if hint is type(None):
        return bool(value == "None")
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (str if hint is Path else hint)


def wanted(hint: Any) -> str:
    """What a value of an option's type is, in words."""
    hint, _ = unwrapped(hint)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        return " or ".join([wanted(part) for part in parts] + (['"None"'] if type(None) in get_args(hint) else []))
    if origin is Literal:
        return f"one of {', '.join(map(toml_value, get_args(hint)))}"
    if origin is tuple:
        return f"a list, each {wanted(get_args(hint)[0])}"
    return WORDS.get(hint, "a text in quotes")
