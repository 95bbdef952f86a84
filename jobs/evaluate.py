#!/usr/bin/env python3
"""Checkpoints to numbers: python jobs/evaluate.py --run lsun_church-0123456789ab --checkpoints latest

python jobs/evaluate.py likelihood --run RUN --data TEST          bits/dim of a data set, rate and distortion
python jobs/evaluate.py grid --evaluate.run RUN --steps 10 50     one checkpoint by DDIM in few steps, with eta from 0 to 1
python jobs/evaluate.py ema --evaluate.run RUN                   one checkpoint with EMA of several lengths
python jobs/evaluate.py calibrate --data TRAIN --test-data TEST   tries an extractor on real images with known answers
python jobs/evaluate.py compare FOLDER FOLDER                     two results of one protocol, and whether they differ
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from jobs.cli import Positional, parse, run, say
from pipelines import evaluate, likelihood
from pipelines.evaluate.config import CalibrateConfig, EmaConfig, EvaluateConfig, GridConfig
from pipelines.likelihood.config import LikelihoodConfig
from pipelines.runtime.console import emit_result


@dataclass(frozen=True)
class Pair:
    """Two finished evaluations."""

    one: Annotated[Path, Positional]
    """A folder evaluate/RUN/PROTOCOL/step-... of the storage."""
    other: Annotated[Path, Positional]
    """Another."""
    across_protocols: bool = False
    """Compare although the protocols differ."""


def main() -> None:
    match sys.argv[1:]:
        case ["calibrate", *rest]:
            about = "Try an extractor and the metrics on real images with known answers."
            trial = parse(CalibrateConfig, rest, description=about, first="calibrate")
            evaluate.calibrate(trial, say)
        case ["likelihood", *rest]:
            about = "Measure the likelihood of images under checkpoints, in bits/dim."
            measurement = parse(LikelihoodConfig, rest, description=about, first="likelihood")
            for each in likelihood.measure_likelihood(measurement, say).likelihoods:
                say(f"likelihood: {each.describe()}")
        case ["grid", *rest]:
            about = "Measure one checkpoint by DDIM in several numbers of steps, with several eta."
            grid = parse(GridConfig, rest, description=about, first="grid")
            for line in evaluate.describe_grid(evaluate.evaluate_grid(grid, say)):
                say(line)
        case ["ema", *rest]:
            about = "Measure one checkpoint with EMA of several lengths, chosen after the training."
            lengths = parse(EmaConfig, rest, description=about, first="ema")
            for line in evaluate.describe_lengths(evaluate.evaluate_lengths(lengths, say)):
                say(f"evaluate: {line}")
        case ["compare", *rest]:
            pair = parse(Pair, rest, description="Say whether two evaluations differ.", first="compare")
            one, other = evaluate.read_evaluation(pair.one), evaluate.read_evaluation(pair.other)
            say(f"compare: {evaluate.compare(one, other, across_protocols=pair.across_protocols)}")
        case arguments:
            about = "Sample from checkpoints and measure the samples."
            config = parse(
                EvaluateConfig,
                arguments,
                description=about,
                words=("likelihood", "grid", "ema", "calibrate", "compare"),
            )
            result = evaluate.evaluate(config, say)
            for line in result.describe():
                say(f"evaluate: {line}")
            emit_result(best=result.describe_best())


if __name__ == "__main__":
    run(main)
