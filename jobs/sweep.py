"""Compare beta schedules: python jobs/sweep.py tiny --train.shards /data/digits --schedules linear quad"""

import sys

import tyro

from ddpm_core.errors import InputError
from ddpm_core.presets import PRESETS
from jobs.cli import parse, run, say
from pipelines.evaluate import EvaluateConfig
from pipelines.sweep import SweepConfig, sweep
from pipelines.training_config import config_for


def main() -> None:
    arguments = sys.argv[1:]
    name = "cifar10"
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    default = SweepConfig(train=config_for(name, shards=tyro.MISSING), evaluate=EvaluateConfig(run="(each trial's)"))
    description = f"Train and evaluate variants under Ray Tune. Presets: {', '.join(PRESETS)} (shown: {name})."
    result = sweep(parse(SweepConfig, arguments, description=description, default=default, first=name), say)
    for place, trial in enumerate(result.ranking, 1):
        say(f"sweep: {place}. {trial.label}, {result.metric} {trial.distance:.4g}")


if __name__ == "__main__":
    run(main)
