"""Numbers of configurations lie in the ranges that their types say."""

import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from ddpm_core.errors import InputError
from ddpm_core.ranges import Count, Fraction, Positive, Range, Seed, check_ranges


@dataclass(frozen=True, kw_only=True)
class Config:
    workers: Positive[int] | None = None
    hours: Positive[float] = 8.0
    seed: Count[int] = 0
    rungs: tuple[Positive[int], ...] = ()
    share: Annotated[float, Range("a share from 0 to 1", low=0.0, high=1.0)] = 0.5
    name: str = "free"
    draw: Seed = 0
    decay: Fraction = 0.5

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    "values",
    [
        {"workers": 1},
        {"hours": 1e-9},
        {"seed": 0},
        {"rungs": (1, 2)},
        {"share": 1.0},
        {"workers": 2**31 - 1},
        {"draw": 2**63 - 1},
        {"decay": 0.0},
    ],
)
def test_values_within_their_range_pass(values: dict[str, object]) -> None:
    Config(**values)  # type: ignore[arg-type]
    assert check_ranges(Config(**values)) is None  # type: ignore[arg-type, func-returns-value]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"workers": 0}, "--workers is 0: give a positive number"),
        ({"hours": 0.0}, "--hours is 0.0: give a positive number"),
        ({"hours": math.nan}, "--hours is nan: give a positive number"),
        ({"hours": math.inf}, "--hours is inf: give a positive number"),
        ({"seed": -1}, "--seed is -1: give a number, 0 or more"),
        ({"rungs": (5, 0)}, "--rungs is 0: give a positive number"),
        ({"share": 1.5}, "--share is 1.5: give a share from 0 to 1"),
        ({"share": math.nan}, "--share is nan: give a share from 0 to 1"),
        ({"workers": 2**31}, "--workers is 2,147,483,648: give a positive number, at most 2,147,483,647"),
        ({"workers": 10**400}, f"--workers is {10**400:,}: give a positive number, at most 2,147,483,647"),
        ({"draw": 2**63}, "--draw is 9,223,372,036,854,775,808: give a number from 0 to 2^63 - 1"),
        ({"decay": 1.0}, "--decay is 1.0: give a number from 0 to below 1"),
    ],
)
def test_a_value_outside_its_range_is_refused_in_a_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        Config(**values)  # type: ignore[arg-type]
    assert str(refused.value) == sentence
