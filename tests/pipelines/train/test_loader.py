"""Which images a step gets, and that the loader hands out just these, ahead of time."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic_shards import random_pixels, write_dataset

from ddpm_core import rng
from ddpm_core.errors import InputError
from ddpm_core.training import Batch, OptimConfig
from ddpm_core.unet import UNetConfig
from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.order import BatchOrder, epoch_order, rank_slice
from pipelines.storage.locations import location
from pipelines.train import checks, loader
from pipelines.train.checks import check_shuffle
from pipelines.train.config import TrainConfig, config_for
from pipelines.train.loader import Loader, make_batch

GROUPS = st.lists(st.integers(1, 12), min_size=1, max_size=8).map(np.array)
WINDOWS = st.none() | st.integers(1, 60)


@given(GROUPS, st.integers(0, 5), st.integers(1, 25), WINDOWS)
def test_an_epoch_visits_every_image_once_for_any_groups_and_windows(
    groups: np.ndarray, seed: int, batch: int, window: int | None
) -> None:
    order, images = BatchOrder(groups), int(groups.sum())
    steps = -(-3 * images // batch)
    stream = np.concatenate([order.global_batch(seed, step, batch, window) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * images : (epoch + 1) * images]) == list(range(images))


@settings(deadline=None)
@given(GROUPS, st.integers(0, 5), st.integers(1, 25), WINDOWS, st.permutations(range(4)))
def test_a_batch_is_the_same_whatever_was_asked_for_before(
    groups: np.ndarray, seed: int, batch: int, window: int | None, steps: list[int]
) -> None:
    order = BatchOrder(groups)
    for step in steps:
        fresh = BatchOrder(groups).global_batch(seed, step, batch, window)
        assert (order.global_batch(seed, step, batch, window) == fresh).all()


def test_without_a_window_an_epoch_is_the_addressed_permutation() -> None:
    """Runs that are under way go on with the images that they would have had."""
    batches = [BatchOrder(np.array([40, 10])).global_batch(3, step, 20, None) for step in range(5)]
    stream = torch.cat([rng.permutation(3, "epoch", epoch, 50) for epoch in range(2)])
    assert (np.concatenate(batches) == stream.numpy()).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30).map(np.array), st.integers(0, 99), st.integers(1, 300))
def test_an_epoch_with_windows_is_in_few_row_groups_at_a_time(groups: np.ndarray, seed: int, window: int) -> None:
    """The groups that are begun and not finished hold less than a window and a group; at the end of an epoch, where what
    is left joins the last window, less than two windows and a group."""
    group_of = np.repeat(np.arange(len(groups)), groups)[epoch_order(groups, seed, 0, window)]
    largest, left = int(groups.max()), groups.tolist()
    held = 0
    for place, group in enumerate(group_of.tolist()):
        held += int(groups[group]) if left[group] == groups[group] else 0
        ending = len(group_of) - place < 2 * window + largest
        assert held < (2 if ending else 1) * window + largest
        left[group] -= 1
        held -= int(groups[group]) if left[group] == 0 else 0


def p_value(order_of: Callable[[int], np.ndarray], images: int, epochs: int) -> float:
    """Of the counts of (image, place) over epochs, against uniform ones, by Pearson's chi-square."""
    counts = np.zeros((images, images))
    for epoch in range(epochs):
        counts[order_of(epoch), np.arange(images)] += 1
    expected = epochs / images
    # Rows and columns have fixed sums: (n - 1)^2 degrees of freedom; the statistic of random permutations is smaller
    # than that of independent draws by the factor (n - 1) / n.
    statistic = ((counts - expected) ** 2 / expected).sum() * (images - 1) / images
    return float(scipy.stats.chi2.sf(statistic, (images - 1) ** 2))


@pytest.mark.parametrize("window", [None, 12, 100])
def test_every_image_comes_at_every_place_of_an_epoch_equally_often(window: int | None) -> None:
    """False alarms: 1 in 10,000 for each of the three, with seeds drawn anew; this one is fixed."""
    groups = np.array([4, 4, 4, 4, 4, 4])  # equal groups: then windows are uniform over epochs as well
    assert p_value(lambda epoch: epoch_order(groups, 11, epoch, window), 24, 1500) > 1e-4


