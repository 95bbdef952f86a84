"""Types of configuration values that say what they may be, and the one check of them.

    workers: Positive[int] = 1          1 or more
    hours: Positive[float] | None       above 0
    seed: Seed = 0                      0 to 2^63 - 1
    storage: FilePath = "runs"          not empty, no part longer than a file's name may be

NaN and infinity lie in no range, nor a whole number above LARGEST, if the range has no end of its own: no machine counts to it.
"""

import math
import os
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar

from ddpm_core.errors import InputError

Number = TypeVar("Number", int, float)
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """What a number must be: at least `low`, or above it if `above`; at most `high`, or below it if `below`. `wanted` says so
    in words."""

    wanted: str
    low: int | float = -math.inf
    above: bool = False
    high: int | float = math.inf
    below: bool = False

    def refusal(self, value: int | float) -> str | None:
        """What to give in place of a value, None if the value will do."""
        if isinstance(value, int) and value > LARGEST and self.high == math.inf:
            return f"{self.wanted}, at most {LARGEST:,}"
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return None if low and high and (isinstance(value, int) or math.isfinite(value)) else self.wanted

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """How ddpm_core.typed checks it in a file."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: int | float) -> int | float:
        wanted = self.refusal(value)
        if wanted is not None:
            raise ValueError(wanted)
        return value


Positive = Annotated[Number, Range("a positive number", low=0, above=True)]
Count = Annotated[Number, Range("a number, 0 or more", low=0)]
Seed = Annotated[int, Range("a number from 0 to 2^63 - 1", low=0, high=2**63 - 1)]
Fraction = Annotated[float, Range("a number from 0 to below 1", low=0, high=1, below=True)]
Variance = Annotated[float, Range("a number above 0, at most 1", low=0, above=True, high=1)]


def up_to(high: int) -> Range:
    """From 1 to a number that no network or image of use exceeds."""
    return Range(f"a number from 1 to {high:,}", low=1, high=high)


@dataclass(frozen=True)
class Text:
    """What a text must be: not blank, of at most `longest` characters, and of at most `part` bytes between slashes."""

    wanted: str
    longest: int = 4000
    part: int | None = None

    def refusal(self, value: str) -> str | None:
        """What to give in place of a value, None if the value will do."""
        parts = value.split("/") if self.part is not None else []
        too_long = len(value) > self.longest or any(len(os.fsencode(part)) > (self.part or 0) for part in parts)
        return self.wanted if not value.strip() or "\0" in value or too_long else None


FilePath = Annotated[str, Text("a path or URL, . for the current folder", part=255)]
Name = Annotated[str, Text("a name of 1 to 500 characters", longest=500)]


def check_ranges(config: Any, *, options: bool = True) -> None:
    """Raises InputError for the first field of a dataclass whose value is not what its type says. A field of several values is
    checked value by value; None is always allowed. options: whether to name a field as the option that it is on a command
    line."""
    assert is_dataclass(config)
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        wanted = _range_of(hints[field.name])
        value = getattr(config, field.name)
        for single in value if isinstance(value, tuple) else (value,):
            if isinstance(wanted, Range) and isinstance(single, int | float):
                instead, shown = wanted.refusal(single), f"{single:,}"
            elif isinstance(wanted, Text) and isinstance(single, str):
                instead, shown = wanted.refusal(single), repr(single if len(single) < 100 else f"{single[:90]}...")
            else:
                continue
            if instead is not None:
                name = f"--{field.name.replace('_', '-')}" if options else field.name
                raise InputError(f"{name} is {shown}: give {instead}")


def _range_of(hint: Any) -> Range | Text | None:
    """What is said within a type such as `Positive[int] | None` or `tuple[FilePath, ...]`."""
    for argument in getattr(hint, "__metadata__", ()):
        if isinstance(argument, Range | Text):
            return argument
    return next((found for part in typing.get_args(hint) if (found := _range_of(part)) is not None), None)
