"""The time of a data-parallel step: against a simulation of its buckets, one after the other."""

import math

import pytest

from pipelines.plan.data_parallel import BUCKET, all_reduce_bytes, step_time


def exposed_by_events(backward: float, gradients: int, workers: int, bandwidth: float) -> float:
    """When the last bucket is through, after the end of the backward pass."""
    buckets = math.ceil(gradients / BUCKET)
    through = 0.0
    for number in range(1, buckets + 1):
        ready = backward * number / buckets
        through = max(through, ready) + 2 * (workers - 1) / workers * gradients / buckets / bandwidth
    return through - backward


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
@pytest.mark.parametrize("bandwidth", [1e8, 1e9, 1e10, 1e12])
@pytest.mark.parametrize("gradients", [1 << 20, 450_000_000])
def test_what_is_exposed_is_what_comes_after_the_backward_pass(workers: int, bandwidth: float, gradients: int) -> None:
    step = step_time(forward=0.1, backward=0.2, update=0.05, gradients=gradients, workers=workers, bandwidth=bandwidth)
    assert step.exposed == pytest.approx(exposed_by_events(0.2, gradients, workers, bandwidth))
    assert step.total == pytest.approx(0.35 + step.exposed)
    assert step.exposed <= step.exchange


def test_a_worker_sends_nearly_twice_the_gradients_however_many_there_are() -> None:
    assert all_reduce_bytes(1000, 1) == 0
    assert all_reduce_bytes(1000, 2) == 1000
    assert all_reduce_bytes(1000, 1000) == pytest.approx(1998)
