"""The report's figures: matplotlib -> SVG that stands inside an HTML page.

Lines differ by dash and marker as well as by colour, so a figure can be read in grey. Colours are CSS variables (`--c1` ...
`--c6`) and `currentColor`, so it follows the page into dark mode. Text stays text. What is drawn can be read off as values.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import ticker
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ddpm_core.verdicts import Interval
from reports.drawing.axes import StepAxis, make_axes, plain_ticks, scale_y, set_legend, set_step_axis
from reports.drawing.readings import Reading, Readings, Trace
from reports.drawing.svg import INK, LINE_COLOURS, drawing, to_svg
from reports.formatting import decimals_for, fixed, number
from reports.records.entities import ScheduleCurves
from reports.records.store import Series

MAX_LINES = len(LINE_COLOURS)
_DASHES: tuple[Any, ...] = (
    "-", (0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1)),
)  # fmt: skip
_MARKERS = "osD^vP"
_MARKED_POINTS = 40  # above this, markers and error bars would cover the line
_DRAWN_POINTS = 400  # about one per pixel


class LinePoint(NamedTuple):
    """A value at a training step, after so many network calls or at a length of the EMA, left out if it is NaN or infinite.
    close: whether it cannot be told apart from the best."""

    step: float
    value: float
    interval: Interval | None = None
    close: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A measured series."""

    label: str
    points: Sequence[LinePoint]


def by_step(
    name: str,
    lines: Sequence[Line],
    *,
    metric: str,
    alt: str,
    mark_lowest: bool = False,
    batch_size: int | None = None,
    small: bool = False,
    beside: tuple[str, float] | None = None,
    axis: StepAxis = "training step",
) -> Markup:
    """A metric of checkpoints against the training step, or of one against another axis, with intervals. `mark_lowest` names
    the lowest point and shades its interval; `batch_size` adds an axis of images seen; `beside` is a (name, value) to compare
    with, drawn across."""
    lines = lines[:MAX_LINES]
    points = [point for line in lines for point in line.points if math.isfinite(point.value)]
    lowest = min(points, key=lambda point: (point.value, point.step)) if mark_lowest and points else None
    with drawing():
        figure, axes = make_axes(small=small)
        for place, line in enumerate(lines):
            _plot_measured(axes, line, place)
        names = [line.label for line in lines]
        if beside is not None:
            axes.axhline(beside[1], color=INK, linestyle=(0, (2, 2)), linewidth=1.0, label=str(len(names)))
            names.append(beside[0])
        scale_y(axes, [point.value for point in points] + ([beside[1]] if beside else []), 8, small=small)
        if lowest is not None:
            _mark_lowest(axes, lowest, [point.step for point in points], metric, PLACES[axis](lowest.step))
        axes.set_ylabel(metric)
        set_step_axis(axes, batch_size, small=small, label=axis)
        set_legend(figure, axes, names)
        traces = [
            Trace(
                label=line.label if len(lines) > 1 else metric,
                colour=place,
                points=[
                    Reading(point.step, point.value, _value_text(point))
                    for point in line.points
                    if math.isfinite(point.value)
                ],
            )
            for place, line in enumerate(lines, start=1)
        ]
        readings = Readings(axes=axes, traces=traces, place=PLACES[axis], kept=lowest.step if lowest else None)
        return to_svg(figure, name=name, alt=alt, readings=readings)


def _value_text(point: LinePoint) -> str:
    """A value with its interval, "14.0 (9.7 to 18.3)"."""
    interval = point.interval or ()
    value, *ends = (fixed(number, decimals_for(point.value, *interval)) for number in (point.value, *interval))
    return f"{value} ({' to '.join(ends)})" if ends else value


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else number(value)


def _step(step: float) -> str:
    return f"step {step:,.0f}"


PLACES: Mapping[StepAxis, Callable[[float], str]] = {
    "training step": _step,
    "network calls": lambda calls: f"{calls:,.0f} network calls",
    "EMA length": lambda length: f"length {length:g}",
}


