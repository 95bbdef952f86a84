"""Output that the pages show, and what of it is the same in every run."""

import re
from collections.abc import Iterable

from support.processes import ROOT


def shown_output(page: str) -> list[list[str]]:
    """The lines of each output that a page shows: a block without a language, below a block of commands."""
    blocks = re.findall(r"```sh\n[^`]*```\n\n```\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [block.splitlines() for block in blocks]


def shape_of(line: str) -> str:
    """A line without the numbers, times, paths and fingerprints in it."""
    line = re.sub(r"(?<!\S)/[\w./-]+", "/", line.strip())
    return re.sub(r"\d[\d,.:]*(e[+-]\d+)?", "0", re.sub(r"-[0-9a-f]{12}\b", "-0", line))


def missing(shown: Iterable[str], printed: str) -> list[str]:
    """Which of the lines that are shown have no line of their shape in what was printed."""
    shapes = {shape_of(line) for line in printed.splitlines()}
    return [line for line in shown if shape_of(line) not in shapes]
