"""The fan-out's own loop over simulated workers: how long it must take, whoever dies or is slow, and how busy workers are."""

import math
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from ddpm_core.errors import InputError
from pipelines.plan.simulation import RayCosts, SimulatedOutcome, WorkerModel, simulate
from pipelines.runtime.fan_out import LOSSES, POLL, SLOW
from pipelines.storage.chunks import chunk_ranges

SECONDS = 100.0  # of a chunk


def equal_chunks(count: int, workers: int, costs: RayCosts | None = None, **model: Any) -> SimulatedOutcome:
    """So many chunks of equal length."""
    return simulate(chunk_ranges(count, 1), WorkerModel(workers=workers, seconds=lambda _: SECONDS, **model), costs)


@pytest.mark.parametrize(("count", "workers"), [(100, 8), (100, 64), (64, 64), (65, 64), (3, 8), (1, 1)])
def test_equal_chunks_take_as_many_rounds_as_they_must(count: int, workers: int) -> None:
    outcome = equal_chunks(count, workers)
    rounds = math.ceil(count / workers)
    assert outcome.seconds == pytest.approx(rounds * SECONDS)
    assert outcome.busy == pytest.approx(count / (rounds * workers))
    assert (outcome.driver, outcome.lost, outcome.repeated) == (0.0, 0, 0)


def test_the_driver_does_one_thing_at_a_time_and_ends_the_growth() -> None:
    costs = RayCosts(submit=1.0, result=0.5, wait=0.5)  # 2 s a chunk: 50 workers keep a driver busy
    few, many = (equal_chunks(1000, workers, costs) for workers in (10, 500))
    assert few.seconds >= 1000 / 10 * SECONDS
    assert few.busy > 0.95
    assert many.seconds >= 1000 * 2.0
    assert many.busy <= 50 / 500
    assert many.driver == pytest.approx(many.seconds, rel=0.1)


def test_what_lost_workers_were_at_is_done_by_others() -> None:
    outcome = equal_chunks(400, 8, losses=0.05, restart=30.0)
    assert outcome.lost > 5
    assert outcome.busy * 8 * outcome.seconds == pytest.approx(400 * SECONDS)  # each counts once
    # At worst each loss costs a worker half a chunk and its restart, and comes last.
    assert outcome.seconds <= 400 / 8 * SECONDS + outcome.lost * (SECONDS / 2 + 30.0) / 8 + 2 * SECONDS


def test_one_worker_alone_goes_on_after_each_loss() -> None:
    outcome = equal_chunks(50, 1, losses=0.1, restart=30.0)
    assert outcome.lost > 0
    assert outcome.seconds == pytest.approx(50 * SECONDS + outcome.lost * (SECONDS / 2 + 30.0), abs=POLL)


def test_units_that_kill_every_worker_end_it() -> None:
    with pytest.raises(InputError, match=f"took {LOSSES} workers with it"):
        equal_chunks(4, 2, losses=1.0)


def test_chunks_that_hang_in_the_last_round_are_given_to_one_more_worker_each() -> None:
    handed_out = Counter[int]()

    def seconds(indices: range) -> float:
        handed_out[indices.start] += 1
        hangs = indices.start in (93, 94) and handed_out[indices.start] == 1
        return 20 * SECONDS if hangs else 3 * SECONDS if indices.start == 94 else SECONDS

    outcome = simulate(chunk_ranges(95, 1), WorkerModel(workers=10, seconds=seconds))
    assert outcome.repeated == 2
    assert outcome.seconds == pytest.approx((9 + SLOW + 3) * SECONDS, abs=2 * POLL)


def test_numbers_are_made_beside_chunks_and_those_of_the_last_checkpoint_after_them() -> None:
    """10 workers, 10 checkpoints of 10 chunks: a round each, and one worker at the numbers of the checkpoint before."""
    model = WorkerModel(workers=10, seconds=lambda _: SECONDS, numbers=SECONDS)
    outcome = simulate(chunk_ranges(10, 1), model, checkpoints=10)
    assert outcome.sampling == pytest.approx(11 * SECONDS)  # 100 chunks and the numbers of 9 checkpoints
    assert outcome.busy == pytest.approx(109 / 110)
    assert outcome.seconds == pytest.approx(12 * SECONDS)
    alone = simulate(chunk_ranges(10, 1), replace(model, workers=1), checkpoints=10)
    assert alone.seconds == pytest.approx(110 * SECONDS)


def test_numbers_longer_than_a_chunk_are_not_taken_for_slow() -> None:
    model = WorkerModel(workers=10, seconds=lambda _: SECONDS, numbers=20 * SECONDS)
    outcome = simulate(chunk_ranges(10, 1), model, checkpoints=3)
    assert outcome.repeated == 0
    assert outcome.seconds == pytest.approx(24 * SECONDS)  # 10 + 9 + 8 chunks, 3 that are left, the last numbers


def test_busier_with_smaller_chunks_until_the_driver_is_the_limit() -> None:
    """The last round of large chunks leaves most workers idle; what the driver costs a chunk bounds the other side."""
    costs = RayCosts(submit=0.3, result=0.01, wait=0.01)

    def busy(size: int) -> float:
        model = WorkerModel(workers=512, seconds=lambda indices: 1.7 * len(indices), spread=0.02)
        return simulate(chunk_ranges(50_000, size), model, costs).busy

    large, small, smallest = busy(500), busy(50), busy(5)
    assert large <= 100 / 512 < small
    assert smallest < small


# CIFAR-10 is slow: its chunks are so short that the driver's CPU time counts, which a loaded machine makes longer.
@pytest.mark.parametrize(
    ("per_sample", "checkpoints", "size"),
    [(1.7, 1, 14), (1.7, 10, 98), pytest.param(0.042, 10, 98, marks=pytest.mark.slow)],
)
def test_512_workers_are_busy_for_95_percent_of_50000_samples(per_sample: float, checkpoints: int, size: int) -> None:
    """Seconds a sample of LSUN at 256x256, and of CIFAR-10, on an H100 used to 30 %; the driver's code costs what it costs
    here, Ray's calls more than was measured."""
    model = WorkerModel(workers=512, seconds=lambda indices: per_sample * len(indices), spread=0.02, numbers=80.0)
    costs = RayCosts(submit=400e-6, result=20e-6, wait=10e-6, wait_each=0.2e-6)
    outcome = simulate(chunk_ranges(50_000, size), model, costs, checkpoints=checkpoints, meter=time.process_time)
    assert outcome.busy >= 0.95