def curve(
    name: str,
    series: Sequence[tuple[str, Series]],
    *,
    metric: str,
    alt: str,
    small: bool = False,
    log: bool = True,
    raw: bool = True,
) -> Markup:
    """Training curves of (name, series): the first one's raw values faint (if `raw`), and a running median of each.
    A small one has no legend: its lines are those of the large one beside it."""
    with drawing():
        figure, axes = make_axes(small=small, tall=not small)
        drawn: list[float] = []
        traces = []
        for place, (label, points) in enumerate(series[:MAX_LINES]):
            steps, values = _finite(points)
            if not len(steps):
                continue
            colour = LINE_COLOURS[place]
            if raw and place == 0:
                raw_steps, raw_values = thinned(steps, values)
                axes.plot(raw_steps, raw_values, color=colour, alpha=0.3, linewidth=0.7)
                drawn.extend(raw_values)
            smooth_steps, smooth = smoothed(steps, values)
            axes.plot(smooth_steps, smooth, color=colour, linestyle=_DASHES[place], linewidth=1.5, label=str(place))
            drawn.extend(smooth)
            values_of_line = zip(smooth_steps.tolist(), smooth.tolist(), strict=True)
            read = [Reading(step, value, number(value)) for step, value in values_of_line]
            traces.append(Trace(label=label if len(series) > 1 else metric, colour=place + 1, points=read))
        scale_y(axes, drawn, 10 if log else math.inf, small=small)
        set_step_axis(axes, None, small=small)
        axes.set_ylabel(metric)
        if not small:
            set_legend(figure, axes, [label for label, _ in series])
        return to_svg(figure, name=name, alt=alt, readings=Readings(axes=axes, traces=traces, place=_step))


