"""The whole workflow at laptop size: python jobs/demo.py (make demo)"""

import os
import sys
from dataclasses import dataclass

from ddpm_core.ranges import FilePath
from jobs.cli import parse, run, say
from pipelines import demo
from pipelines.runtime.locations import absolute
from pipelines.runtime.options import Checked


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Checked):
    """Where the demo works."""

    storage: FilePath = "runs"
    """The folder for everything it makes."""


def main() -> None:
    config = parse(
        DemoConfig, sys.argv[1:], description="Raw images to a report, at laptop size, on a Ray cluster of its own."
    )
    if sys.stdout.isatty():
        os.environ.setdefault("DDPM_PROGRESS_SECONDS", "1")
    result = demo.demo(absolute(config.storage, option="--storage"), say)
    say("")
    say(f"  report           {result.report}")
    say(f"  best checkpoint  {result.best}")
    say("  MLflow UI        make ui")


if __name__ == "__main__":
    run(main)
