"""Checkpoints to numbers: python jobs/evaluate.py --run lsun_church-0123456789ab --checkpoints latest

python jobs/evaluate.py likelihood --run RUN --data TEST          bits/dim of a data set, rate and distortion
python jobs/evaluate.py calibrate --data TRAIN --test-data TEST   tries an extractor on real images with known answers
python jobs/evaluate.py compare FOLDER FOLDER                     two results of one protocol, and whether they differ
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.cli import parse, run, say
from pipelines.evaluate.config import CalibrateConfig, EvaluateConfig
from pipelines.likelihood.config import LikelihoodConfig
from pipelines.runtime.console import emit_result


@dataclass(frozen=True)
class Pair:
    """Two finished evaluations."""

    one: Annotated[Path, tyro.conf.Positional]
    """A folder evaluate/RUN/PROTOCOL/step-... of the storage."""
    other: Annotated[Path, tyro.conf.Positional]
    """Another."""
    across_protocols: bool = False
    """Compare although the protocols differ."""


def main() -> None:
    # Here, not above: MLflow reads the environment, which run() prepares, when it is imported.
    from pipelines.evaluate.calibrate import calibrate
    from pipelines.evaluate.driver import evaluate
    from pipelines.evaluate.evaluation import compare, read_evaluation
    from pipelines.likelihood.driver import measure_likelihood

    match sys.argv[1:]:
        case ["calibrate", *rest]:
            about = "Try an extractor and the metrics on real images with known answers."
            calibrate(parse(CalibrateConfig, rest, description=about, first="calibrate"), say)
        case ["likelihood", *rest]:
            about = "Measure the likelihood of images under checkpoints, in bits/dim."
            for each in measure_likelihood(
                parse(LikelihoodConfig, rest, description=about, first="likelihood"), say
            ).likelihoods:
                say(f"likelihood: {each.describe()}")
        case ["compare", *rest]:
            pair = parse(Pair, rest, description="Say whether two evaluations differ.", first="compare")
            one, other = read_evaluation(pair.one), read_evaluation(pair.other)
            say(f"compare: {compare(one, other, across_protocols=pair.across_protocols)}")
        case arguments:
            about = "Sample from checkpoints and measure the samples."
            result = evaluate(parse(EvaluateConfig, arguments, description=about), say)
            for line in result.describe():
                say(f"evaluate: {line}")
            emit_result(best=result.describe_best())


if __name__ == "__main__":
    run(main)
