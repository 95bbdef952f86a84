"""What a page is made of: tables of text, charts and illustrations, each with a caption. The template sets them."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports.drawing.pictures import InlineImage

SHOWN_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class Column:
    """`numeric` aligns right; `wraps` lets long text take several lines, while other cells stay on one; the cells of a
    `linked` one lead to where their rows' `href` says."""

    title: str
    numeric: bool = False
    wraps: bool = False
    linked: bool = False

    @property
    def css(self) -> str:
        """The class of its cells in the page's style sheet."""
        return "n" if self.numeric else "w" if self.wraps else ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The first cell is the row's header. `mark` is "best", "close" or "" and sets the row's look; `href` is an address."""

    cells: tuple[str, ...]
    mark: str = ""
    href: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """`omitted` counts the rows that are not among `rows`. A reader may sort a `sortable` one by any column."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    omitted: int = 0
    sortable: bool = False


def long_table(caption: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A sortable table of the first SHOWN_ROWS rows."""
    return Table(
        caption=caption,
        columns=tuple(columns),
        rows=tuple(rows[:SHOWN_ROWS]),
        omitted=max(0, len(rows) - SHOWN_ROWS),
        sortable=True,
    )


def numeric(*titles: str) -> tuple[Column, ...]:
    """Columns of numbers."""
    return tuple(Column(title=title, numeric=True) for title in titles)


@dataclass(frozen=True, kw_only=True)
class Absence:
    """What the report could show and the records do not hold: why, and the command that would measure it, if one would."""

    what: str
    why: str
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure and its caption. `svg` is markup that this package made; every word in it is escaped."""

    svg: Markup
    caption: str


@dataclass(frozen=True, kw_only=True)
class Illustration:
    """A picture with its text alternative and caption, and the labels of its rows and columns if it has any."""

    image: InlineImage
    alt: str
    caption: str
    best: bool = False
    title: str = ""
    row_labels: tuple[str, ...] = ()
    column_labels: tuple[str, ...] = ()
