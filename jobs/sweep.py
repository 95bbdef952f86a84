#!/usr/bin/env python3
"""Compare trainings: python jobs/sweep.py schedules cifar10 --train.shards /data/cifar10 --seeds 3

python jobs/sweep.py schedules PRESET   beta schedules at the paper's end points, and at those that meet linear's L_T
python jobs/sweep.py ablation PRESET    the six cells of the paper's Table 2
python jobs/sweep.py space PRESET       any option: --grid optim.lr=1e-4,2e-4 --draw unet.dropout=uniform:0:0.3
"""

import sys

from ddpm_core.errors import InputError, did_you_mean
from ddpm_core.presets import PRESETS
from jobs.cli import MISSING, given_recipe, parse, run, say
from pipelines import sweep
from pipelines.evaluate.config import EvaluateConfig
from pipelines.runtime.recipe import PRESET
from pipelines.sweep.config import AblationSweep, ScheduleSweep, SpaceSweep, SweepConfig
from pipelines.train.config import TrainConfig, config_for

SWEEPS: dict[str, type[SweepConfig]] = {"schedules": ScheduleSweep, "ablation": AblationSweep, "space": SpaceSweep}


def main() -> None:
    arguments = sys.argv[1:]
    kind = arguments.pop(0) if arguments else ""
    if kind in ("-h", "--help"):
        print(__doc__)
        return
    if kind not in SWEEPS:
        near = did_you_mean(kind, SWEEPS)
        raise InputError(
            f"sweep {kind!r} is unknown{near}: choose {', '.join(SWEEPS)}; see python jobs/sweep.py --help"
        )
    recipe = given_recipe(arguments)
    preset = recipe.values.get(f"train.{PRESET}", "cifar10") if recipe is not None else "cifar10"
    if arguments and not arguments[0].startswith("-"):
        preset = arguments.pop(0)
    if preset not in PRESETS:
        raise InputError(
            f"preset {preset!r} is unknown{did_you_mean(str(preset), PRESETS)}: choose one of {', '.join(PRESETS)}"
        )
    default = SWEEPS[kind](train=config_for(preset, shards=MISSING), evaluate=EvaluateConfig(run="(each trial's)"))
    about = f"Train and evaluate variants under Ray Tune. Presets: {', '.join(PRESETS)} (shown: {preset})."
    config = parse(SWEEPS[kind], arguments, description=about, default=default, first=f"{kind} {preset}")
    points = config.points(
        lambda words, train: parse(TrainConfig, [*words], description=about, default=train, first=kind)
    )
    for line in sweep.sweep(config, points, say).describe():
        say(f"sweep: {line}")


if __name__ == "__main__":
    run(main)
