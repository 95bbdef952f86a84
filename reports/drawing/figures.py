"""The report's figures: matplotlib -> SVG that stands inside an HTML page.

Lines differ by dash and marker as well as by colour, so a figure can be read in grey. Colours are CSS
variables (`--c1` ... `--c6`) and `currentColor`, so it follows the page into dark mode. Text stays text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from reports.drawing.svg import INK, LINE_COLOURS, drawing, to_svg
from reports.records.entities import Schedule
from reports.records.store import Series
from reports.verdicts.formatting import decimals_for, fixed, number, shortened

MAX_LINES = len(LINE_COLOURS)
_DASHES: tuple[Any, ...] = (
    "-", (0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1)),
)  # fmt: skip
_MARKERS = "osD^vP"
_MARKED_POINTS = 40  # above this, markers and error bars would cover the line
_DRAWN_POINTS = 400  # about one per pixel


@dataclass(frozen=True, kw_only=True)
class Line:
    """A measured series with an optional interval. Values may be NaN or infinite: those are left out."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()
    close: Sequence[bool] = ()  # which points cannot be told apart from the best


def by_step(
    name: str,
    lines: Sequence[Line],
    *,
    metric: str,
    alt: str,
    best: str = "",
    batch_size: int | None = None,
    small: bool = False,
) -> str:
    """A metric of checkpoints against the training step, with intervals. `best` is "min" to mark the lowest
    point, shade its interval and the points that are close to it, or "" to mark none; `batch_size` adds an axis of
    images seen."""
    with drawing():
        figure, axes = _canvas(small)
        for place, line in enumerate(lines[:MAX_LINES]):
            _plot_measured(axes, line, place)
        _scale_y(axes, [value for line in lines for value in line.values], 8, small)
        if best == "min":
            _mark_minimum(axes, lines[:MAX_LINES], metric)
        axes.set_ylabel(metric)
        _step_axis(axes, batch_size, small)
        _legend(axes, [line.label for line in lines])
        return to_svg(figure, name=name, alt=alt)


def curve(
    name: str,
    series: Sequence[tuple[str, Series]],
    *,
    metric: str,
    alt: str,
    small: bool = False,
    log: bool = True,
    raw: bool = True,
) -> str:
    """Training curves of (name, series): the first one's raw values faint (if `raw`), and a running median of each.
    A small one has no legend: its lines are those of the large one beside it."""
    with drawing():
        figure, axes = _canvas(small, tall=not small)
        drawn: list[float] = []
        for place, (_, points) in enumerate(series[:MAX_LINES]):
            steps, values = _finite(points)
            if not len(steps):
                continue
            colour = LINE_COLOURS[place]
            if raw and place == 0:
                raw_steps, raw_values = thinned(steps, values)
                axes.plot(raw_steps, raw_values, color=colour, alpha=0.3, linewidth=0.7)
                drawn.extend(raw_values)
            smooth_steps, smooth = smoothed(steps, values)
            drawn.extend(smooth)
            axes.plot(
                smooth_steps,
                smooth,
                color=colour,
                linestyle=_DASHES[place],
                linewidth=1.5,
                label=str(place),
            )
        _scale_y(axes, drawn, 10 if log else math.inf, small)
        _step_axis(axes, None, small)
        axes.set_ylabel(metric)
        if not small:
            _legend(axes, [label for label, _ in series])
        return to_svg(figure, name=name, alt=alt)


def schedule_curves(name: str, schedules: Mapping[str, Schedule], *, quantity: str, symbol: str, alt: str) -> str:
    """The sweep's noise schedules over each other: `quantity` is "betas", "alphas_cumprod" or "log_snr", against t."""
    with drawing():
        figure, axes = _canvas()
        for place, schedule in enumerate(list(schedules.values())[:MAX_LINES]):
            values = np.asarray(getattr(schedule, quantity), dtype=np.float64)
            shown = np.where(np.isfinite(values), values, np.nan)
            axes.plot(
                schedule.t, shown, color=LINE_COLOURS[place], linestyle=_DASHES[place], linewidth=1.6,
                marker=_MARKERS[place], markevery=0.12, markersize=4, label=str(place),
            )  # fmt: skip
        axes.set_xlabel("t")
        axes.set_ylabel(symbol)
        _legend(axes, list(schedules))
        return to_svg(figure, name=name, alt=alt)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One quantity against another: a line, or marks alone where `marks`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False


