"""Dropout by address: the same units for every split of a batch, at the rate asked for, without a pattern.

The statistical tests are deterministic for their seeds; each states how often fair coins would fail it.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddpm_core.dropout import addressed_dropout, dropout_keys

SHAPE = (64, 32, 32)
UNITS = math.prod(SHAPE)


def dropped(images: int, layer: int = 0, *, first: int = 0, seed: int = 0, p: float = 0.5) -> Tensor:
    """float64 [images, UNITS], +1 where a unit fell, -1 where not."""
    keys = dropout_keys(seed, torch.arange(first, first + images), 3)[:, layer]
    fell = addressed_dropout(torch.ones(images, *SHAPE), p, keys) == 0
    return fell.flatten(1).to(torch.float64) * 2 - 1


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_the_rate_is_the_one_asked_for(p: float) -> None:
    fell = (dropped(32, p=p) + 1) / 2
    nearest = round(p * 65536) / 65536
    n = fell.numel()
    # 5 standard deviations: fair coins fail 6 times in 10^7. And each image's rate at 6: 2 in 10^9 an image.
    assert abs(fell.mean().item() - nearest) < 5 * math.sqrt(p * (1 - p) / n)
    assert float((fell.mean(1) - nearest).abs().max()) < 6 * math.sqrt(p * (1 - p) / UNITS)
    # Rates of images vary as coins': the variance over 32 of them, chi-squared, within 5 of its standard deviations.
    variance = float(fell.mean(1).var()) / (p * (1 - p) / UNITS)
    assert abs(variance - 1) < 5 * math.sqrt(2 / 31)


def test_at_the_largest_rate_one_unit_in_65536_stays() -> None:
    keys = dropout_keys(0, torch.arange(1), 1)[:, 0]
    stays = int((addressed_dropout(torch.ones(1, 1, 1024, 1024), 0.99999, keys) != 0).sum())
    assert 4 <= stays <= 28  # 16 on average, by chance within three deviations


def test_units_that_stay_are_scaled_so_that_the_mean_stays() -> None:
    keys = dropout_keys(0, torch.arange(4), 1)[:, 0]
    out = addressed_dropout(torch.full((4, *SHAPE), 3.0), 0.1, keys)
    assert out.unique().tolist() == pytest.approx([0.0, 3.0 / (1 - 6554 / 65536)])


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two arrays of +-1 with mean 0, in standard deviations of its own."""
    return float((a * b).sum()) / math.sqrt(a.numel())


def test_images_layers_steps_and_seeds_fall_independently() -> None:
    """28 pairs of images, and an image's layers, its next steps (a step is a batch further along the stream) and another
    seed's: |z| < 5 for each, which fair coins fail in 6 of 10^7."""
    images = dropped(8)
    pairs = [(images[i], images[j]) for i in range(8) for j in range(i)]
    pairs += [(images, dropped(8, layer)) for layer in (1, 2)]
    pairs += [(images, dropped(8, first=first)) for first in (8, 128, 1 << 16, 1 << 32)]
    pairs += [(images, dropped(8, seed=1))]
    assert max(abs(correlation(a, b)) for a, b in pairs) < 5


def test_neighbouring_units_fall_independently() -> None:
    """Neighbours at every distance to 64, a row, and powers of two further, within one image: |z| < 5.5 for each of 76
    distances, which fair coins fail in 3 of 10^6. One hash decides units 2k and 2k + 1: those pairs apart, too."""
    units = dropped(32)
    distances = [*range(1, 65), *(1 << k for k in range(7, 16)), 1000, 1023, 1025]
    assert max(abs(correlation(units[:, :-d], units[:, d:])) for d in distances) < 5.5
    assert abs(correlation(units[:, 0::2], units[:, 1::2])) < 5
    # Groups of eight neighbours take their 256 patterns alike: chi-squared with 255 degrees, 5 standard deviations.
    patterns = ((units.reshape(-1, 8) > 0).long() * (1 << torch.arange(8))).sum(1).bincount(minlength=256)
    expected = patterns.sum().item() / 256
    chi = float(((patterns - expected) ** 2 / expected).sum())
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_a_unit_falls_as_often_as_another_over_images() -> None:
    """2,000 images, each unit's count binomial: the chi-squared over units within 5 standard deviations. A hash whose units
    do not mix with the key would make some units fall always or never together."""
    keys = dropout_keys(0, torch.arange(2000), 1)[:, 0]
    fell = (addressed_dropout(torch.ones(2000, 2, 16, 16), 0.1, keys) == 0).double().flatten(1)
    q = 6554 / 65536
    chi = float(((fell.sum(0) - 2000 * q) ** 2 / (2000 * q * (1 - q))).sum())
    assert abs(chi - 512) < 5 * math.sqrt(2 * 512)
    # And pairs of units over images: the largest of 512 * 511 / 2 correlations, |z| < 6.5: 1 in 10^5.
    z = (fell - q) / math.sqrt(q * (1 - q))
    pairs = (z.T @ z / math.sqrt(2000)).triu(1)
    assert float(pairs.abs().max()) < 6.5


def test_any_split_of_a_batch_drops_the_same_units() -> None:
    h = torch.randn(6, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = addressed_dropout(h, 0.3, dropout_keys(7, torch.arange(100, 106), 5)[:, 2])
    for cuts in ([0, 2, 6], [0, 1, 2, 3, 4, 5, 6]):
        parts = [
            addressed_dropout(h[a:b], 0.3, dropout_keys(7, torch.arange(100 + a, 100 + b), 5)[:, 2])
            for a, b in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_memory_format_precision_and_the_global_generator_play_no_part() -> None:
    h = torch.randn(3, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    keys = dropout_keys(0, torch.arange(3), 1)[:, 0]
    before = torch.get_rng_state()
    out = addressed_dropout(h, 0.5, keys)
    assert torch.equal(torch.get_rng_state(), before)
    last = addressed_dropout(h.to(memory_format=torch.channels_last), 0.5, keys)
    assert torch.equal(last, out)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(addressed_dropout(h.bfloat16(), 0.5, keys) == 0, out == 0)


def test_the_gradient_falls_with_the_units() -> None:
    h = torch.randn(2, 32, 4, 4, dtype=torch.float64, requires_grad=True)
    keys = dropout_keys(0, torch.arange(2), 1)[:, 0]
    addressed_dropout(h, 0.25, keys).sum().backward()
    assert h.grad is not None
    assert h.grad.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
