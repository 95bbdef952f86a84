"""The shared candidates and the search over them: exact against every path, and near what information theory allows."""

import itertools
import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core.codec.trellis import Trellis, _book, exact_normal

LOG2 = math.log(2.0)


def targets(rows: int, n: int, length: float) -> Tensor:
    """Random directions, float64 [rows, n], of one length."""
    delta = rng.normal(0, "targets", torch.arange(rows), 0, (n,)).to(torch.float64)
    return delta * (length / delta.norm(dim=1, keepdim=True))


def log_weight(delta: Tensor, noise: Tensor, spread: float) -> Tensor:
    """log q(z)/p(z) for q = N(delta, I) and p = N(0, (1 + spread) I), but for constants."""
    return (0.5 * noise.square() / (1 + spread) - 0.5 * (noise - delta).square()).sum(-1)


@pytest.mark.parametrize(("n", "bits"), [(5, 3), (24, 4), (24, 9), (100, 9), (7, 11), (300, 5)])
def test_the_search_finds_the_likeliest_of_all_paths(n: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small window, so that paths longer than it can be tried one by one; long and wide blocks share places."""
    monkeypatch.setattr("ddpm_core.codec.trellis.WINDOW", 4)
    monkeypatch.setattr("ddpm_core.codec.trellis.ROWS", 16)
    monkeypatch.setattr("ddpm_core.codec.trellis.WIDEST", 8)
    _book.cache_clear()
    trellis = Trellis(3, 1, 2, n)
    block = torch.tensor([0, 1, 1])
    delta = targets(3, n, math.sqrt(2 * LOG2 * bits))
    every = torch.tensor(list(itertools.product([0, 1], repeat=bits)))
    best = [
        log_weight(row, trellis.noise(every, its.expand(len(every))), trellis.excess(bits)).max()
        for row, its in zip(delta, block, strict=True)
    ]
    best_noise = trellis.noise(trellis.search(delta, block, bits), block)
    torch.testing.assert_close(
        log_weight(delta, best_noise, trellis.excess(bits)), torch.stack(best), rtol=1e-12, atol=0
    )
    _book.cache_clear()


def test_candidates_are_independent_normals_of_p() -> None:
    """Across the dimensions of one candidate, and between candidates, blocks and steps."""
    n, bits = 4096, 300
    trellis = Trellis(0, 1, 2, n)
    paths = rng.integers(0, "paths", torch.arange(2 * bits), 0, 2).reshape(2, bits)
    one, other = trellis.noise(paths, torch.tensor([0, 0])) / math.sqrt(1 + trellis.excess(bits))
    elsewhere = trellis.noise(paths[:1], torch.tensor([1]))[0]
    later = Trellis(0, 2, 2, n).noise(paths[:1], torch.tensor([0]))[0]
    assert scipy.stats.kstest(one.numpy(), "norm").pvalue > 0.001
    assert scipy.stats.kstest(other.numpy(), "norm").pvalue > 0.001
    for same in (other, elsewhere, later):
        # Five standard errors of a correlation of n independent pairs.
        assert abs(float(torch.corrcoef(torch.stack([one, same]))[0, 1])) < 5 / math.sqrt(n)


def test_no_bits_still_give_noise() -> None:
    noise = Trellis(0, 1, 1, 3000).noise(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert scipy.stats.kstest(noise[0].numpy(), "norm").pvalue > 0.001
    assert len(noise[0].unique()) > 2900


def test_what_is_found_is_distributed_as_q_but_along_delta() -> None:
    """The bias of taking the likeliest: across delta the noise is q's; along it, it is short and does not vary."""
    n, bits, rows = 1024, 100, 8
    trellis = Trellis(0, 1, 1, n)
    length = math.sqrt(n * trellis.excess(bits))
    delta = targets(rows, n, length)
    block = torch.zeros(rows, dtype=torch.int64)
    noise = trellis.noise(trellis.search(delta, block, bits), block)
    direction = delta / length
    along = (noise * direction).sum(1)
    across = noise - along[:, None] * direction
    # rows * n squares of variance 2: five standard errors.
    assert float(across.square().sum() / (rows * (n - 1))) == pytest.approx(1.0, abs=5 * math.sqrt(2 / (rows * n)))
    assert scipy.stats.kstest(across.flatten().numpy(), "norm").pvalue > 0.001
    assert 0.90 < float(along.mean() / length) < 1.0
    assert float(along.std()) < 0.5  # 1 for draws from q


def test_a_trellis_gets_more_from_its_bits_than_blocks_searched_as_hard() -> None:
    """The share of delta's information, (delta.z)^2 / |delta|^4, that 112 bits carry: at once, or in 8 blocks of 14, each
    the likeliest of as many candidates as the trellis has windows."""
    n, bits, rows = 1024, 112, 6

    def share(n: int, bits: int, rows: int) -> float:
        trellis, block = Trellis(0, 1, 1, n), torch.zeros(rows, dtype=torch.int64)
        delta = targets(rows, n, math.sqrt(n * trellis.excess(bits)))
        noise = trellis.noise(trellis.search(delta, block, bits), block)
        return float(((noise * delta).sum(1) / delta.square().sum(1)).square().mean())

    assert share(n, bits, rows) > 0.90
    assert share(n // 8, bits // 8, 8 * rows) < 0.86


def test_normals_are_exact_multiples_and_normal() -> None:
    values = exact_normal(1, "test", 2, 100_001)
    assert torch.equal(values * 65536, (values * 65536).round())
    assert len(values) == 100_001
    assert scipy.stats.kstest(values.numpy(), "norm").pvalue > 0.001
    assert torch.equal(values[:1000], exact_normal(1, "test", 2, 1000))
