"""How long a data-parallel step takes: its arithmetic, and what of the exchange of gradients is not hidden behind it."""

import math
from dataclasses import dataclass

BUCKET = 25 << 20  # bytes, of torch's DistributedDataParallel


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update. compute: forward, backward and update of a worker's share. exchange: the all-reduce, if nothing
    went on beside it. exposed: what of that the worker waits for."""

    compute: float
    exchange: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def all_reduce_bytes(gradients: int, workers: int) -> float:
    """Bytes that each worker sends, and receives, in a ring all-reduce of so many bytes: 2 (n-1)/n of them (Patarasuk & Yuan
    2009)."""
    return 2 * (workers - 1) / workers * gradients


def step_time(
    *, forward: float, backward: float, update: float, gradients: int, workers: int, bandwidth: float
) -> StepTime:
    """forward, backward, update: seconds of a worker's share. gradients: bytes. bandwidth: bytes a second and direction.

    The backward pass makes the gradients bucket by bucket, evenly over its time, and each is exchanged as soon as it is there
    and the one before is through (Li et al. 2020, PyTorch Distributed): with B buckets of exchange e and backward b each, the
    last one ends at B b + e if e <= b, else at b + B e.
    """
    exchange = all_reduce_bytes(gradients, workers) / bandwidth
    buckets = max(1, math.ceil(gradients / BUCKET))
    exposed = max(exchange / buckets, exchange - backward * (buckets - 1) / buckets)
    return StepTime(forward + backward + update, exchange, exposed)
