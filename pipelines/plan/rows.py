"""A line of a plan: a quantity, and whether it was measured, computed or assumed."""

from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "computed", "assumed"]
# computed: counted from the configuration. measured: a unit cost, times a count. assumed: rests on a number that nobody has
# measured here, such as the utilisation of a GPU.


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """low, high: between which the value is thought to lie; equal to it if it is counted. basis: what it is made of, in words."""

    stage: str
    what: str
    value: float
    low: float
    high: float
    unit: str
    source: Source
    basis: str


@dataclass(frozen=True, kw_only=True)
class LimitRow:
    """What a stage takes with so many workers, and what makes it take that long. busy: share of the workers' time, if it was
    simulated."""

    stage: str
    workers: int
    hours: float
    busy: float | None
    limit: str


def counted(stage: str, what: str, value: float, unit: str, basis: str) -> PlanRow:
    return PlanRow(
        stage=stage, what=what, value=value, low=value, high=value, unit=unit, source="computed", basis=basis
    )
