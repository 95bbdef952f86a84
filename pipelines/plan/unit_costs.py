"""What one of each thing costs, as tests/benchmarks/unit_costs.py measured it on a machine that the file names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.ranges import Count

FILE = Path(__file__).with_suffix(".json")


class UnitCost(TypedDict):
    """The median of some measurements, and the least and the largest of them. unit: what `value` counts, an item."""

    value: Count[float]
    low: Count[float]
    high: Count[float]
    unit: str
    what: str


class UnitCostsFile(TypedDict):
    machine: str
    costs: dict[str, UnitCost]


@dataclass(frozen=True)
class UnitCosts:
    """All unit costs of one machine, by name."""

    machine: str
    costs: Mapping[str, UnitCost]

    def __getitem__(self, name: str) -> float:
        return self.costs[name]["value"]

    def spread(self, name: str) -> tuple[float, float]:
        """(least, largest) over the median."""
        cost = self.costs[name]
        return cost["low"] / cost["value"], cost["high"] / cost["value"]


def read_unit_costs() -> UnitCosts:
    """Those that were measured last."""
    content = typed.read_json(FILE, UnitCostsFile, what="unit costs", advice="measure them again")
    return UnitCosts(content["machine"], content["costs"])
