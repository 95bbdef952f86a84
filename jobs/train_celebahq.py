#!/usr/bin/env python3
"""Train on CelebA-HQ: ray job submit --working-dir . -- python jobs/train_celebahq.py --shards /data/celebahq --workers 8"""

from jobs.cli import run
from jobs.training import train_job

if __name__ == "__main__":
    run(lambda: train_job({"celebahq": "celebahq256"}, "Train a DDPM on shards of CelebA-HQ at 256x256."))
