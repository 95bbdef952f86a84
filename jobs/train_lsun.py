#!/usr/bin/env python3
"""Train on LSUN: ray job submit --working-dir . -- python jobs/train_lsun.py church --shards /data/church --workers 8"""

from jobs.cli import run
from jobs.training import train_job

RECIPES = {
    "church": "lsun_church",
    "bedroom": "lsun_bedroom",
    "bedroom-large": "lsun_bedroom_large",
    "cat": "lsun_cat",
    "tiny": "tiny",
}

if __name__ == "__main__":
    run(lambda: train_job(RECIPES, "Train a DDPM on shards of LSUN images."))
