"""Checkpoints to numbers: python jobs/evaluate.py --run lsun_church-0123456789ab --checkpoints latest"""

import sys

from jobs.cli import parse, run, say
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.results import describe_values


def main() -> None:
    config = parse(EvaluateConfig, sys.argv[1:], description="Sample from checkpoints and measure the samples.")
    result = evaluate(config, say)
    best = result.best
    say(f"evaluate: protocol {best.protocol.fingerprint}: {best.protocol.describe()}")
    say(f"evaluate: best is step {best.step:,} with {describe_values(best.values, best.protocol)}")


if __name__ == "__main__":
    run(main)