def relation(name: str, lines: Sequence[Relation], *, x: str, y: str, alt: str) -> str:
    """A small figure of relations, x from 0 on."""
    with drawing():
        figure, axes = _canvas(small=True)
        for place, line in enumerate(lines[:MAX_LINES]):
            points = [(a, b) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
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
        plain = ticker.FuncFormatter(lambda value, _: _tick(value))
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
        _legend(axes, [line.label for line in lines])
        return to_svg(figure, name=name, alt=alt)


def smoothed(steps: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A running median over about a thirtieth of the points, at no more than a few hundred of them. The
    median does not follow the spikes that a diffusion loss has by its random t."""
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


def _canvas(small: bool = False, tall: bool = False) -> tuple[Figure, Axes]:
    """One pair of axes on a canvas narrow enough that its text is legible at the width of a phone; a small one at half
    of it."""
    figure = Figure(figsize=(3.3, 2.1) if small else (5.0, 3.2 if tall else 2.7), layout="constrained")
    return figure, figure.subplots()


def _plot_measured(axes: Axes, line: Line, place: int) -> None:
    order = [i for i, value in enumerate(line.values) if math.isfinite(value)]
    steps = [line.steps[i] for i in order]
    values = [line.values[i] for i in order]
    few = len(order) <= _MARKED_POINTS
    colour = LINE_COLOURS[place]
    close = [i for i in order if line.close and line.close[i]]
    axes.plot(
        [line.steps[i] for i in close], [line.values[i] for i in close],
        "o", color=INK, alpha=0.16, markersize=15 if few else 7, markeredgewidth=0,
    )  # fmt: skip
    axes.plot(
        steps, values, color=colour, linestyle=_DASHES[place], linewidth=1.5,
        marker=_MARKERS[place] if few else "", markersize=4, label=str(place),
    )  # fmt: skip
    lows = [line.lows[i] if line.lows else None for i in order]
    highs = [line.highs[i] if line.highs else None for i in order]
    known = [
        (step, low, high)
        for step, low, high in zip(steps, lows, highs, strict=True)
        if low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    ]
    if not known:
        return
    at, low_ends, high_ends = zip(*known, strict=True)
    if few:
        axes.vlines(at, low_ends, high_ends, color=colour, linewidth=1.2)
        axes.plot(at, low_ends, "_", at, high_ends, "_", color=colour, markersize=6)
    else:
        axes.fill_between(at, low_ends, high_ends, color=colour, alpha=0.22, linewidth=0)


def _mark_minimum(axes: Axes, lines: Sequence[Line], metric: str) -> None:
    points = [
        (value, step, line.lows[i] if line.lows else None, line.highs[i] if line.highs else None)
        for line in lines
        for i, (step, value) in enumerate(zip(line.steps, line.values, strict=True))
        if math.isfinite(value)
    ]
    if not points:
        return
    value, step, low, high = min(points, key=lambda point: point[:2])
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        axes.axhspan(low, high, color=INK, alpha=0.1, linewidth=0)
    # No line passes below the minimum: room there for its name.
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom * (bottom / top) ** 0.2 if axes.get_yscale() == "log" else bottom - 0.2 * (top - bottom))
    axes.plot([step], [value], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, linestyle="")
    steps = [point[1] for point in points]
    late = step > (min(steps) + max(steps)) / 2
    axes.annotate(
        f"lowest {metric}: {fixed(value, decimals_for(value, low, high))} at step {step:,}", (step, value),
        xytext=(12 if late else -12, -12), textcoords="offset points", va="top",
        ha="right" if late else "left", fontsize=9,
        arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.8, "shrinkB": 6},
    )  # fmt: skip


def _tick(value: float) -> str:
    """A round number as short as it can be."""
    return number(value, 2) if 0 < abs(value) < 1e-3 else f"{value:,.10g}".replace("-", "−")


def _scale_y(axes: Axes, values: Sequence[float], ratio: float, small: bool) -> None:
    """A log axis where all values are positive and span more than `ratio`; plain numbers at the ticks."""
    finite = [value for value in values if math.isfinite(value)]
    plain = ticker.FuncFormatter(lambda value, _: _tick(value))
    if finite and min(finite) > 0 and max(finite) / min(finite) > ratio:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=8))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    elif small:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(plain)


def _step_axis(axes: Axes, batch_size: int | None, small: bool) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(3 if small else 5, integer=True))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if batch_size:
        images = axes.secondary_xaxis("top", functions=_scaled_by(batch_size))
        images.set_xlabel("images seen")
        images.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        images.xaxis.set_major_formatter(ticker.EngFormatter(sep="\N{THIN SPACE}"))


def _scaled_by(factor: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return lambda steps: steps * factor, lambda images: images / factor


def _legend(axes: Axes, names: Sequence[str]) -> None:
    """Name the lines, which are labelled by their place: matplotlib leaves out a label that begins with an
    underscore."""
    if len(names) < 2:
        return
    handles, places = axes.get_legend_handles_labels()
    legend = axes.legend(handles, places, frameon=False, fontsize=9, handlelength=3.2)
    for text in legend.get_texts():
        text.set_text(shortened(names[int(text.get_text())]))


def _finite(series: Series) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    values = np.asarray(series.values, dtype=np.float64)
    finite = np.isfinite(values)
    return np.asarray(series.steps, dtype=np.int64)[finite], values[finite]
