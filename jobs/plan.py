#!/usr/bin/env python3
"""A month of a cluster on a page: python jobs/plan.py --model lsun_church --workers 512 --train-workers 32"""

import json
import sys
from dataclasses import asdict

from jobs.cli import parse, run
from pipelines import plan
from pipelines.plan.config import PlanConfig


def main() -> None:
    config = parse(
        PlanConfig,
        sys.argv[1:],
        description="What preprocessing, training, a sweep, an evaluation and its nights take, and what ends their growth.",
    )
    page = plan.plan(config)
    print(json.dumps(asdict(page), indent=1) if config.json else plan.describe_page(page))


if __name__ == "__main__":
    run(main)
