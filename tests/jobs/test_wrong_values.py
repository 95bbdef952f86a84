"""Every option of every job, by its type, with values that it cannot have: generated, so that a new option is covered.

Nothing here starts Ray or reads a file: what is wrong is seen before that, or else the sentence is another.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import ray
import tyro
from support.commands import run_job

from ddpm_core.ranges import LARGEST, Range, Text
from jobs.demo import DemoConfig
from jobs.report import ReportConfig
from jobs.training import TrainCommand
from jobs.ui import UIConfig
from pipelines.checkpoints.config import ExportConfig
from pipelines.compress.config import CurveConfig, DecodeConfig, EncodeConfig
from pipelines.evaluate.config import CalibrateConfig, EvaluateConfig
from pipelines.likelihood.config import LikelihoodConfig
from pipelines.nightly.config import NightlyConfig
from pipelines.preprocess.config import PreprocessConfig
from pipelines.sweep.config import AblationSweep, ScheduleSweep, SpaceSweep

# A command that lacks nothing, and the configuration that its options are.
COMMANDS: dict[str, Any] = {
    "preprocess.py --source nowhere --output out --image-size 8": PreprocessConfig,
    "train_lsun.py tiny --shards nowhere": TrainCommand,
    "train_cifar10.py --shards nowhere": TrainCommand,
    "train_celebahq.py --shards nowhere": TrainCommand,
    "sweep.py schedules tiny --train.shards nowhere": ScheduleSweep,
    "sweep.py ablation tiny --train.shards nowhere": AblationSweep,
    "sweep.py space tiny --train.shards nowhere --grid optim.lr=1e-3": SpaceSweep,
    "evaluate.py --run nobody": EvaluateConfig,
    "evaluate.py likelihood --run nobody": LikelihoodConfig,
    "evaluate.py calibrate --data nowhere --test-data nowhere": CalibrateConfig,
    "compress.py encode --run nobody --images nowhere --output out": EncodeConfig,
    "compress.py decode --run nobody --files nowhere --output out": DecodeConfig,
    "compress.py curve --run nobody --data nowhere --output out": CurveConfig,
    "export.py nobody --output out": ExportConfig,
    "nightly_eval.py": NightlyConfig,
    "report.py --output report.html": ReportConfig,
    "demo.py": DemoConfig,
    "ui.py": UIConfig,
}
UNCHECKED = {"tracking-uri", "grid", "draw"}  # texts that are parsed, each with sentences of its own


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(option without its dashes, its type) of every field, those of nested configurations too."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        marks = getattr(hint, "__metadata__", ())
        if any(mark in (tyro.conf.Suppress, tyro.conf.Positional, tyro.conf.Fixed) for mark in marks):
            continue
        if dataclasses.is_dataclass(inner):
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from options(inner, prefix if flat else f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


def leaves(hint: Any) -> Iterator[tuple[Any, Range | Text | None]]:
    """(plain type, what is said of it) of each alternative within a type."""
    if get_origin(hint) is Annotated:
        ranges = [mark for mark in hint.__metadata__ if isinstance(mark, Range | Text)]
        for plain, inner in leaves(get_args(hint)[0]):
            yield plain, (ranges[0] if ranges else inner)
    elif get_origin(hint) in (Union, types.UnionType, tuple):
        for part in get_args(hint):
            if part not in (type(None), Ellipsis):
                yield from leaves(part)
    else:
        yield hint, None


def wrong_values(name: str, hint: Any) -> list[str]:
    """Values that an option of this type cannot have."""
    (plain, within), *_ = leaves(hint)
    if plain in (int, float):
        assert isinstance(within, Range), f"{name}: a number of a configuration says its range in its type"
        values = ["nan", "inf", "eight", str(10**26)] if plain is int else ["nan", "inf", "1e999", "eight"]
        low = within.low if within.above else within.low - 1
        return [*values, str(int(low)), *([str(int(within.high) + 1)] if within.high < LARGEST else [])]
    if get_origin(plain) is Literal:
        return ["nonsense", ""]
    if plain is str and name.rpartition(".")[2].replace("_", "-") not in UNCHECKED:
        assert isinstance(within, Text), f"{name}: a text of a configuration says in its type what it may be"
        return ["", " ", "a" * 5000]
    return []


def cases() -> Iterator[tuple[str, str, str]]:
    """(command, option, wrong value), an option of several commands once for each configuration that declares it."""
    seen = set()
    for command, config in COMMANDS.items():
        for name, hint in options(config):
            if (config, name) in seen:
                continue
            seen.add((config, name))
            for value in wrong_values(name, hint):
                yield command, f"--{name.replace('_', '-')}", value


CASES = list(cases())


def test_there_are_some_hundred_cases() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_that_an_option_cannot_have_is_taken(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def init(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.chdir(tmp_path)
    job, *arguments = command.split()
    faults = []
    for _, option, value in (case for case in CASES if case[0] == command):
        code = run_job(monkeypatch, job, *arguments, option, value)
        captured = capsys.readouterr()
        one_sentence = captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
        named = option.rpartition(".")[2].lstrip("-") in captured.err.replace("_", "-")
        if code != 2 or not one_sentence or not named or list(tmp_path.iterdir()):
            faults.append(f"{option} {value!r} -> {code}: {captured.err[-300:]}{captured.out[-100:]}")
    assert not faults, "\n".join(faults)
