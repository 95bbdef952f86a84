"""A sweep of some seconds a trial."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.evaluate.config import EvaluateConfig
from pipelines.shards.dataset import ShardedDataset
from pipelines.sweep.config import ScheduleSweep, SweepConfig
from pipelines.sweep.points import Point
from pipelines.train.config import TrainConfig, config_for
from support.training import NETWORK, OPTIM

MEASURED = EvaluateConfig(
    run="any", extractor="pixels", samples=60, chunk_size=12, batch_size=12, sampler="ddim", sampler_steps=2, pictures=0
)


def training(digits: ShardedDataset, storage: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "shards": str(digits.path),
        "storage": str(storage),
        "unet": replace(NETWORK, dropout=0.0),
        "optim": OPTIM,
        "steps": 4,
        "checkpoint_every": 4,
        "log_every": 2,
    }
    return config_for("tiny", **{**values, **changes})


def schedules(train: TrainConfig, **changes: Any) -> ScheduleSweep:
    return ScheduleSweep(**{"train": train, "evaluate": MEASURED, "schedules": ("linear", "quad"), **changes})


def points_of(config: SweepConfig) -> Mapping[str, Point]:
    def parse(words: object, train: TrainConfig) -> TrainConfig:
        raise AssertionError("only a space parses options")

    return config.points(parse)
