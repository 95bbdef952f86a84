"""A pair of axes as all figures of the report have it: canvas, scales, ticks and legend."""

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.formatting import number, shortened

StepAxis = Literal["training step", "network calls", "EMA length"]
_HANDLE, _LETTER = 42, 5.4  # points: of an entry of a legend besides its text, and of a letter of that
_ROW = 0.17  # inches: of a row of a legend


def make_axes(*, small: bool = False, tall: bool = False) -> tuple[Figure, Axes]:
    """One pair of axes on a canvas narrow enough that its text is legible at the width of a phone; a small one at half
    of it."""
    figure = Figure(figsize=(3.3, 2.1) if small else (5.0, 3.2 if tall else 2.7), layout="constrained")
    return figure, figure.subplots()


def plain_ticks() -> ticker.FuncFormatter:
    """Numbers at the ticks, each as short as it can be, without offset or exponent above the axis."""
    return ticker.FuncFormatter(
        lambda value, _: number(value, 2) if 0 < abs(value) < 1e-3 else f"{value:,.10g}".replace("-", "−")
    )


def scale_y(axes: Axes, values: Sequence[float], ratio: float, *, small: bool) -> None:
    """A logarithmic axis if all values are positive and span more than `ratio`."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > ratio:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=8))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    elif small:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(plain_ticks())


def set_step_axis(axes: Axes, batch_size: int | None, *, small: bool, label: StepAxis = "training step") -> None:
    """Training steps below, and above, if the batch size is known, images seen; or network calls, which double from tick to
    tick; or lengths."""
    axes.set_xlabel(label)
    if label == "EMA length":
        axes.xaxis.set_major_formatter(plain_ticks())
        return
    if label == "network calls":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(3 if small else 5, integer=True))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if batch_size:
        scales = (lambda steps: steps * batch_size, lambda images: images / batch_size)
        images = axes.secondary_xaxis("top", functions=scales)
        images.set_xlabel("images seen")
        images.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        images.xaxis.set_major_formatter(ticker.EngFormatter(sep="\N{THIN SPACE}"))


def set_legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Name the lines if there are several, above the plot, for inside it they would cover curves. They are labelled by their
    place in `names`: matplotlib leaves out a label that begins with an underscore."""
    handles, places = axes.get_legend_handles_labels()
    if len(handles) < 2:
        return
    texts = [shortened(names[int(place)]) for place in places]
    room = figure.get_figwidth() * 72 / (_HANDLE + _LETTER * max(map(len, texts)))
    columns = min(len(texts), max(1, math.floor(room)))
    figure.set_figheight(figure.get_figheight() + _ROW * -(-len(texts) // columns))
    legend = figure.legend(
        handles, places, loc="outside upper left", ncols=columns, frameon=False, fontsize=9,
        handlelength=2.6, columnspacing=1.2, borderpad=0.1, borderaxespad=0.2, labelspacing=0.25,
    )  # fmt: skip
    for entry, text in zip(legend.get_texts(), texts, strict=True):
        entry.set_text(text)
