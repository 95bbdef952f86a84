"""The variational bound against closed forms, and its cheap estimate against the full loop.

For x_0 ~ N(0, s^2) every quantity is known. Write v_t = abar_t s^2 + 1 - abar_t for the variance of x_t. Then
E[x_0|x_t] = sqrt(abar_t) s^2/v_t x_t with mean square error D_t = s^2 (1-abar_t)/v_t, and x_{t-1}|x_t is Gaussian with
mean sqrt(alpha_t) v_{t-1}/v_t x_t and variance w_t = v_{t-1} beta_t/v_t. With the optimal network and a variance
sigma^2 the expected term of Eq. 5 is

    E KL(q(x_{t-1}|x_t,x_0) || N(mean, sigma^2)) = (ln(sigma^2/beta~_t) - 1 + w_t/sigma^2) / 2,

since the KL's mean part has expectation w_t - beta~_t (law of total variance). With sigma^2 = w_t, the reverse process
is exact and the rate telescopes: L_T + L_{T-1} + .. + L_t = I(x_0; x_t) + KL(q(x_T) || N(0, 1))
= ln(v_t/(1-abar_t))/2 + (v_T - 1 - ln v_T)/2.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from support.gaussian_case import GaussianData, unchecked
from torch import Tensor

from ddpm_core.configs import Cdf, MeanType, Schedule, VarType
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.likelihood import (
    Bound,
    BoundEstimate,
    bound_term,
    estimate_bound,
    rate_distortion,
    stratify,
    variational_bound,
)
from ddpm_core.rng import SampleNoise
from ddpm_core.schedules import make_betas

Array = NDArray[np.float64]


class ClosedForm(NamedTuple):
    """The process of N(0, s^2) data, float64 [T] each, in numpy from the betas alone."""

    beta: Array
    abar: Array
    tilde: Array  # beta~_t; at t = 0 that of t = 1, as in the released code
    v: Array
    v_prev: Array
    w: Array
    mse: Array


def closed_form(betas: Tensor, s2: float) -> ClosedForm:
    beta = betas.numpy()
    abar = np.cumprod(1 - beta)
    previous = np.concatenate([[1.0], abar[:-1]])
    v, v_prev = abar * s2 + 1 - abar, previous * s2 + 1 - previous
    tilde = beta * (1 - previous) / (1 - abar)
    tilde[0] = tilde[1]
    return ClosedForm(beta, abar, tilde, v, v_prev, v_prev * beta / v, s2 * (1 - abar) / v)


def optimal_network(diffusion: GaussianDiffusion, s2: float) -> DenoiseFn:
    """The network with the least loss on N(0, s^2) data, for the parameterisation and variance of `diffusion`."""
    form = closed_form(diffusion.betas, s2)
    if diffusion.var_type.startswith("fixed"):
        return GaussianData(diffusion.betas, s2).predictor(diffusion.mean_type)
    log_w, low, high = np.log(form.w), np.log(form.tilde), np.log(form.beta)
    # learned_range: Nichol & Dhariwal 2021, Eq. 15, solved for the network's output in [-1, 1].
    extra = log_w if diffusion.var_type == "learned" else 2 * (log_w - low) / (high - low) - 1
    return GaussianData(diffusion.betas, s2).predictor(diffusion.mean_type, lambda t: float(extra[t]))


def zero_network(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)


def four_points(s: float) -> tuple[Tensor, Callable[[int], Tensor]]:
    """One image and noise whose four pixels have the first two moments of x_0 ~ N(0, s^2), eps ~ N(0, 1) exactly: terms
    that are quadratic in (x_0, eps), as all but L_0 are, then equal their expectations without sampling."""
    x_start = s * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    return x_start, lambda address: noise


def process(betas: Tensor, mean_type: MeanType = "eps", var_type: VarType = "fixedlarge") -> GaussianDiffusion:
    return GaussianDiffusion(betas, mean_type, var_type, "mse" if var_type.startswith("fixed") else "kl")


SCHEDULES: list[Schedule] = ["linear", "quad", "const", "warmup50", "jsd", "cosine"]
MEANS: list[MeanType] = ["eps", "xstart", "xprev", "v"]
VARIANCES: list[VarType] = ["fixedlarge", "fixedsmall", "learned", "learned_range"]


@pytest.mark.parametrize(
    ("schedule", "mean_type"),
    # jsd ends at abar 0, where eps does not determine x_0.
    [(schedule, mean) for schedule in SCHEDULES for mean in MEANS if (schedule, mean) != ("jsd", "eps")],
)
@pytest.mark.parametrize("var_type", VARIANCES)
def test_bound_of_gaussian_data_has_its_closed_form(schedule: Schedule, mean_type: MeanType, var_type: VarType) -> None:
    s2 = 0.25
    betas = make_betas(schedule, 40, beta_end=0.3)
    diffusion = process(betas, mean_type, var_type)
    x_start, noise = four_points(math.sqrt(s2))
    bound = variational_bound(diffusion, optimal_network(diffusion, s2), x_start, noise, clip_denoised=False)

    form = closed_form(betas, s2)
    sigma2 = {"fixedlarge": form.beta, "fixedsmall": form.tilde}.get(var_type, form.w)
    terms = 0.5 * (np.log(sigma2 / form.tilde) - 1 + form.w / sigma2) / math.log(2)
    # float64; eps at abar 1e-6 (cosine) loses three digits of the predicted x_0.
    np.testing.assert_allclose(bound.terms[0, 1:], terms[1:], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bound.mse[0], form.mse, rtol=1e-9)
    prior = 0.5 * (-np.log1p(-form.abar[-1]) - 1 + form.v[-1]) / math.log(2)
    np.testing.assert_allclose(bound.prior[0], prior, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(bound.total[0], bound.terms[0, 0] + terms[1:].sum() + prior, rtol=1e-9)
    curve = rate_distortion(bound)
    np.testing.assert_allclose(curve.distortion, 127.5 * np.sqrt(form.mse), rtol=1e-9)
    rates = prior + np.append(np.cumsum(terms[:0:-1])[::-1], 0.0)
    np.testing.assert_allclose(curve.rate, rates, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("var_type", ["learned", "learned_range"])
def test_rate_with_the_exact_reverse_variance_is_the_information_in_x_t(schedule: Schedule, var_type: VarType) -> None:
    s2 = 0.3359477124183007
    betas = make_betas(schedule, 40, beta_end=0.3)
    diffusion = process(betas, "v", var_type)
    x_start, noise = four_points(math.sqrt(s2))
    bound = variational_bound(diffusion, optimal_network(diffusion, s2), x_start, noise, clip_denoised=False)
    form = closed_form(betas, s2)
    information = 0.5 * np.log(form.v / (1 - form.abar))
    mismatch = 0.5 * (form.v[-1] - 1 - math.log(form.v[-1]))
    # Sums of 40 float64 terms.
    np.testing.assert_allclose(
        rate_distortion(bound).rate, (information + mismatch) / math.log(2), rtol=1e-9, atol=1e-13
    )


def test_bound_of_a_strided_chain_is_that_of_its_own_schedule() -> None:
    s2, timesteps = 0.25, list(range(4, 200, 15))
    full = process(make_betas("linear", 200, beta_end=0.1), "eps", "fixedsmall")
    network = optimal_network(full, s2)
    x_start, noise = four_points(math.sqrt(s2))
    bound = variational_bound(full.strided(timesteps), network, x_start, noise, clip_denoised=False)
    abar = np.cumprod(1 - full.betas.numpy())[timesteps]
    form = closed_form(torch.from_numpy(1 - abar / np.append(1.0, abar[:-1])), s2)
    terms = 0.5 * (form.w / form.tilde - 1) / math.log(2)
    np.testing.assert_allclose(bound.terms[0, 1:], terms[1:], rtol=1e-9)


@pytest.mark.parametrize(("var_type", "bits"), [("fixedlarge", 13.99148315485079), ("fixedsmall", 14.67291963241193)])
def test_zero_network_pays_the_known_rate(var_type: VarType, bits: float) -> None:
    x_start, noise = four_points(0.5)
    bound = variational_bound(process(make_betas("linear"), "eps", var_type), zero_network, x_start, noise,
                              clip_denoised=False)  # fmt: skip
    # A sum of 999 float64 terms of order 0.01 to 1, against an independent program's.
    assert float(bound.terms[:, 1:].sum()) == pytest.approx(bits, rel=1e-11)


@pytest.mark.parametrize(("var_type", "bits"), [("fixedlarge", 0.4864192300440824), ("fixedsmall", 0.0)])
def test_perfect_prediction_pays_only_for_the_wrong_variance(var_type: VarType, bits: float) -> None:
    diffusion = process(make_betas("linear"), "xstart", var_type)
    x_start, noise = four_points(0.5)
    bound = variational_bound(diffusion, lambda x, t: x_start, x_start, noise)
    assert float(bound.terms[:, 1:].sum()) == pytest.approx(bits, rel=1e-11, abs=1e-20)
    assert float(bound.mse.max()) == 0.0


@pytest.mark.parametrize(
    ("cdf", "bits", "anchor"),
    [("tanh", 2.5177929594435, 2.517793141465685), ("exact", 2.5136116338784, 2.513611630251948)],
)
def test_zero_network_pays_the_known_decoder_bits(cdf: Cdf, bits: float, anchor: float) -> None:
    eps, weight = np.linspace(-9, 9, 4001), 18 / 4000
    noise = torch.from_numpy(eps).reshape(-1, 1, 1, 1)
    x_start = torch.full_like(noise, 128 / 127.5 - 1)
    t = torch.zeros(len(noise), dtype=torch.int64)
    term, _ = bound_term(process(make_betas("linear")), zero_network, x_start, t, noise, cdf=cdf)
    total = float(np.dot(term.numpy(), scipy.stats.norm.pdf(eps)) * weight)
    # The trapezoidal rule; `bits` is its limit with 4,000,001 nodes in numpy. The anchor is a 200-node Gauss-Hermite
    # quadrature, which the kink at the decoder's floor of 1e-12 keeps up to 7e-8 away from that limit.
    assert total == pytest.approx(bits, rel=1e-10)
    assert total == pytest.approx(anchor, rel=1e-7)


@pytest.mark.parametrize("mean_type", MEANS)
@pytest.mark.parametrize("var_type", VARIANCES)
def test_decoder_term_is_the_mass_of_each_pixels_bin(mean_type: MeanType, var_type: VarType) -> None:
    s2 = 0.25
    diffusion = process(make_betas("linear"), mean_type, var_type)
    form = closed_form(diffusion.betas, s2)
    pixel, eps = (grid.ravel() for grid in np.meshgrid(np.arange(256), np.linspace(-3, 3, 7)))
    x = pixel / 127.5 - 1
    x_t = np.sqrt(form.abar[0]) * x + np.sqrt(1 - form.abar[0]) * eps
    mean = np.sqrt(form.abar[0]) * s2 / form.v[0] * x_t  # at t = 0 the mean of x_0 given x_1 itself
    deviation = math.sqrt(form.tilde[0] if var_type.startswith("fixed") else form.w[0])
    upper = scipy.stats.norm.cdf(np.where(pixel == 255, np.inf, (x - mean + 1 / 255) / deviation))
    lower = scipy.stats.norm.cdf(np.where(pixel == 0, -np.inf, (x - mean - 1 / 255) / deviation))
    term, _ = bound_term(
        diffusion,
        optimal_network(diffusion, s2),
        torch.from_numpy(x).reshape(-1, 1, 1, 1),
        torch.zeros(len(x), dtype=torch.int64),
        torch.from_numpy(eps).reshape(-1, 1, 1, 1),
        clip_denoised=False,
    )
    # The reference loses digits where both CDFs are near 1: 1e-16 over a mass of at least 1e-9 here.
    np.testing.assert_allclose(term, -np.log2(upper - lower), rtol=1e-6)


def test_every_t_has_its_own_noise_and_is_visited_once() -> None:
    asked: list[int] = []
    visited: list[int] = []

    def noise(address: int) -> Tensor:
        asked.append(address)
        return torch.zeros(2, 1, 4, 4)

    def network(x: Tensor, t: Tensor) -> Tensor:
        visited.append(int(t[0]))
        return torch.zeros_like(x)

    bound = variational_bound(process(make_betas("linear", 12)), network, torch.zeros(2, 1, 4, 4), noise)
    assert asked == visited == list(range(12))
    assert bound.terms.shape == bound.mse.shape == (2, 12)
    assert bound.total.dtype == torch.float64


def test_clipping_is_on_by_default_and_bounds_the_error() -> None:
    x_start, noise = four_points(1.0)
    diffusion = process(make_betas("linear"))

    def wild(x: Tensor, t: Tensor) -> Tensor:
        return -5.0 * x

    assert float(variational_bound(diffusion, wild, x_start, noise).mse.max()) <= 4.0
    assert float(variational_bound(diffusion, wild, x_start, noise, clip_denoised=False).mse.max()) > 4.0


def test_rate_and_distortion_are_those_of_who_has_received_x_t() -> None:
    terms = torch.tensor([[2.0, 0.5, 0.25], [4.0, 1.5, 0.75]], dtype=torch.float64)
    mse = torch.tensor([[0.0, 4.0, 9.0], [0.0, 16.0, 1.0]], dtype=torch.float64) / 127.5**2
    bound = Bound(terms, torch.tensor([0.01, 0.03], dtype=torch.float64), mse)
    curve = rate_distortion(bound)
    # x_3 = x_T alone costs L_T = 0.02 on average; x_2 also L_2 = 0.5, x_1 also L_1 = 1. L_0 is no rate.
    np.testing.assert_allclose(curve.rate, [1.52, 0.52, 0.02], rtol=1e-12)
    np.testing.assert_allclose(curve.distortion, np.sqrt([0.0, 10.0, 5.0]), rtol=1e-12)


@pytest.mark.parametrize("value", [255.0, math.nan, -1.01])
def test_images_outside_the_scaled_range_are_refused(value: float) -> None:
    x_start = torch.zeros(1, 1, 4, 4)
    x_start[0, 0, 1, 2] = value
    noise = SampleNoise(0, torch.arange(1), (1, 4, 4))
    diffusion = process(make_betas("linear", 10))
    with pytest.raises(ValueError, match="x_start runs from"):
        variational_bound(diffusion, zero_network, x_start, noise)
    with pytest.raises(ValueError, match="x_start runs from"):
        estimate_bound(diffusion, zero_network, x_start, noise, seed=0, indices=torch.arange(1))


@unchecked()
def test_unknown_choices_are_refused_by_name() -> None:
    x_start, noise = four_points(0.5)
    diffusion = process(make_betas("linear", 4))
    with pytest.raises(ValueError, match="cdf is 'erf'"):
        variational_bound(diffusion, zero_network, x_start, noise, cdf="erf")  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_timesteps", "strata"), [(2, 1), (10, 9), (10, 1), (50, 7), (1000, 32), (1000, 999)])
def test_strata_cut_the_timesteps_without_gap_or_overlap(num_timesteps: int, strata: int) -> None:
    ranges = stratify(num_timesteps, strata)
    assert len(ranges) == strata
    assert [t for stratum in ranges for t in stratum] == list(range(1, num_timesteps))
    assert min(map(len, ranges)) >= 1


@pytest.mark.parametrize("strata", [0, 10])
def test_more_strata_than_terms_are_refused(strata: int) -> None:
    with pytest.raises(ValueError, match="strata"):
        stratify(10, strata)


def test_one_stratum_a_timestep_is_the_full_loop() -> None:
    diffusion = process(make_betas("linear", 30))
    indices = torch.arange(5)
    noise = SampleNoise(3, indices, (1, 4, 4), "bound noise")
    x_start = (0.1 * noise(99)).clamp(-1, 1)
    network = optimal_network(diffusion, 0.01)
    estimate = estimate_bound(diffusion, network, x_start, noise, seed=0, indices=indices, strata=29)
    full = variational_bound(diffusion, network, x_start, noise)
    # The same terms, summed in another order.
    torch.testing.assert_close(estimate.total, full.total, rtol=1e-13, atol=0)
    torch.testing.assert_close(estimate.decoder, full.terms[:, 0], rtol=0, atol=0)


def test_estimate_takes_one_pass_for_the_decoder_and_one_a_stratum() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    indices = torch.arange(64)
    noise = SampleNoise(0, indices, (1, 2, 2))
    estimate_bound(process(make_betas("linear")), network, torch.zeros(64, 1, 2, 2), noise, seed=0, indices=indices,
                   strata=5)  # fmt: skip
    assert len(seen) == 1 + 5
    assert bool((seen[0] == 0).all())
    for call, t in enumerate(seen[1:]):
        assert set(t.tolist()) <= set(stratify(1000, 5)[call])
    assert len(set(seen[-1].tolist())) > 32  # every image draws its own


def test_estimate_is_unbiased_with_the_variance_of_stratified_sampling() -> None:
    # With noise that does not depend on its address the terms are a fixed table, and the estimate's exact expectation
    # and variance over the choice of t follow from it. 40,000 copies of one image are as many independent estimates.
    copies, strata = 40_000, 6
    diffusion = process(make_betas("linear", 100, beta_end=0.1))
    network = optimal_network(diffusion, 0.25)
    x_start, noise = four_points(0.5)
    full = variational_bound(diffusion, network, x_start, noise)
    table = full.terms[0].numpy()
    variance = sum(len(s) ** 2 * table[s.start : s.stop].var() for s in stratify(100, strata))
    estimate = estimate_bound(
        diffusion,
        network,
        x_start.expand(copies, 1, 2, 2),
        lambda address: noise(address).expand(copies, 1, 2, 2),
        seed=1,
        indices=torch.arange(copies),
        strata=strata,
    )
    # Four standard errors; the seed is fixed, so the test does not flicker.
    assert abs(float(estimate.total.mean() - full.total)) < 4 * math.sqrt(variance / copies)
    # A variance from 40,000 draws of a bounded variable: 1.5 % is more than four of its standard errors.
    assert float(estimate.total.var()) == pytest.approx(variance, rel=0.03)


def gaussian_estimate(count: int) -> tuple[BoundEstimate, float]:
    """Estimates for `count` random images of N(0, 0.01) data, and the bound of that distribution in closed form."""
    s2, indices = 0.01, torch.arange(count)
    diffusion = process(make_betas("linear", 200, beta_end=0.05))
    x_start = math.sqrt(s2) * SampleNoise(5, indices, (1, 2, 2), "data")(0).to(torch.float64)
    noise = SampleNoise(5, indices, (1, 2, 2), "noise")
    estimate = estimate_bound(
        diffusion, optimal_network(diffusion, s2), x_start, noise, seed=5, indices=indices, strata=8
    )
    form = closed_form(diffusion.betas, s2)
    terms = 0.5 * (np.log(form.beta / form.tilde) - 1 + form.w / form.beta)[1:]
    prior = 0.5 * (-np.log1p(-form.abar[-1]) - 1 + form.v[-1])
    # x_0 minus the decoder's mean is N(0, D_1), and at s = 0.1 no pixel reaches the outer bins: L_0 by summation.
    z, step = np.linspace(-9, 9, 4001, retstep=True)
    error, deviation = z * math.sqrt(form.mse[0]), math.sqrt(form.tilde[0])
    mass = scipy.stats.norm.cdf((error + 1 / 255) / deviation) - scipy.stats.norm.cdf((error - 1 / 255) / deviation)
    decoder = -np.dot(np.log(np.maximum(mass, 1e-12)), scipy.stats.norm.pdf(z)) * step
    return estimate, float(decoder + terms.sum() + prior) / math.log(2)


def test_standard_error_covers_images_timesteps_and_noise() -> None:
    # 1000 evaluations of 16 images each: their spread is what the standard error of each claims, and Student's
    # interval around each holds the closed form as often as it says.
    groups, size = 1000, 16
    estimate, truth = gaussian_estimate(groups * size)
    totals = estimate.total.reshape(groups, size).numpy()
    means, errors = totals.mean(1), totals.std(1, ddof=1) / math.sqrt(size)
    # Both variances have a relative standard error of about sqrt(2/1000) = 4.5 %, of the means' one and less.
    assert np.mean(errors**2) / np.var(means, ddof=1) == pytest.approx(1.0, abs=0.18)
    covered = np.abs(means - truth) < scipy.stats.t.ppf(0.975, size - 1) * errors
    # sqrt(.95 * .05 / 1000) = 0.7 %, four times; skewed totals of 16 images take up to 1 % more.
    assert covered.mean() == pytest.approx(0.95, abs=0.035)
    assert abs(means.mean() - truth) < 4 * totals.std() / math.sqrt(groups * size)


def test_geometric_strata_beat_strata_of_equal_length() -> None:
    form = closed_form(make_betas("linear"), 0.25)
    table = 0.5 * (np.log(form.beta / form.tilde) - 1 + form.w / form.beta)
    equal = [range(1 + 999 * k // 32, 1 + 999 * (k + 1) // 32) for k in range(32)]
    variance = [sum(len(s) ** 2 * table[s.start : s.stop].var() for s in cut) for cut in (stratify(1000, 32), equal)]
    assert variance[0] < variance[1] / 4


def test_estimate_of_an_image_does_not_depend_on_its_batch() -> None:
    diffusion = process(make_betas("linear", 60))
    network = optimal_network(diffusion, 0.01)

    def estimate(indices: Tensor) -> BoundEstimate:
        x_start = 0.1 * SampleNoise(7, indices, (1, 4, 4), "data")(0)
        noise = SampleNoise(7, indices, (1, 4, 4), "noise")
        return estimate_bound(diffusion, network, x_start, noise, seed=7, indices=indices, strata=4)

    whole = estimate(torch.arange(10))
    parts = estimate(torch.arange(4)), estimate(torch.arange(4, 10))
    for name in ("total", "prior", "decoder"):
        # Means over 16 pixels may be summed in another order: float32 rounding.
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-5, atol=1e-9)
