"""Types of configuration values that say their range, and the one check of them.

    workers: Positive[int] = 1          1 or more
    hours: Positive[float] | None       above 0
    --seed is checked as Count: 0 or more

NaN and infinity lie in no range.
"""

import math
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar

from ddpm_core.errors import InputError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Range:
    """What a number must be: at least `low`, or above it if `above`; at most `high`. `wanted` says so in words."""

    wanted: str
    low: float = -math.inf
    above: bool = False
    high: float = math.inf

    def __contains__(self, value: int | float) -> bool:
        return math.isfinite(value) and (value > self.low if self.above else value >= self.low) and value <= self.high


Positive = Annotated[Number, Range("a positive number", low=0.0, above=True)]
Count = Annotated[Number, Range("a number, 0 or more", low=0.0)]


def option(name: str) -> str:
    """A field's name as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def check_ranges(config: Any) -> None:
    """Raises InputError for the first field of a dataclass whose value is outside the range that its type says. A field
    of several values is checked value by value; None is always allowed."""
    assert is_dataclass(config)
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        wanted = _range_of(hints[field.name])
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if wanted is not None and isinstance(number, int | float) and number not in wanted:
                raise InputError(f"{option(field.name)} is {number:,}: give {wanted.wanted}")


def _range_of(hint: Any) -> Range | None:
    """The range within a type such as `Positive[int] | None` or `tuple[Positive[int], ...]`."""
    for argument in getattr(hint, "__metadata__", ()):
        if isinstance(argument, Range):
            return argument
    return next((found for part in typing.get_args(hint) if (found := _range_of(part)) is not None), None)