def schedule_curves(
    name: str,
    schedules: Mapping[str, ScheduleCurves],
    *,
    quantity: Literal["betas", "alphas_cumprod", "log_snr"],
    symbol: str,
    alt: str,
) -> Markup:
    """A quantity of a sweep's noise schedules against t."""
    with drawing():
        figure, axes = make_axes(small=True)
        traces = []
        for place, (label, schedule) in enumerate(list(schedules.items())[:MAX_LINES]):
            values = np.asarray(getattr(schedule, quantity), dtype=np.float64)
            finite = np.where(np.isfinite(values), values, np.nan)
            axes.plot(
                schedule.t, finite, color=LINE_COLOURS[place], linestyle=_DASHES[place], linewidth=1.6,
                marker=_MARKERS[place], markevery=0.12, markersize=4, label=str(place),
            )  # fmt: skip
            pairs = zip(schedule.t, values.tolist(), strict=True)
            read = [Reading(t, value, number(value)) for t, value in pairs if math.isfinite(value)]
            traces.append(Trace(label=label, colour=place + 1, points=read))
        axes.set_xlabel("t")
        axes.set_ylabel(symbol)
        axes.xaxis.set_major_formatter(plain_ticks())
        set_legend(figure, axes, list(schedules))
        readings = Readings(axes=axes, traces=traces, place=lambda t: f"t = {t:,.0f}")
        return to_svg(figure, name=name, alt=alt, readings=readings)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One quantity against another: a line, or crosses alone if `marks`."""

    label: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def relation(name: str, lines: Sequence[Relation], *, x: str, y: str, alt: str, small: bool = True) -> Markup:
    """A figure of relations, both axes from 0 on."""
    with drawing():
        figure, axes = make_axes(small=small)
        traces = []
        for place, line in enumerate(lines[:MAX_LINES]):
            points = [point for point in line.points if all(map(math.isfinite, point))]
            read = [Reading(a, b, number(b)) for a, b in sorted(points)]
            traces.append(Trace(label=line.label if len(lines) > 1 else y, colour=place + 1, points=read))
            style: dict[str, Any] = (
                {"linestyle": "", "marker": "x", "markersize": 5}
                if line.marks
                else {"linestyle": _DASHES[place], "linewidth": 1.6}
            )
            axes.plot(
                [a for a, _ in points], [b for _, b in points], color=LINE_COLOURS[place], label=str(place), **style
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(plain_ticks())
        axes.yaxis.set_major_formatter(plain_ticks())
        set_legend(figure, axes, [line.label for line in lines])
        readings = Readings(axes=axes, traces=traces, place=lambda value: f"{x}: {_short(value)}")
        return to_svg(figure, name=name, alt=alt, readings=readings)


def smoothed(steps: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A running median over about a thirtieth of the points, at no more than a few hundred of them. The median does not
    follow the spikes that a diffusion loss has by its random t."""
    window = max(1, len(values) // 30) | 1
    centres = np.unique(np.linspace(0, len(values) - 1, min(len(values), _DRAWN_POINTS)).astype(np.int64))
    medians = [np.median(values[max(0, c - window // 2) : c + window // 2 + 1]) for c in centres]
    return steps[centres], np.asarray(medians, dtype=np.float64)


def thinned(steps: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A long series by the lowest and highest point of each stretch, so that no spike is lost in drawing."""
    if len(values) <= 2 * _DRAWN_POINTS:
        return steps, values
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(len(values)), _DRAWN_POINTS):
        kept.update((int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])))
    order = sorted(kept)
    return steps[order], values[order]


def _finite(series: Series) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    values = np.asarray(series.values, dtype=np.float64)
    finite = np.isfinite(values)
    return np.asarray(series.steps, dtype=np.int64)[finite], values[finite]


def _plot_measured(axes: Axes, line: Line, place: int) -> None:
    points = [point for point in line.points if math.isfinite(point.value)]
    few = len(points) <= _MARKED_POINTS
    close = [point for point in points if point.close]
    axes.plot(
        [point.step for point in close], [point.value for point in close],
        "o", color=INK, alpha=0.16, markersize=15 if few else 7, markeredgewidth=0,
    )  # fmt: skip
    axes.plot(
        [point.step for point in points], [point.value for point in points],
        color=LINE_COLOURS[place], linestyle=_DASHES[place], linewidth=1.5,
        marker=_MARKERS[place] if few else "", markersize=4, label=str(place),
    )  # fmt: skip
    intervals = [(point.step, *point.interval) for point in points if point.interval is not None]
    if intervals:
        _plot_intervals(axes, intervals, LINE_COLOURS[place], as_bars=few)


def _plot_intervals(axes: Axes, intervals: Sequence[tuple[float, float, float]], colour: str, *, as_bars: bool) -> None:
    """(step, low, high) as error bars, or as a band."""
    steps, lows, highs = zip(*intervals, strict=True)
    if as_bars:
        axes.vlines(steps, lows, highs, color=colour, linewidth=1.2)
        axes.plot(steps, lows, "_", steps, highs, "_", color=colour, markersize=6)
    else:
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.22, linewidth=0)


def _mark_lowest(axes: Axes, lowest: LinePoint, steps: Sequence[float], metric: str, where: str) -> None:
    """Ring and name the lowest point, and shade its interval over the whole width. steps: of all points. where: its in words."""
    step, value, interval, _ = lowest
    if interval is not None:
        axes.axhspan(*interval, color=INK, alpha=0.1, linewidth=0)
    # No line passes below the minimum: room for its name at the foot of the plot.
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom * (bottom / top) ** 0.2 if axes.get_yscale() == "log" else bottom - 0.2 * (top - bottom))
    axes.plot([step], [value], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, linestyle="")
    late = step > (min(steps) + max(steps)) / 2
    axes.annotate(
        f"lowest {metric}: {fixed(value, decimals_for(value, *(interval or ())))} at {where}",
        (step, 0.0), xycoords=axes.get_xaxis_transform(), xytext=(9 if late else -9, 4), textcoords="offset points",
        va="bottom", ha="right" if late else "left", fontsize=9,
    )  # fmt: skip