def test_the_order_within_a_window_is_uniform() -> None:
    """Given which groups share the first window, all orders of its four images are equally likely: 24 of them, over 2,400
    epochs. False alarms: 1 in 10,000."""
    groups = np.array([2, 2, 2, 2])
    counts = np.zeros(24)
    for epoch in range(2400):
        first = epoch_order(groups, 5, epoch, 4)[:4]
        assert len(set((first // 2).tolist())) == 2  # two groups make a window
        ranks = np.argsort(np.argsort(first))
        counts[int(sum(np.sum(ranks[i + 1 :] < ranks[i]) * math.factorial(3 - i) for i in range(4)))] += 1
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_what_is_left_at_the_end_of_an_epoch_joins_the_last_window() -> None:
    """Groups of 3, 3 and 1 images, windows of 3: the single image is the epoch's last where it is in the last window and
    the last of four there, 2/3 * 1/4. As a window of its own it would be so in 5/12. False alarms: 1 in 10,000."""
    last = sum(int(epoch_order(np.array([3, 3, 1]), 8, epoch, 3)[-1]) == 6 for epoch in range(600))
    assert scipy.stats.binomtest(last, 600, 1 / 6).pvalue > 1e-4


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = BatchOrder(np.array([10] * 5))
    for window in (None, 20):
        assert len({tuple(order.global_batch(seed, step, 50, window)) for seed in range(3) for step in range(3)}) == 9


@given(st.integers(1, 100), st.sampled_from([1, 2, 4, 7]) | st.integers(1, 12))
def test_the_workers_shares_are_the_whole_batch_in_order(batch: int, workers: int) -> None:
    shares = [list(range(batch))[rank_slice(batch, rank, workers)] for rank in range(workers)]
    assert [index for share in shares for index in share] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


SHAPE = (8, 8, 1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return write_dataset(tmp_path_factory.mktemp("loading") / "set", random_pixels(50, SHAPE), [20, 20, 10])


def config(**changes: Any) -> TrainConfig:
    network = UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    values = {
        "shards": "unused",
        "unet": network,
        "optim": OptimConfig(batch_size=14),
        "horizontal_flip": True,
        "steps": 9,
    }
    return config_for("tiny", **{**values, **changes})


def new_loader(run: TrainConfig, dataset: ShardedDataset, rank: int = 0, world_size: int = 1, **more: Any) -> Loader:
    return Loader(run, dataset, rank=rank, world_size=world_size, device=torch.device("cpu"), **more)


@pytest.mark.parametrize("window", [None, 25])
def test_the_union_of_the_workers_shares_is_the_global_batch(dataset: ShardedDataset, window: int | None) -> None:
    run = config(shuffle_window=window)
    for step in (0, 3, 8):
        whole = make_batch(run, dataset, step, 0, 1)
        indices = dataset.global_batch(run.seed, step, 14, window)
        unflipped = dataset.images(indices)
        same = (whole.x_start == unflipped).flatten(1).all(1)
        mirrored = (whole.x_start == unflipped.flip(3)).flatten(1).all(1)
        assert (same ^ mirrored).all()
        for workers in (2, 4, 7):
            shares = [make_batch(run, dataset, step, rank, workers) for rank in range(workers)]
            for name in ("x_start", "t", "noise"):
                assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))


@pytest.mark.parametrize("depth", [1, 2, 5, 30])
@pytest.mark.parametrize(("rank", "world_size", "first_step"), [(0, 1, 0), (1, 3, 4)])
def test_the_loader_hands_out_the_batch_of_every_step_in_order(
    dataset: ShardedDataset, depth: int, rank: int, world_size: int, first_step: int
) -> None:
    run = config(shuffle_window=25)
    with new_loader(run, dataset, rank, world_size, first_step=first_step, depth=depth) as batches:
        handed_out = list(batches)
    assert len(handed_out) == 9 - first_step
    for step, batch in enumerate(handed_out, first_step):
        wanted = make_batch(run, dataset, step, rank, world_size)
        for name in ("x_start", "t", "noise"):
            assert torch.equal(getattr(batch, name), getattr(wanted, name))


def test_the_loader_leaves_the_global_generator_alone(dataset: ShardedDataset) -> None:
    before = torch.get_rng_state()
    with new_loader(config(), dataset) as batches:
        list(batches)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose batches were begun."""
    steps: list[int] = []
    inner = loader.make_batch

    def record(run: TrainConfig, dataset: ShardedDataset, step: int, rank: int, world_size: int) -> Batch:
        steps.append(step)
        return inner(run, dataset, step, rank, world_size)

    monkeypatch.setattr(loader, "make_batch", record)
    return steps


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_batches_are_made_ahead_but_no_further_than_the_depth(dataset: ShardedDataset, made: list[int]) -> None:
    with new_loader(config(), dataset, depth=3) as batches:
        until(lambda: sorted(made) == [0, 1, 2])
        time.sleep(0.1)
        assert sorted(made) == [0, 1, 2]
        next(batches)
        until(lambda: sorted(made) == [0, 1, 2, 3])


def test_the_time_spent_waiting_is_measured(dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = loader.make_batch

    def slow(*arguments: Any) -> Batch:
        time.sleep(0.3)
        return inner(*arguments)

    with new_loader(config(), dataset) as batches:
        time.sleep(0.5)
        next(batches)
        assert batches.seconds_waited < 0.1
    monkeypatch.setattr(loader, "make_batch", slow)
    with new_loader(config(), dataset) as batches:
        next(batches)
        assert batches.seconds_waited > 0.2


def test_an_error_in_a_thread_is_raised_where_its_batch_is_asked_for(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", random_pixels(50, SHAPE), [20, 20, 10])
    (tmp_path / "set" / "shard-00001.parquet").write_bytes(b"damaged")
    one = config(optim=OptimConfig(batch_size=1), steps=50)
    first = next(step for step in range(50) if dataset.global_batch(0, step, 1)[0] in dataset.shard_range(1))
    assert first > 0
    with new_loader(one, dataset, depth=8) as batches:
        for _ in range(first):
            next(batches)
        with pytest.raises(InputError, match=r"damaged file 'shard-00001\.parquet'"):
            next(batches)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_close_ends_the_threads_without_waiting_for_slow_reads(
    dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    until(lambda: not threads())
    blocked, begun = threading.Event(), threading.Semaphore(0)

    def stuck(*arguments: Any) -> Batch:
        begun.release()
        blocked.wait(timeout=10)
        raise OSError("nobody wants to know")

    monkeypatch.setattr(loader, "make_batch", stuck)
    batches = new_loader(config(steps=100), dataset, depth=2)
    for _ in range(2):
        assert begun.acquire(timeout=10)
    assert len(threads()) == 2
    started = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - started < 1
    blocked.set()
    until(lambda: not threads())
    assert not begun.acquire(timeout=0.1)  # nothing more was begun


def test_an_early_end_of_the_loop_leaves_no_threads(dataset: ShardedDataset) -> None:
    with pytest.raises(KeyError), new_loader(config(), dataset) as batches:  # noqa: PT012
        next(batches)
        raise KeyError
    until(lambda: not threads())


def test_windows_on_an_object_store_read_each_row_group_once_an_epoch(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = location(f"{s3_bucket}/{tmp_path.name}", option="--shards")
    shape, counts = (128, 128, 3), [20] * 8  # row groups of 20 images
    dataset = write_dataset(place, random_pixels(160, shape), counts)
    cache = dataset._reader._cache
    reads: list[int] = []
    inner = cache._read

    def read(group: int) -> np.ndarray:
        reads.append(group)
        return inner(group)

    monkeypatch.setattr(cache, "_read", read)
    monkeypatch.setattr(cache, "_limit", 4 * 20 * 128 * 128 * 3)  # two windows of two groups
    run = config(shuffle_window=40, optim=OptimConfig(batch_size=8), steps=20)
    with new_loader(run, dataset) as batches:
        for step, batch in enumerate(batches):
            assert torch.equal(batch.t, make_batch(run, dataset, step, 0, 1).t)
    assert sorted(reads) == list(range(8))
    reads.clear()
    for step in range(20):
        dataset.pixels(dataset.global_batch(0, step, 8))
    assert len(reads) > 40  # without windows, they are read again and again


def test_a_shuffle_that_would_read_a_row_group_for_every_image_is_refused(
    dataset: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats = write_dataset(tmp_path / "set", random_pixels(50, SHAPE), [50], "float32")
    check_shuffle(config(), floats)  # small enough to be kept
    monkeypatch.setattr(checks, "CACHE_BYTES", 64 * 40)
    check_shuffle(config(), dataset)  # local, 8-bit: any image can be read alone
    check_shuffle(config(shuffle_window=20), floats)
    for window in (None, 21):
        with pytest.raises(InputError, match=rf"--shuffle-window is {window} for .*: give at most 20, or"):
            check_shuffle(config(shuffle_window=window), floats)


def test_a_window_is_part_of_what_decides_a_run_and_its_absence_is_not() -> None:
    assert "shuffle_window" not in config().identity("x")
    assert config(shuffle_window=7).identity("x") == {**config().identity("x"), "shuffle_window": 7}
    with pytest.raises(InputError, match="--shuffle-window is 0"):
        config(shuffle_window=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("resident", [True, False])
def test_on_cuda_images_t_and_flips_are_equal_and_noise_to_rounding(
    dataset: ShardedDataset, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resident:
        monkeypatch.setattr(loader, "RESIDENT_BYTES", 0)
    device = torch.device("cuda:0")
    with Loader(config(), dataset, rank=1, world_size=2, device=device) as batches:
        for step, batch in enumerate(batches):
            wanted = make_batch(config(), dataset, step, 1, 2)
            assert torch.equal(batch.x_start.cpu(), wanted.x_start)
            assert torch.equal(batch.t.cpu(), wanted.t)
            # log, cos and sin of two libraries, a few units in the last place of numbers up to 6.8
            torch.testing.assert_close(batch.noise.cpu(), wanted.noise, rtol=1e-5, atol=1e-5)
    assert (batches._resident is not None) == resident
