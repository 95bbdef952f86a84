"""Every command, and the configuration that its options are."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import tyro

from ddpm_core.ranges import Range, Text
from jobs.demo import DemoConfig
from jobs.report import ReportConfig
from jobs.training import TrainCommand
from jobs.ui import UIConfig
from pipelines.checkpoints.config import ExportConfig
from pipelines.compress.config import CurveConfig, DecodeConfig, EncodeConfig
from pipelines.evaluate.config import CalibrateConfig, EmaConfig, EvaluateConfig, GridConfig
from pipelines.likelihood.config import LikelihoodConfig
from pipelines.nightly.config import NightlyConfig
from pipelines.plan.config import PlanConfig
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
    "evaluate.py grid --evaluate.run nobody": GridConfig,
    "evaluate.py ema --evaluate.run nobody": EmaConfig,
    "evaluate.py calibrate --data nowhere --test-data nowhere": CalibrateConfig,
    "compress.py encode --run nobody --images nowhere --output out": EncodeConfig,
    "compress.py decode --run nobody --files nowhere --output out": DecodeConfig,
    "compress.py curve --run nobody --data nowhere --output out": CurveConfig,
    "export.py nobody --output out": ExportConfig,
    "nightly_eval.py": NightlyConfig,
    "plan.py": PlanConfig,
    "report.py --output report.html": ReportConfig,
    "demo.py": DemoConfig,
    "ui.py": UIConfig,
}


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
