"""JSON files as values of the types that are wanted, or a sentence on what is wrong with them.

A file is described by a TypedDict, whose values may be of types with a range (ddpm_core.ranges); keys that it does not name
may be there, as a later version may write them. What is read is what the file says, unchanged: 1 is not made 1.0.
"""

import functools
import json
import typing
from collections.abc import Callable, Hashable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypeVar

from typing_extensions import TypedDict

from ddpm_core.errors import InputError, one_line
from ddpm_core.ranges import Range

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

    from ddpm_core.commit import ReadablePath

Value = TypeVar("Value")
FileSize = Annotated[int, Range("a number of bytes, 0 or more", low=0, high=2**63 - 1)]
ImageCount = Annotated[int, Range("a number, 0 or more", low=0, high=2**40)]  # no disk holds more images
WANTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
    "none": "null",
}


class JsonObject(TypedDict):
    """Any object."""


TensorsHeader = TypedDict("TensorsHeader", {"__metadata__": NotRequired[dict[str, str]]})


def read_whole(path: "ReadablePath") -> bytes:
    """A file's bytes: of an object store by one request, which sees one version of an object that is replaced meanwhile."""
    store = getattr(path, "fs", None)
    return path.read_bytes() if store is None else bytes(store.cat_file(typing.cast(Any, path).path))


def read_json(path: "ReadablePath", model: type[Value], *, what: str, advice: str) -> Value:
    """A JSON file as what `model` describes. Raises FileNotFoundError if nothing is there, and InputError, which names the file,
    the field, what it is, what was wanted and the advice, if it cannot be read or is something else."""
    try:
        data = read_whole(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # every file system raises its own
        reason = "it is a folder" if path.is_dir() else getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{what} {str(path)!r} cannot be read ({reason}): {advice}") from error
    try:
        return parse_json(data, model)
    except ValueError as error:
        raise InputError(f"{what} {str(path)!r} is damaged ({error}): {advice}") from error


def parse_json(data: bytes, model: type[Value]) -> Value:
    """JSON in UTF-8 as what `model` describes. Raises ValueError, which says what is wrong."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: lists in lists, a thousand deep
        raise ValueError(f"it is no JSON: {one_line(error)}") from error
    return check(value, model)


def tensors_metadata(data: bytes) -> dict[str, str]:
    """What a safetensors file, by its bytes, says beside its tensors. Raises ValueError if its header is damaged."""
    # the header's length, 8 bytes | the header, JSON | the tensors
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], TensorsHeader)
    return header.get("__metadata__", {})


def check(value: Any, model: type[Value]) -> Value:
    """`value`, from JSON, if it is what `model` describes. Raises ValueError, which names the field, what it is and what was
    wanted."""
    _checked(value, model)
    return typing.cast(Value, value)


def _checked(value: Any, model: Any) -> Any:
    """The same as `check`, without keys that the model does not have, and with whole numbers as floats where it has those."""
    from pydantic import ValidationError  # a command that reads nothing starts without it

    try:
        return _adapter(typing.cast(Hashable, model)).validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(_problem(error.errors(include_url=False)[0])) from error
    except (OverflowError, RecursionError) as error:  # a whole number that no float holds
        raise ValueError(one_line(error)) from error


def build(make: Callable[..., Value], value: Any) -> Value:
    """The dataclass `make` from JSON, where tuples are lists. Raises ValueError, which names the field, what it is and what was
    wanted, for a key that the dataclass does not have too, because it would be another value without it."""
    if isinstance(value, dict):
        value = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        known = [field.name for field in fields(typing.cast(Any, make))]
        if unknown := sorted(value.keys() - set(known)):
            raise ValueError(f"it has {shown(unknown[0])}, which is none of {', '.join(known)}")
    return make(**_checked(value, _keys_of(make)))


@functools.cache
def _keys_of(kind: Any) -> Any:
    """The TypedDict of a dataclass's fields, those with a default left out at will."""
    hints = typing.get_type_hints(kind, include_extras=True)
    optional = {field.name for field in fields(kind) if (field.default, field.default_factory) != (MISSING, MISSING)}
    keys: dict[str, Any] = {field.name: hints[field.name] for field in fields(kind)}
    keys = {key: NotRequired[hint] if key in optional else hint for key, hint in keys.items()}
    make: Any = TypedDict  # a type that is not known to mypy
    return make(kind.__name__, keys)


@functools.cache
def _adapter(model: Hashable) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter[Any](model)  # type: ignore[arg-type]


def _problem(error: "ErrorDetails") -> str:
    """What is wrong with one field, in words."""
    field = ".".join(part if isinstance(part, str) and part.isidentifier() else shown(part) for part in error["loc"])
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"it lacks {field}"
    wanted = WANTED.get(kind.rsplit("_", 1)[0]) or str(context.get("error") or context.get("expected") or error["msg"])
    return f"{field or 'it'} is {shown(error['input'])}, where {wanted} is wanted"


def shown(value: Any) -> str:
    """A value as a part of a sentence."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, lists in lists
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:60]}..."
