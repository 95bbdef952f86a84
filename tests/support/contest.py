"""Ours against a peer that does the same work: paired, alternating, with one thread each; the rows make a table."""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from threadpoolctl import threadpool_limits

PAIRS = 3
# What peers import and none of these benchmarks use.
UNUSED = (
    *("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"),
    *("transformers", "transformers.feature_extraction_utils", "transformers.tokenization_utils_base"),
    *("streaming.multimodal", "streaming.text", "streaming.vision", "snappy", "zstd"),
)


@dataclass(frozen=True)
class Row:
    """What a contest measured. cpu, wall: a peer's time over ours in each pair; above 1, ours is faster. memory: MiB that the
    process grew by at most, (ours, the peer's); NaN if it was not measured."""

    work: str
    peer: str
    cpu: list[float]
    wall: list[float]
    memory: tuple[float, float]

    @property
    def ratio(self) -> float:
        """The median ratio of CPU time."""
        return statistics.median(self.cpu)


ROWS: list[Row] = []


def contest(work: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int = PAIRS) -> Row:
    """Run both in turn; the row is printed, and kept for the table."""
    with one_thread():
        memory = peak_mib(ours), peak_mib(theirs)  # warms up
        cpu, wall = [], []
        for number in range(pairs):
            first, second = (
                (ours, theirs) if number % 2 else (theirs, ours)
            )  # what ran before leaves its mark in the caches
            times = {first: clocks(first), second: clocks(second)}
            cpu.append(times[theirs][0] / times[ours][0])
            wall.append(times[theirs][1] / times[ours][1])
    row = Row(work, peer, cpu, wall, memory)
    ROWS.append(row)
    print("\n" + line(row))
    return row


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and for every BLAS: idle ones that wait in a loop count as CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def clocks(action: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds of this process, seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_mib(action: Callable[[], Any]) -> float:
    """How many MiB the process grew by at most."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
    before = status_mib("VmRSS")
    action()
    return status_mib("VmHWM") - before


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(each.split()[1]) for each in lines if each.startswith(f"{field}:")) / 1024


def peer_module(name: str) -> ModuleType:
    """A peer's module, installed or in the folder that DDPM_PEERS names; the test is skipped if it is in neither.

    What it imports and these benchmarks do not use is made up. (torchmetrics does not import beside an installed
    torch-fidelity without torchvision: hence the folder.)
    """
    folder = os.environ.get("DDPM_PEERS")
    made_up = [each for each in UNUSED if each not in sys.modules]
    path = [*sys.path]
    sys.path += [folder] if folder else []
    try:
        sys.modules.update({each: MagicMock() for each in made_up})
        return import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    finally:
        sys.path[:] = path
        for each in made_up:
            sys.modules.pop(each, None)


HEADER = "| work | against | CPU time | from, to | wall time | peak memory, MiB: ours, the peer's |\n|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """The row in Markdown: median ratios, above 1 if ours is faster."""
    spread, wall = f"{min(row.cpu):.2f}, {max(row.cpu):.2f}", statistics.median(row.wall)
    memory = ", ".join(f"{mib:+,.0f}" for mib in row.memory if not math.isnan(mib))
    return f"| {row.work} | {row.peer} | {row.ratio:.2f} | {spread} | {wall:.2f} | {memory} |"


def table() -> str:
    """All rows of this session in Markdown."""
    return "\n".join([HEADER, *map(line, ROWS)])
