#!/usr/bin/env python3
"""Train on CIFAR-10: ray job submit --working-dir . -- python jobs/train_cifar10.py --shards /data/cifar10 --workers 8"""

from jobs.cli import run
from jobs.training import train_job

if __name__ == "__main__":
    run(lambda: train_job({"cifar10": "cifar10"}, "Train a DDPM on shards of CIFAR-10."))
