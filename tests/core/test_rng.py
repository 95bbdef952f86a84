"""Addressed randomness: the published Philox, the same numbers for the same address wherever it is drawn, and laws of chance."""

import math
import subprocess
import sys

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gaussian_case import unchecked

from ddpm_core import rng

WORD = st.integers(0, 2**32 - 1)


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, after the paper's figure."""
    x, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(right >> 32) ^ x[1] ^ k[0], right % 2**32, (left >> 32) ^ x[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(x)


def ours(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    a, b, c, d = (torch.tensor(word) for word in counter)
    keys = rng.key_schedule((key[0], key[1]))
    return tuple(int(word) for word in rng.philox4x32((a, b, c, d), keys))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert ours(counter, key) == expected
    assert philox(counter, key) == expected


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
@settings(max_examples=200, deadline=None)
def test_philox_equals_plain_integer_arithmetic(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert ours(counter, key) == philox(counter, key)


@given(seed=st.integers(0, 2**63), index=st.integers(0, 2**40), step=st.integers(0, 2**31), block=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_bits_are_philox_at_the_address(seed: int, index: int, step: int, block: int) -> None:
    words = rng.bits(seed, "noise", torch.tensor([index]), step, 6)[0, 4 * block : 4 * block + 4]
    address = (block, step, index % 2**32, index >> 32)
    assert tuple(words.tolist()) == philox(address, rng.derive_key(seed, "noise"))


@given(
    indices=st.lists(st.integers(0, 2**33), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_an_items_numbers_do_not_depend_on_batch_or_order(indices: list[int], cut: int, shuffle: object) -> None:
    def draw(some: list[int]) -> dict[int, list[float]]:
        if not some:
            return {}
        rows = rng.normal(3, "sample", torch.tensor(some), 7, (3, 5, 2))
        return {index: row.flatten().tolist() for index, row in zip(some, rows, strict=True)}

    shuffled = list(indices)
    shuffle.shuffle(shuffled)  # type: ignore[attr-defined]
    assert draw(indices) == {**draw(shuffled[:cut]), **draw(shuffled[cut:])}  # bit for bit


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    long = rng.normal(0, "sample", torch.tensor([4]), 2, (100,))
    for size in (1, 2, 3, 5, 98):
        assert torch.equal(rng.normal(0, "sample", torch.tensor([4]), 2, (size,)), long[:, :size])


GOLDEN = """
import torch
from ddpm_core import rng
indices = torch.tensor([31337, 0, 2**35])
print(rng.bits(7, "sample", indices, 999, 1).tolist())
print(rng.normal(7, "sample", indices, 999, (2,)).tolist())
print(rng.integers(7, "t", indices, 0, 1000).tolist(), rng.coins(7, "flip", indices, 0).tolist())
print(rng.permutation(7, "order", 1, 10).tolist(), rng.derive_seed(7, "dropout", 3, 1))
"""


def test_another_process_draws_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    exec(GOLDEN, {})
    here = capsys.readouterr().out
    there = subprocess.run(
        [sys.executable, "-c", GOLDEN], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert here == there


def test_streams_never_change() -> None:
    """Golden values: a change here changes every published sample and every resumed run. Keys by hashlib, bits by the plain
    Philox above."""
    assert rng.derive_key(0, "noise") == (0x5F2971FF, 0xC8F53DBE)
    assert rng.derive_seed(0, "weights") == 6_475_904_748_445_805_001
    assert rng.derive_seed(7, "dropout", 3, 1) == 5_477_448_911_035_046_011
    assert rng.integers(7, "t", torch.tensor([31_337, 0]), 0, 1000).tolist() == [613, 215]
    assert rng.permutation(7, "order", 1, 10).tolist() == [7, 2, 5, 3, 8, 6, 4, 9, 0, 1]


def test_addresses_that_differ_anywhere_draw_different_numbers() -> None:
    i = torch.tensor([5])
    draws = {
        "here": rng.bits(1, "a", i, 2, 1),
        "seed": rng.bits(2, "a", i, 2, 1),
        "purpose": rng.bits(1, "b", i, 2, 1),
        "step": rng.bits(1, "a", i, 3, 1),
        "index": rng.bits(1, "a", i + 1, 2, 1),
        "high index": rng.bits(1, "a", i + 2**32, 2, 1),
        "high step": rng.bits(1, "a", i, 2 + 2**16, 1),
        "index and step swapped": rng.bits(1, "a", torch.tensor([2]), 5, 1),
        "seed and purpose shifted": rng.bits(1, "1a", i, 2, 1),
    }
    assert len({tuple(words[0].tolist()) for words in draws.values()}) == len(draws)
    seeds = [
        rng.derive_seed(1, "a"),
        rng.derive_seed(1, "a", 2),
        rng.derive_seed(1, "a", 2, 3),
        rng.derive_seed(12, "a", 3),
    ]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_normals_are_standard_and_independent() -> None:
    """200,000 numbers; every bound is five standard errors, a false alarm in two million seeds, and the seed is fixed."""
    x = rng.normal(11, "sample", torch.arange(1000), 0, (200,)).double()
    n = x.numel()
    assert float(x.mean()) == pytest.approx(0, abs=5 / math.sqrt(n))
    assert float(x.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert float((x**3).mean()) == pytest.approx(0, abs=5 * math.sqrt(15 / n))
    assert float((x**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / n))
    assert scipy.stats.kstest(x.flatten().numpy(), scipy.stats.norm.cdf).pvalue > 1e-6
    # Neighbours: the pair of one Box-Muller draw, the next block, the next index, and squares of them.
    for a, b in [(x[:, :-1], x[:, 1:]), (x[:, :-4], x[:, 4:]), (x[:-1], x[1:])]:
        m = a.numel()
        assert float((a * b).mean()) == pytest.approx(0, abs=5 / math.sqrt(m))
        assert float(((a**2 - 1) * (b**2 - 1)).mean()) == pytest.approx(0, abs=5 * 2 / math.sqrt(m))


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 129, 2**32 - 1])
def test_normals_stay_finite_at_the_ends_of_the_range(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "philox4x32", lambda counter, keys: tuple(torch.full((1, 2), word) for _ in range(4)))
    x = rng.normal(0, "sample", torch.tensor([0]), 0, (8,))
    assert bool(x.isfinite().all())
    assert float(x.abs().max()) < 6.8


def test_integers_and_coins_are_uniform() -> None:
    """Chi-squared tests at 1e-6."""
    indices = torch.arange(100_000)
    counts = torch.bincount(rng.integers(1, "t", indices, 0, 50), minlength=50)
    assert len(counts) == 50
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-6
    heads = int(rng.coins(1, "flip", indices, 0).sum())
    assert scipy.stats.binomtest(heads, 100_000).pvalue > 1e-6


@pytest.mark.parametrize("high", [1, 2, 1000, 2**31])
def test_integers_lie_below_their_bound(high: int) -> None:
    drawn = rng.integers(0, "t", torch.arange(5000), 0, high)
    assert drawn.dtype == torch.int64
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < high
    if high == 2:
        assert set(drawn.tolist()) == {0, 1}


@given(size=st.integers(0, 300), step=st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_a_permutation_holds_each_number_once(size: int, step: int) -> None:
    assert sorted(rng.permutation(3, "order", step, size).tolist()) == list(range(size))


def test_permutations_are_uniform_and_differ_by_epoch() -> None:
    """All 24 orders of four things over 720 epochs: chi-squared at 1e-6."""
    orders = [tuple(rng.permutation(0, "order", epoch, 4).tolist()) for epoch in range(720)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 1e-6


def test_sample_noise_is_the_noise_of_its_indices_and_the_address() -> None:
    indices = torch.tensor([31_337, 4])
    noise = rng.SampleNoise(seed=7, indices=indices, shape=(3, 2, 2))
    assert torch.equal(noise(1000), rng.normal(7, "sample", indices, 1000, (3, 2, 2)))
    alone = rng.SampleNoise(seed=7, indices=indices[:1], shape=(3, 2, 2))
    assert torch.equal(alone(17)[0], noise(17)[0])
    assert not torch.equal(noise(17), noise(18))
    assert noise(17).dtype == torch.float32


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rng.normal(0, "sample", torch.arange(3), 0, (4,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(rng.normal(0, "sample", torch.arange(3), 0, (4,)), first)


def test_a_compiled_draw_is_one_graph_for_all_streams_steps_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without a break and run operator by operator, so that even the normals are equal to the bit."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(rng._normals, fullgraph=True, dynamic=True, backend=counter)
    monkeypatch.setattr(rng, "_compiled_normals", lambda: graph)
    for seed, purpose, step, count, shape in [(0, "sample", 999, 4, (3, 8, 8)), (7, "report", 500, 3, (1, 6, 6))]:
        indices = torch.arange(31_337, 31_337 + count)
        with unchecked():
            drawn = rng.normal(seed, purpose, indices, step, shape, compiled=True)
        assert torch.equal(drawn, rng.normal(seed, purpose, indices, step, shape))
    assert counter.frame_count == 1
