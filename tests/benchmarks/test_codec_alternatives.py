"""Bits that three ways of sending a sample of q = N(delta, I) spend, over the KL: why ddpm_core.codec searches a trellis."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ddpm_core import rng
from ddpm_core.codec.trellis import Trellis

pytestmark = pytest.mark.bench


def poisson_functional(kl_bits: float, blocks: int = 200, candidates: int = 1 << 18) -> float:
    """Li & El Gamal 2018: the candidate with the least arrival time over weight; its number by their Zipf law."""
    generator = np.random.default_rng(0)
    length, power = math.sqrt(2 * kl_bits * math.log(2)), 1 + 1 / (kl_bits + 1)
    normaliser = sum(i**-power for i in range(1, 1 << 18)) + (1 << 18) ** (1 - power) / (power - 1)
    spent = []
    for _ in range(blocks):
        log_weight = length * generator.standard_normal(candidates)
        arrival = np.cumsum(generator.exponential(size=candidates))
        number = int(np.argmin(np.log(arrival) - log_weight)) + 1
        spent.append(power * math.log2(number) + math.log2(normaliser))
    return float(np.mean(spent)) / kl_bits


def dithered(kl_bits: float, draws: int = 20_000) -> float:
    """Uniform quantisation with shared dither, its width drawn so that the error is normal: a normal is a uniform on [-S, S]
    with S^2 of chi-square with 3 degrees. The entropy of the index, over log2(1 + r) / 2, a dimension."""
    generator = np.random.default_rng(0)
    spread = math.sqrt(2 ** (2 * kl_bits) - 1)
    width, shift = 2 * np.sqrt(generator.chisquare(3, draws)) / spread, generator.random(draws)
    index = np.arange(-40, 41)[:, None]
    chance = norm.cdf(width * (index + 1 - shift)) - norm.cdf(width * (index - shift))
    return float(-(chance * np.log2(np.maximum(chance, 1e-300))).sum(0).mean()) / kl_bits


def trellis(bits: int, n: int = 3072, rows: int = 4) -> float:
    """Bits over the information, |projection on delta|^2 / (2 ln 2) at low rates, that the chosen candidate carries."""
    search, block = Trellis(0, 1, 1, n), torch.zeros(rows, dtype=torch.int64)
    delta = rng.normal(0, "delta", torch.arange(rows), 0, (n,)).to(torch.float64)
    delta *= math.sqrt(n * search.excess(bits)) / delta.norm(dim=1, keepdim=True)
    noise = search.noise(search.search(delta, block, bits), block)
    share = (noise * delta).sum(1) / delta.square().sum(1)
    return 1 / float(share.square().mean())


def test_a_trellis_spends_least() -> None:
    poisson, dither = poisson_functional(8), {kl: dithered(kl) for kl in (0.01, 0.05, 0.1)}
    paths = {bits: trellis(bits) for bits in (20, 60, 120, 400)}
    print(f"\nPoisson functional representation, blocks of 8 bits: {poisson:.2f} times the KL")
    print("dithered quantisation:", ", ".join(f"{kl} bits/dim {ratio:.1f}" for kl, ratio in dither.items()))
    print("trellis over 3,072 dimensions:", ", ".join(f"{bits} bits {ratio:.2f}" for bits, ratio in paths.items()))
    assert max(paths.values()) < poisson < min(dither.values())
