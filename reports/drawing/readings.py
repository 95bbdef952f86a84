"""Values to read off a figure. The plot is cut into upright strips, one for each place along x; a strip that is pointed at shows
what every line has there: by its <title> alone, and at once, by touch and by key, with the page's script."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from matplotlib.axes import Axes

STRIPS = 40  # at most, over the width of a plot: narrower ones are hard to hit


class Reading(NamedTuple):
    """A drawn point, and its value in words."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The points of one line by ascending x. colour: the number of its CSS variable, from 1 on; 0 is the ink."""

    label: str
    colour: int
    points: Sequence[Reading]


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What can be read off a pair of axes. place: an x in words. kept: an x that has a strip of its own, whatever lies near."""

    axes: Axes
    traces: Sequence[Trace]
    place: Callable[[float], str]
    kept: float | None = None


def strips(readings: Readings, size: tuple[float, float]) -> list[ElementTree.Element]:
    """The strips as SVG elements over a canvas of that size, after the figure was drawn."""
    axes, (width, height) = readings.axes, size
    canvas = axes.figure.bbox
    box = axes.get_window_extent()
    left, right = (end / canvas.width * width for end in (box.x0, box.x1))
    top, bottom = (height - end / canvas.height * height for end in (box.y1, box.y0))

    def on_canvas(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return across / canvas.width * width, height - up / canvas.height * height

    traces = [trace for trace in readings.traces if trace.points]
    xs = sorted({point.x for trace in traces for point in trace.points})
    level = traces[0].points[0].y if traces else 0.0
    chosen = _chosen(xs, [(on_canvas(x, level)[0] - left) / (right - left) for x in xs], readings.kept)
    centres = [on_canvas(x, level)[0] for x in chosen]
    edges = [left, *((one + other) / 2 for one, other in pairwise(centres)), right]
    elements = []
    for place, x in enumerate(chosen):
        start, end = edges[place], edges[place + 1]
        strip = ElementTree.Element("g", {"class": "at"})
        title = ElementTree.SubElement(strip, "title")
        area = {"x": start, "y": top, "width": max(end - start, 1.0), "height": bottom - top}
        ElementTree.SubElement(strip, "rect", {name: f"{value:.1f}" for name, value in area.items()})
        lines = [readings.place(x)]
        for trace in traces:
            point = _nearest(trace.points, x)
            across, down = on_canvas(point.x, point.y)
            if not start <= across <= end:
                continue
            where = "" if point.x == x else f" (at {readings.place(point.x)})"
            lines.append(f"{trace.label}: {point.text}{where}")
            mark = {"class": f"c{trace.colour}", "cx": f"{across:.1f}", "cy": f"{down:.1f}", "r": "3"}
            ElementTree.SubElement(strip, "circle", mark)
        title.text = "\n".join(lines)
        elements.append(strip)
    return elements


def _chosen(xs: Sequence[float], shares: Sequence[float], kept: float | None) -> list[float]:
    """The x that get a strip, one for each part of the plot's width that has any. shares: where they lie on it, 0 to 1."""
    if len(xs) <= STRIPS:
        return list(xs)
    parts = np.clip(np.floor(np.asarray(shares) * STRIPS).astype(int), 0, STRIPS - 1)
    chosen = []
    for part in np.unique(parts):
        inside = [x for x, own in zip(xs, parts, strict=True) if own == part]
        chosen.append(kept if kept in inside else inside[len(inside) // 2])
    return chosen


def _nearest(points: Sequence[Reading], x: float) -> Reading:
    place = bisect_left(points, x, key=lambda point: point.x)
    return min(points[max(0, place - 1) : place + 1], key=lambda point: abs(point.x - x))
