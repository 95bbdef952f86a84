#!/usr/bin/env python3
"""The whole workflow at laptop size: python jobs/demo.py (make demo)"""

import shlex
import sys
import webbrowser
from dataclasses import dataclass

from ddpm_core.ranges import FilePath
from jobs.cli import parse, run, say
from jobs.ui import has_screen
from pipelines import demo
from pipelines.runtime.options import Checked
from pipelines.storage.locations import absolute


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Checked):
    """Where the demo works."""

    storage: FilePath = "runs"
    """The folder for everything it makes."""
    open: bool = True
    """Open the report in a browser, if this machine has a screen."""


def main() -> None:
    config = parse(
        DemoConfig, sys.argv[1:], description="Raw images to a report, at laptop size, on a Ray cluster of its own."
    )
    result = demo.demo(absolute(config.storage, option="--storage"), say)
    say("")
    say(f"  report           {result.report}")
    say(f"  best checkpoint  {result.best}")
    say("")
    say("Next:")
    for what, command in next_steps(config.storage):
        say(f"  {what}")
        say(f"    $ {command}")
    if config.open and has_screen():
        webbrowser.open(result.report.as_uri())


def next_steps(storage: str) -> list[tuple[str, str]]:
    """What a person may do after the demo, and the command that does it."""
    ui = "make ui" if storage == "runs" else f"python jobs/ui.py --storage {shlex.quote(storage)}"
    return [
        ("every run and checkpoint in MLflow", ui),
        ("your own images", "python jobs/preprocess.py --source YOUR_IMAGES --output data/mine --image-size 32"),
        ("what training on them will cost", "python jobs/train_cifar10.py --shards data/mine --dry-run"),
    ]


if __name__ == "__main__":
    run(main)
