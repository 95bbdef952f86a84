"""A plan as a page to read."""

from collections.abc import Sequence

from pipelines.plan.driver import Page
from pipelines.plan.rows import LimitRow, PlanRow

TIMES = ((24.0, "days"), (1.0, "hours"), (1 / 60, "minutes"), (1 / 3600, "s"))  # in hours


def describe_page(page: Page) -> str:
    """Tables in lines: what each stage takes, and what its limit is as workers are added."""
    lines = [
        f"measured: unit costs on {page.machine}",
        "computed: counted from the configuration",
        f"assumed:  {page.assumed}; from half as fast to half as fast again",
    ]
    for stage in dict.fromkeys(row.stage for row in page.rows):
        lines += ["", stage, *aligned([cells(row) for row in page.rows if row.stage == stage])]
    for stage in dict.fromkeys(limit.stage for limit in page.limits):
        limits = [limit for limit in page.limits if limit.stage == stage]
        lines += ["", f"{stage}, as {'CPUs' if stage == 'preprocess' else 'workers'} are added"]
        lines += aligned([limit_cells(limit) for limit in limits])
    return "\n".join([*lines, *(f"\n{note}" for note in page.notes)])


def cells(row: PlanRow) -> list[str]:
    value, low, high = (quantity(each, row.unit) for each in (row.value, row.low, row.high))
    if low.partition(" ")[2] == high.partition(" ")[2]:
        low = low.partition(" ")[0]
    return [row.what, value, "" if row.low == row.high else f"{low} to {high}", row.source, row.basis]


def limit_cells(limit: LimitRow) -> list[str]:
    busy = "" if limit.busy is None else f"{limit.busy:.1%} busy"
    return [f"{limit.workers:,}", quantity(limit.hours, "hours"), busy, f"limit: {limit.limit}"]


def quantity(value: float, unit: str) -> str:
    """A value in a unit that suits it, to three digits."""
    if unit.endswith("hours"):
        scale, unit = next(
            (hours, unit.replace("hours", name)) for hours, name in TIMES if value >= 2 * hours or hours == TIMES[-1][0]
        )
        value /= scale
    return f"{value:,.0f} {unit}".rstrip() if value >= 100 else f"{value:.3g} {unit}".rstrip()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
