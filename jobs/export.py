#!/usr/bin/env python3
"""A checkpoint for another program: python jobs/export.py RUN --format diffusers --output exported"""

import sys

from jobs.cli import parse, run, say
from pipelines import checkpoints
from pipelines.checkpoints.config import ExportConfig


def main() -> None:
    config = parse(ExportConfig, sys.argv[1:], description="Write a checkpoint in the layout of another program.")
    folder = checkpoints.export_checkpoint(config)
    say(f"export: {folder}, for diffusers.DDPMPipeline.from_pretrained")


if __name__ == "__main__":
    run(main)
