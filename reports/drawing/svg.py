"""A matplotlib figure -> one inline SVG element: deterministic, accessible, and coloured by the page's CSS."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from reports.drawing.readings import Readings, strips

# matplotlib knows no CSS variables: it draws in these colours, which nothing else uses; then they are exchanged.
INK = "#0102f0"
LINE_COLOURS = ("#0102f1", "#0102f2", "#0102f3", "#0102f4", "#0102f5", "#0102f6")
_CSS_COLOURS = {INK: "currentColor"} | {colour: f"var(--c{i})" for i, colour in enumerate(LINE_COLOURS, start=1)}

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_ID_USE = re.compile(r"url\(#([^)]+)\)")

_STYLE = {
    "svg.fonttype": "none",
    # Run names are text: a dollar sign in one is no formula.
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.18,
    "grid.linewidth": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
}


@contextmanager
def drawing() -> Iterator[None]:
    """The settings that figures are made and rendered under."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser draws the text; a glyph that matplotlib's font lacks only makes the width a guess.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def to_svg(figure: Figure, *, name: str, alt: str, readings: Readings) -> Markup:
    """The figure as an `<svg>` element. `name` must be unique on the page: it prefixes every id. `alt` is what the figure
    shows, in words; `readings` are the values that show when it is pointed at. The same figure gives the same text, in which
    every word is escaped."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    source = text.getvalue()
    for colour, css in _CSS_COLOURS.items():
        source = source.replace(colour, css)
    root = ElementTree.fromstring(source)
    _embed(root, name)
    root.set("class", "plot")
    root.set("role", "img")
    root.set("aria-label", alt)
    title = ElementTree.Element("title")
    title.text = alt
    root.insert(0, title)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    root.extend(strips(readings, (width, height)))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _referenced_ids(root: ElementTree.Element) -> set[str]:
    """The ids that an element of the tree refers to; no other is kept."""
    used: set[str] = set()
    for element in root.iter():
        for value in element.attrib.values():
            used.update(_ID_USE.findall(value))
        if _LINK in element.attrib:
            used.add(element.attrib[_LINK].removeprefix("#"))
    return used


def _embed(root: ElementTree.Element, name: str) -> None:
    """Make a stand-alone SVG tree fit to stand among others in an HTML page: no namespaces, no styles that reach the rest
    of the page, no fixed size, no id that another figure also has."""
    used = _referenced_ids(root)
    for element in root.iter():
        for child in list(element):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                element.remove(child)
        element.tag = element.tag.removeprefix(_SVG)
        if _LINK in element.attrib:
            element.set("href", f"#{name}-{element.attrib.pop(_LINK).removeprefix('#')}")
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
        for key, value in element.attrib.items():
            element.set(key, _ID_USE.sub(rf"url(#{name}-\1)", value))
        if element.tag == "text" and "style" in element.attrib:
            # The page's font, at matplotlib's size and anchor.
            size = re.search(r"([\d.]+)px", element.attrib["style"])
            kept = [part for part in element.attrib["style"].split(";") if "font" not in part]
            element.set("style", "; ".join([*kept, f"font-size: {size[1]}px"] if size else kept).strip("; "))
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    # What the removed style sheet said, for this drawing only.
    root.set("stroke-linejoin", "round")
    root.set("stroke-linecap", "butt")
