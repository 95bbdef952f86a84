"""The forward process, its posterior, the reverse step and the bound, against anchors, Bayes' rule and closed forms."""

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gaussian_case import (
    ANCHORS,
    LOG2,
    SCHEDULES_WITH_ANCHORS,
    GaussianData,
    constant,
    cumulative,
    scalars,
    unchecked,
)
from torch import Tensor

from ddpm_core.configs import LossType, MeanType, Schedule, VarType
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.gaussian import discretized_gaussian_log_likelihood, normal_kl
from ddpm_core.schedules import make_betas

LINEAR = make_betas("linear")
TIMES = [1, 2, 10, 100, 250, 500, 750, 1000]  # the paper's t
MEAN_TYPES = get_args(MeanType)


def index(*times: int) -> Tensor:
    """The code's t for the paper's t."""
    return torch.tensor(times) - 1


def every(count: int) -> Tensor:
    return torch.arange(count)


def pixel(value: float) -> float:
    return value / 127.5 - 1.0


@pytest.mark.parametrize("name", SCHEDULES_WITH_ANCHORS)
def test_q_sample_scales_by_the_anchors(name: Schedule) -> None:
    anchor, diffusion = ANCHORS[name], GaussianDiffusion(make_betas(name))
    t = index(*anchor["t"])
    ones, zeros = scalars(*[1.0] * len(t)), scalars(*[0.0] * len(t))
    gain = diffusion.q_sample(ones, t, zeros).flatten()
    spread = diffusion.q_sample(zeros, t, ones).flatten()
    assert gain.square().tolist() == pytest.approx(anchor["abar"], rel=1e-12)
    # 1 - abar is known to an ulp of 1: 1e-12 of its 1e-4 at t = 1.
    assert spread.square().tolist() == pytest.approx([1 - a for a in anchor["abar"]], rel=2e-12)


def test_q_composes_the_single_steps_of_eq_2() -> None:
    diffusion = GaussianDiffusion(LINEAR)
    gain, variance = 1.0, 0.0
    gains, variances = [], []
    for beta in LINEAR.tolist():
        gain, variance = math.sqrt(1 - beta) * gain, (1 - beta) * variance + beta
        gains.append(gain)
        variances.append(variance)
    q = diffusion.q_mean_variance(scalars(*[1.0] * 1000), every(1000))
    assert q.mean.flatten().tolist() == pytest.approx(gains, rel=1e-12)
    assert q.variance.flatten().tolist() == pytest.approx(variances, rel=2e-12)  # 1 - abar_1: an ulp of 1 on 1e-4
    assert q.log_variance.flatten().tolist() == pytest.approx([math.log(v) for v in variances], abs=3e-12)


def test_float32_keeps_the_small_variances_of_the_first_steps() -> None:
    diffusion, x = GaussianDiffusion(LINEAR), torch.ones(5, 1, 1, 1)
    q = diffusion.q_mean_variance(x, every(5))
    exact = [1 - a for a in cumulative(LINEAR)[:5]]
    assert q.variance.dtype == torch.float32
    # Three float32 roundings of 6e-8; 1 - abar in float32 would be wrong by 1.7e-4 at t = 1.
    assert q.variance.flatten().tolist() == pytest.approx(exact, rel=3e-7)
    assert q.log_variance.flatten().tolist() == pytest.approx([math.log(v) for v in exact], rel=3e-7)


@pytest.mark.parametrize("name", ["linear", "quad", "const", "warmup10", "cosine"])
def test_q_posterior_is_bayes_rule(name: Schedule) -> None:
    """q(x_{t-1}|x_t,x_0): the prior N(sqrt(abar_{t-1}) x_0, 1 - abar_{t-1}) times the likelihood of x_t, Eq. 2."""
    betas = make_betas(name)
    diffusion, abar = GaussianDiffusion(betas), [1.0, *cumulative(betas)]
    x_0, x_t = 0.37, -1.3
    q = diffusion.q_posterior_mean_variance(scalars(*[x_0] * 999), scalars(*[x_t] * 999), every(1000)[1:])
    means, variances = [], []
    for i in range(1, 1000):
        beta, v = float(betas[i]), 1 - abar[i]
        precision = 1 / v + (1 - beta) / beta
        means.append((math.sqrt(abar[i]) * x_0 / v + math.sqrt(1 - beta) * x_t / beta) / precision)
        variances.append(1 / precision)
    # v = 1 - abar_1 = 4e-5 (cosine) is known to 1e-16 absolute, 3e-12 relative.
    assert q.mean.flatten().tolist() == pytest.approx(means, rel=1e-11, abs=1e-12)
    assert q.variance.flatten().tolist() == pytest.approx(variances, rel=1e-11)
    assert q.log_variance.flatten().tolist() == pytest.approx([math.log(v) for v in variances], abs=1e-11)


def test_the_first_posterior_is_x_0_and_borrows_the_second_log_variance() -> None:
    diffusion = GaussianDiffusion(LINEAR)
    q = diffusion.q_posterior_mean_variance(scalars(0.6), scalars(5.0), index(1))
    assert q.mean.item() == pytest.approx(0.6, rel=1e-12)  # beta_1 / (1 - abar_1), of which 1 - abar_1 has 12 digits
    assert q.variance.item() == 0.0
    assert q.log_variance.item() == pytest.approx(-9.81672513529567, rel=1e-12)


@given(
    x_0=st.floats(-1, 1),
    eps=st.floats(-4, 4),
    t=st.integers(1, 1000),
    name=st.sampled_from(["linear", "quad", "const", "warmup50"]),
)
@settings(max_examples=60, deadline=None)
def test_every_perfect_prediction_gives_back_x_0(x_0: float, eps: float, t: int, name: Schedule) -> None:
    diffusion, i, x = GaussianDiffusion(make_betas(name)), index(t), scalars(x_0)
    x_t = diffusion.q_sample(x, i, scalars(eps))
    abar = cumulative(diffusion.betas)[t - 1]
    v = scalars(math.sqrt(abar) * eps - math.sqrt(1 - abar) * x_0)  # Salimans & Ho 2022, section 4
    mu = diffusion.q_posterior_mean_variance(x, x_t, i).mean
    # Each route divides by its coefficient of x_0: sqrt(abar) down to 4e-5, coef1 down to 8e-7 (const). The numerator is
    # rounded at 1e-16 times values up to 4. The root of 1/abar - 1, 1e-2 at t = 1, has an error 1e-16 / 2e-2 besides.
    assert diffusion.predict_xstart_from_eps(x_t, i, scalars(eps)).item() == pytest.approx(
        x_0, abs=4e-14 + 8e-15 / math.sqrt(abar)
    )
    coef1 = float(diffusion.posterior_mean_coef1[t - 1])
    assert diffusion.predict_xstart_from_xprev(x_t, i, mu).item() == pytest.approx(x_0, abs=8e-15 / coef1)
    assert diffusion.predict_xstart_from_v(x_t, i, v).item() == pytest.approx(x_0, abs=4e-14)
    back = diffusion.predict_eps_from_xstart(x_t, i, x).item()
    assert back == pytest.approx(eps, abs=8e-15 / math.sqrt(1 - abar))


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("name", ["linear", "quad", "const", "warmup10", "cosine"])
def test_the_same_knowledge_gives_the_same_step_in_every_parameterisation(mean_type: MeanType, name: Schedule) -> None:
    betas = make_betas(name)
    data = GaussianData(betas, 0.3)
    diffusion = GaussianDiffusion(betas, mean_type=mean_type)
    x, t = scalars(*[0.8] * 1000), every(1000)
    p = diffusion.p_mean_variance(data.predictor(mean_type), x, t, clip_denoised=False)
    # Where x_0 is mu over coef1, down to 8e-7 (const), it has 1e-16 / 8e-7 of absolute rounding, some ulps of it.
    assert p.pred_xstart.flatten().tolist() == pytest.approx([0.8 * data.xstart_gain(i) for i in range(1000)], abs=1e-9)
    # E[x_{t-1}|x_t] from the joint Gaussian of the two, which nothing in the code forms.
    assert p.mean.flatten().tolist() == pytest.approx([0.8 * data.xprev_gain(i) for i in range(1000)], rel=1e-10)


def test_eps_is_refused_where_it_does_not_determine_x_0() -> None:
    diffusion = GaussianDiffusion(make_betas("jsd", 10))
    with pytest.raises(ValueError, match="alphas_cumprod ends at 0"):
        diffusion.p_mean_variance(constant(scalars(0.0)), scalars(1.0), torch.tensor([9]))


@pytest.mark.parametrize("mean_type", ["xstart", "v"])
def test_jsd_steps_are_finite_where_x_0_is_determined(mean_type: MeanType) -> None:
    betas = make_betas("jsd", 10)
    data, diffusion = GaussianData(betas, 0.5), GaussianDiffusion(betas, mean_type=mean_type)
    p = diffusion.p_mean_variance(data.predictor(mean_type), scalars(*[0.7] * 10), every(10), clip_denoised=False)
    assert p.mean.flatten().tolist() == pytest.approx(
        [0.7 * data.xprev_gain(i) for i in range(10)], rel=1e-12, abs=1e-15
    )


# x_t = 0.3, eps = -0.7: t -> (x_0, mean, mean with x_0 clipped)
STEP = {
    1: (3.070153511513430e-01, 3.070153511513463e-01, 3.070153511513463e-01),
    2: (3.104146382269160e-01, 3.056790132458639e-01, 3.056790132458639e-01),
    10: (3.307840044176137e-01, 3.045336578279550e-01, 3.045336578279550e-01),
    100: (5.539327740408729e-01, 3.048358192751172e-01, 3.048358192751172e-01),
    250: (1.081455315969764e00, 3.059093352828625e-01, 3.052807725338501e-01),
    500: (3.467047044454064e00, 3.088760820460261e-01, 3.013020721773150e-01),
    750: (1.725567288589396e01, 3.128903725382894e-01, 2.986021761781281e-01),
    1000: (1.574082337427355e02, 3.171881843742919e-01, 2.971129549674275e-01),
}


@pytest.mark.parametrize("clip", [False, True])
def test_the_scalar_step_equals_the_anchors_with_and_without_the_clip(clip: bool) -> None:
    diffusion, x, t = GaussianDiffusion(LINEAR), scalars(*[0.3] * 8), index(*STEP)
    p = diffusion.p_mean_variance(constant(scalars(-0.7)), x, t, clip_denoised=clip)
    x_0, mean, clipped = (list(column) for column in zip(*STEP.values(), strict=True))
    assert p.mean.flatten().tolist() == pytest.approx(clipped if clip else mean, rel=1e-12)
    expected = [min(max(value, -1.0), 1.0) for value in x_0] if clip else x_0
    assert p.pred_xstart.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@given(x_t=st.floats(-3, 3), eps=st.floats(-3, 3), t=st.integers(1, 1000))
@settings(max_examples=60, deadline=None)
def test_without_the_clip_the_mean_is_eq_11(x_t: float, eps: float, t: int) -> None:
    diffusion = GaussianDiffusion(LINEAR)
    p = diffusion.p_mean_variance(constant(scalars(eps)), scalars(x_t), index(t), clip_denoised=False)
    beta, abar = float(LINEAR[t - 1]), cumulative(LINEAR)[t - 1]
    # At T, x_0 is 157 times x_t: 157 * 3 * 1e-16. At t = 1, coef1 has the 1e-12 of 1 - abar = 1e-4 known to 1e-16.
    assert p.mean.item() == pytest.approx((x_t - beta / math.sqrt(1 - abar) * eps) / math.sqrt(1 - beta), abs=4e-12)


@pytest.mark.parametrize("name", SCHEDULES_WITH_ANCHORS)
def test_fixed_variances_are_beta_and_beta_tilde_but_at_the_first_step(name: Schedule) -> None:
    anchor, betas = ANCHORS[name], make_betas(name)
    zero, x = constant(scalars(0.0)), scalars(*[0.0] * 1000)
    large = GaussianDiffusion(betas, var_type="fixedlarge").p_mean_variance(zero, x, every(1000))
    small = GaussianDiffusion(betas, var_type="fixedsmall").p_mean_variance(zero, x, every(1000))
    at = [t - 1 for t in anchor["t"]]
    assert small.log_variance.flatten()[at].tolist() == pytest.approx(anchor["log_beta_tilde_clipped"], rel=1e-12)
    expected = [anchor["log_beta_tilde_clipped"][0], *(math.log(b) for b in anchor["beta"][1:])]
    assert large.log_variance.flatten()[at].tolist() == pytest.approx(expected, rel=1e-12)
    for p in (large, small):
        assert p.log_variance.shape == x.shape
        assert torch.equal(p.variance, p.log_variance.exp())


def test_learned_is_the_raw_log_variance() -> None:
    values = torch.linspace(-7, 3, 1000, dtype=torch.float64).reshape(-1, 1, 1, 1)
    diffusion = GaussianDiffusion(LINEAR, var_type="learned", loss_type="kl")
    p = diffusion.p_mean_variance(lambda x, t: torch.cat([x, values], 1), torch.zeros_like(values), every(1000))
    assert torch.equal(p.log_variance, values)
    assert p.variance.flatten().tolist() == pytest.approx([math.exp(v) for v in values.flatten().tolist()], rel=1e-14)


@pytest.mark.parametrize(("fraction", "which"), [(-1.0, "beta_tilde"), (1.0, "beta"), (0.0, "geometric mean")])
def test_learned_range_runs_from_beta_tilde_to_beta_in_the_logarithm(fraction: float, which: str) -> None:
    anchor = ANCHORS["linear"]
    low, high = anchor["log_beta_tilde_clipped"], [math.log(b) for b in anchor["beta"]]
    expected = {
        "beta_tilde": low,
        "beta": high,
        "geometric mean": [(a + b) / 2 for a, b in zip(low, high, strict=True)],
    }[which]
    diffusion = GaussianDiffusion(LINEAR, var_type="learned_range", loss_type="hybrid")
    output = torch.cat([scalars(*[0.0] * 8), scalars(*[fraction] * 8)], 1)
    p = diffusion.p_mean_variance(lambda x, t: output, scalars(*[0.5] * 8), index(*TIMES))
    assert p.log_variance.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_p_sample_adds_sigma_z_but_none_at_the_last_step() -> None:
    diffusion, x = GaussianDiffusion(LINEAR), scalars(0.3, 0.3, 0.3)
    state, pred = diffusion.p_sample(constant(scalars(-0.7)), x, index(1, 2, 1000), scalars(9.0, 2.0, -1.0), False)
    means = [STEP[t][1] for t in (1, 2, 1000)]
    sigmas = [0.0, 1.095079540124460e-02, 1.414213562373095e-01]  # paper.md, 6.2
    expected = [m + s * z for m, s, z in zip(means, sigmas, [9.0, 2.0, -1.0], strict=True)]
    assert state.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert pred.flatten().tolist() == pytest.approx([STEP[t][0] for t in (1, 2, 1000)], rel=1e-12)


def test_xprev_clips_the_reported_x_0_and_not_the_mean() -> None:
    diffusion = GaussianDiffusion(LINEAR, mean_type="xprev")
    p = diffusion.p_mean_variance(constant(scalars(2.5)), scalars(1.0), index(500), clip_denoised=True)
    assert p.mean.item() == 2.5
    assert p.pred_xstart.item() == 1.0


def test_normal_kl_equals_its_anchor_and_the_integral() -> None:
    m1, lv1, m2, lv2 = (torch.tensor(v, dtype=torch.float64) for v in (0.5, -1.0, -0.25, 0.5))
    assert normal_kl(m1, lv1, m2, lv2).item() == pytest.approx(5.321518281183930e-01, rel=1e-14)
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    p, q = torch.distributions.Normal(m1, (lv1 / 2).exp()), torch.distributions.Normal(m2, (lv2 / 2).exp())
    # The trapezium rule on a smooth integrand that vanishes at both ends is exact to rounding.
    integral = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
    assert normal_kl(m1, lv1, m2, lv2).item() == pytest.approx(integral.item(), rel=1e-12)


@given(st.floats(-12, 3), st.floats(-1e-3, 1e-3))
@settings(max_examples=50, deadline=None)
def test_normal_kl_of_nearly_equal_variances_is_their_series(log_variance: float, d: float) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    a, b = zero + (log_variance + d), zero + log_variance
    d = float(a - b)
    series = 0.5 * sum(d**k / math.factorial(k) for k in range(2, 8))
    # expm1(d) - d loses what d has more than d^2/2: 1e-16 |d| absolute.
    assert normal_kl(zero, a, zero, b).item() == pytest.approx(series, rel=1e-12, abs=2e-16 * abs(d))


# t -> (fixedlarge, fixedsmall): x_0 = 0.2, eps = 1, predicted 0.5, not clipped, in nats
VB = {
    2: (1.895602856158566e-01, 1.499178780398e-01),
    10: (2.444045571126534e-02, 2.1609139938546e-02),
    100: (2.603092765303836e-03, 2.5667383600106e-03),
    250: (1.343665840508819e-03, 1.3433181984978e-03),
    500: (1.376045145197023e-03, 1.3770491276373e-03),
    750: (1.912541374287771e-03, 1.9126387677479e-03),
    1000: (2.551123367328858e-03, 2.5511254684499e-03),
}


@pytest.mark.parametrize(("column", "var_type"), [(0, "fixedlarge"), (1, "fixedsmall")])
def test_terms_of_the_bound_equal_the_anchors(column: int, var_type: VarType) -> None:
    diffusion, t = GaussianDiffusion(LINEAR, var_type=var_type), index(*VB)
    x_0 = scalars(*[0.2] * 7)
    x_t = diffusion.q_sample(x_0, t, torch.ones_like(x_0))
    terms, pred = diffusion.vb_terms_bpd(constant(scalars(0.5)), x_0, x_t, t, clip_denoised=False)
    # The difference of two means (1e-3) of numbers near 1, squared: 13 digits; the anchors print 14.
    assert (terms * LOG2).tolist() == pytest.approx([row[column] for row in VB.values()], rel=1e-10)
    abar = cumulative(LINEAR)
    expected = [0.2 + 0.5 * math.sqrt(1 / abar[i - 1] - 1) for i in VB]  # Eq. 15 with an eps wrong by 0.5
    assert pred.flatten().tolist() == pytest.approx(expected, rel=1e-12)


# Eq. 12: beta^2 / (2 sigma^2 alpha (1 - abar)), nats per squared error of eps
WEIGHTS = {
    2: (2.726920842780491e-01, 5.996715121593821e-01),
    10: (7.371701593281249e-02, 8.643655975418571e-02),
    100: (1.008126374899072e-02, 1.026695344004237e-02),
    250: (5.343179433766878e-03, 5.373272793991263e-03),
    500: (5.503431925619709e-03, 5.508196510549459e-03),
    750: (7.650162869011001e-03, 7.650555070991794e-03),
    1000: (1.020449346863788e-02, 1.020450187380003e-02),
}


@pytest.mark.parametrize(
    ("column", "var_type", "total", "floor"),
    [(0, "fixedlarge", 9.360996982761598, 0.4864192300440824), (1, "fixedsmall", 10.17049287378899, 0.0)],
)
def test_the_bound_weighs_eps_errors_by_eq_12_over_an_irreducible_cost(
    column: int, var_type: VarType, total: float, floor: float
) -> None:
    diffusion, t = GaussianDiffusion(LINEAR, var_type=var_type), every(1000)[1:]
    x_0 = scalars(*[0.2] * 999)
    x_t = diffusion.q_sample(x_0, t, torch.ones_like(x_0))

    def cost(error: float) -> Tensor:
        return diffusion.vb_terms_bpd(constant(scalars(1.0 + error)), x_0, x_t, t, clip_denoised=False)[0] * LOG2

    perfect = cost(0.0)
    assert float(perfect.sum()) / LOG2 == pytest.approx(floor, abs=1e-10)
    weight = cost(1.0) - perfect
    assert weight[[i - 2 for i in WEIGHTS]].tolist() == pytest.approx(
        [row[column] for row in WEIGHTS.values()], rel=1e-10
    )
    assert float(weight.sum()) == pytest.approx(total, rel=1e-10)
    # Quadratic in the error, the same for both signs.
    assert (cost(-2.0) - perfect).tolist() == pytest.approx((4 * weight).tolist(), rel=1e-9)


@pytest.mark.parametrize(("var_type", "bits"), [("fixedlarge", 13.99148315485079), ("fixedsmall", 14.67291963241193)])
def test_a_network_that_says_zero_pays_the_known_rate(var_type: VarType, bits: float) -> None:
    """The terms depend on eps by its square alone, whose mean is 1, so eps = 1 gives the expectation."""
    diffusion, t = GaussianDiffusion(LINEAR, var_type=var_type), every(1000)[1:]
    x_0 = scalars(*[-0.4] * 999)
    x_t = diffusion.q_sample(x_0, t, torch.ones_like(x_0))
    terms, _ = diffusion.vb_terms_bpd(constant(scalars(0.0)), x_0, x_t, t, clip_denoised=False)
    assert float(terms.sum()) == pytest.approx(bits, rel=1e-11)


# By mpmath's quadrature in 30 digits, split at the floor; paper.md, 6.6, has 2.51361163025 and 2.51779314147, which its
# own quadrature left wrong in the ninth and seventh digit.
@pytest.mark.parametrize(("cdf", "bits"), [("exact", 2.51361163387942367754), ("tanh", 2.51779295945358089058)])
def test_a_network_that_says_zero_pays_the_known_decoder_cost(cdf: Any, bits: float) -> None:
    diffusion = GaussianDiffusion(LINEAR)
    eps = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = torch.exp(-eps.square() / 2) / math.sqrt(2 * math.pi)
    x_0 = torch.full((len(eps), 1, 1, 1), pixel(128), dtype=torch.float64)
    t = torch.zeros(len(eps), dtype=torch.int64)
    x_t = diffusion.q_sample(x_0, t, eps.reshape(-1, 1, 1, 1))
    terms, _ = diffusion.vb_terms_bpd(constant(scalars(0.0)), x_0, x_t, t, clip_denoised=False, cdf=cdf)
    # A Riemann sum over a smooth integrand that vanishes at both ends, but for the kink of the floor at eps = 5.0 (tanh)
    # or 5.6: step^2 / 12 times the slope 14 times the density 1e-6, 1e-12; and tanh's rounding, 1e-16 of a mass 1e-12,
    # where the density is 1e-6: 1e-10.
    assert float((terms * density).sum() * 1e-3) == pytest.approx(bits, rel=2e-10)


MATCHED: list[tuple[MeanType, VarType]] = [
    (mean, var) for mean in MEAN_TYPES for var in ("fixedlarge", "fixedsmall", "learned", "learned_range")
]


@pytest.mark.parametrize("s2", [1.0, 0.25, 0.01])
@pytest.mark.parametrize(("mean_type", "var_type"), MATCHED)
@pytest.mark.parametrize("name", ["linear", "quad", "const", "warmup50"])
def test_expected_terms_of_gaussian_data_equal_the_closed_form(
    name: Schedule, mean_type: MeanType, var_type: VarType, s2: float
) -> None:
    """KL(N(., beta-tilde) || N(., sigma^2)) + coef1^2 Var[x_0|x_t] / (2 sigma^2), in expectation over x_0 and eps.

    A term is constant + a quadratic form of (x_0, eps), which is even; so its mean over independent x_0 and eps is the
    value at 0 plus what x_0 = s alone and eps = 1 alone add.
    """
    betas = make_betas(name)
    data = GaussianData(betas, s2)
    learned: Callable[[int], float] | None = None
    if var_type == "learned":
        learned = lambda t: math.log(max(data.xprev_variance(t), 1e-12))  # noqa: E731
    elif var_type == "learned_range":
        learned = lambda t: 0.3  # noqa: E731
    loss: LossType = "kl" if var_type in ("learned", "learned_range") else "mse"
    diffusion = GaussianDiffusion(betas, mean_type=mean_type, var_type=var_type, loss_type=loss)
    t, one = every(1000)[1:], torch.ones(999, 1, 1, 1, dtype=torch.float64)
    predictor = data.predictor(mean_type, learned)

    def term(x_0: float, eps: float) -> Tensor:
        x_t = diffusion.q_sample(x_0 * one, t, eps * one)
        return diffusion.vb_terms_bpd(predictor, x_0 * one, x_t, t, clip_denoised=False)[0] * LOG2

    mean = term(math.sqrt(s2), 0.0) + term(0.0, 1.0) - term(0.0, 0.0)

    abar = [1.0, *data.abar]
    expected = []
    for i in range(1, 1000):
        beta, v, w = data.betas[i], 1 - abar[i], 1 - abar[i + 1]
        tilde, coef1 = beta * v / w, beta * math.sqrt(abar[i]) / w
        sigma2 = {
            "fixedlarge": beta,
            "fixedsmall": tilde,
            "learned": data.xprev_variance(i),
            "learned_range": math.exp(0.65 * math.log(beta) + 0.35 * math.log(tilde)),
        }[var_type]
        ratio = tilde / sigma2
        expected.append(0.5 * (ratio - 1 - math.log(ratio) + coef1**2 * data.xstart_variance(i) / sigma2))
    # float32 holds the learned channels' table (7 digits). Otherwise the terms are down to 1e-11 in nats while they are
    # made of numbers of order 1 squared with rounding 1e-15.
    rel = 3e-6 if var_type in ("learned", "learned_range") else 1e-9
    assert mean.tolist() == pytest.approx(expected, rel=rel, abs=1e-13)


@pytest.mark.parametrize("name", ["linear", "quad", "const", "warmup10", "warmup50", "cosine"])
@pytest.mark.parametrize("stride", [1, 7])
def test_the_bound_of_unit_gaussian_data_is_the_first_steps_information(name: Schedule, stride: int) -> None:
    """For x_0 ~ N(0, I) the reverse of each step is N(sqrt(alpha) x_t, beta I) exactly, so with sigma^2 = beta nothing is
    lost and L_1 + .. + L_T = I(x_0; x_1) = -ln(1 - abar_1) / 2. Holds for a strided chain as for the full one."""
    full = GaussianDiffusion(make_betas(name), var_type="fixedlarge")
    data = GaussianData(full.betas, 1.0)
    kept = list(range(3 if stride > 1 else 0, 1000, stride))
    chain = full.strided(kept)
    n = len(kept)
    t, one = every(n)[1:], torch.ones(n - 1, 1, 1, 1, dtype=torch.float64)

    def term(x_0: float, eps: float) -> Tensor:
        x_t = chain.q_sample(x_0 * one, t, eps * one)
        return chain.vb_terms_bpd(data.predictor("eps"), x_0 * one, x_t, t, clip_denoised=False)[0]

    total = (term(1.0, 0.0) + term(0.0, 1.0) - term(0.0, 0.0)).sum() + chain.prior_bpd(scalars(1.0)).sum()
    # A sum of n terms whose small ones lose up to 5 digits of 16.
    assert float(total) == pytest.approx(-0.5 * math.log2(1 - data.abar[kept[0]]), rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES_WITH_ANCHORS)
@pytest.mark.parametrize(("x_0", "key"), [(0.0, "x0=0"), (1.0, "x0=+-1"), (-1.0, "x0=+-1"), (0.5, "E[x0^2]=0.25")])
def test_prior_bpd_equals_the_anchors(name: Schedule, x_0: float, key: str) -> None:
    diffusion = GaussianDiffusion(make_betas(name))
    expected = ANCHORS[name]["L_T_bits_per_dim"][key]
    images = torch.full((2, 3, 4, 4), x_0)  # float32: the difference is taken in float64
    # expm1(d) - d at d = abar keeps 1e-16 / abar: 1e-7 for const at x_0 = 0, where the result is 1e-18.
    assert diffusion.prior_bpd(images).tolist() == pytest.approx([expected] * 2, rel=1e-6 if x_0 == 0 else 1e-11)


def test_prior_bpd_averages_over_the_pixels_of_each_image() -> None:
    diffusion = GaussianDiffusion(LINEAR)
    images = torch.tensor([[0.0, 0.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]]).reshape(2, 1, 2, 2)
    one = ANCHORS["linear"]["L_T_bits_per_dim"]["x0=+-1"]
    zero = ANCHORS["linear"]["L_T_bits_per_dim"]["x0=0"]
    assert diffusion.prior_bpd(images).tolist() == pytest.approx([(one + zero) / 2, one], rel=1e-6)


LOG_SIGMA_1 = -4.908362567647835
# x, mean in pixels, ln p with the authors' tanh, ln p with the normal CDF
DECODER = [
    (128, 128, -9.050181142111203e-01, -9.048188415185577e-01),
    (0, 0, -3.534412086637521e-01, -3.533838099982760e-01),
    (255, 255, -3.534412086637521e-01, -3.533838099982760e-01),
    (128, 129, -1.418603924151811e00, -1.418285449729101e00),
    (128, 131, -5.594839085104971e00, -5.556602039612028e00),
    (0, 1, -1.211559103013728e00, -1.211694503282662e00),
    (255, 250, -1.541719235697074e01, -1.394457638496783e01),
    (128, 140, -2.763102111592855e01, -2.763102111592855e01),
]


@pytest.mark.parametrize(("x", "mean", "tanh", "exact"), DECODER)
def test_the_decoder_equals_the_anchors(x: float, mean: float, tanh: float, exact: float) -> None:
    a, b, scale = scalars(pixel(x)), scalars(pixel(mean)), scalars(LOG_SIGMA_1)
    # The anchors and tanh form small masses, 2e-7 and 9e-7, as 1 - cdf, with 1e-16 / 2e-7 of relative rounding.
    assert discretized_gaussian_log_likelihood(a, b, scale, "tanh").item() == pytest.approx(tanh, rel=1e-9)
    assert discretized_gaussian_log_likelihood(a, b, scale).item() == pytest.approx(exact, rel=1e-11, abs=2e-10)


def test_the_decoder_is_the_first_term_of_the_bound() -> None:
    diffusion = GaussianDiffusion(LINEAR)
    x_0 = scalars(pixel(128), pixel(0), pixel(255))
    t = torch.zeros(3, dtype=torch.int64)
    x_t = diffusion.q_sample(x_0, t, torch.zeros_like(x_0))
    terms, _ = diffusion.vb_terms_bpd(constant(scalars(0.0)), x_0, x_t, t, cdf="tanh")
    # Best possible L_0: paper.md, 6.5, with the authors' tanh. coef1 at t = 1 is 1 + 1.1e-13, 1.5e-11 sigmas off at +-1.
    assert terms.tolist() == pytest.approx([1.305665145287065, 0.5099078789849965, 0.5099078789849965], rel=1e-10)


LEVELS = scalars(*[pixel(k) for k in range(256)])


@given(mean=st.floats(-3, 3), log_scale=st.floats(-9, 2), cdf=st.sampled_from(["exact", "tanh"]))
@settings(max_examples=100, deadline=None)
def test_the_decoder_sums_to_one_over_the_256_levels(mean: float, log_scale: float, cdf: Any) -> None:
    log_p = discretized_gaussian_log_likelihood(LEVELS, scalars(*[mean] * 256), scalars(log_scale), cdf)
    # The bins telescope; only the floor adds, 1e-12 for each of 256 levels.
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=2.6e-10)


@given(mean=st.floats(-1.2, 1.2), log_scale=st.floats(-6, 0), level=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_the_decoder_is_symmetric_about_grey(mean: float, log_scale: float, level: int) -> None:
    def log_p(x: float, m: float) -> float:
        return discretized_gaussian_log_likelihood(scalars(x), scalars(m), scalars(log_scale)).item()

    # Phi(-z) = 1 - Phi(z) holds to 1e-16 absolute, at the floor 1e-4 of the mass.
    assert log_p(pixel(level), mean) == pytest.approx(log_p(-pixel(level), -mean), abs=1e-3)
    if log_p(pixel(level), mean) > -10:
        assert log_p(pixel(level), mean) == pytest.approx(log_p(-pixel(level), -mean), abs=1e-10)


def test_the_decoder_keeps_both_tails() -> None:
    """Far to either side of the mean the mass is a difference of tails, not of numbers near 1."""
    left = discretized_gaussian_log_likelihood(scalars(pixel(100)), scalars(pixel(106)), scalars(LOG_SIGMA_1)).item()
    right = discretized_gaussian_log_likelihood(scalars(pixel(112)), scalars(pixel(106)), scalars(LOG_SIGMA_1)).item()
    assert left == pytest.approx(right, rel=1e-10)
    sigma = math.exp(LOG_SIGMA_1) * 127.5
    exact = math.log(0.5 * (math.erfc(5.5 / sigma / math.sqrt(2)) - math.erfc(6.5 / sigma / math.sqrt(2))))
    assert right == pytest.approx(exact, rel=1e-10)


@unchecked()
def test_an_unknown_cdf_is_refused() -> None:
    with pytest.raises(ValueError, match="cdf is 'erf'"):
        discretized_gaussian_log_likelihood(scalars(0.0), scalars(0.0), scalars(0.0), "erf")  # type: ignore[arg-type]


STRIDES: list[list[int]] = [[0, 499, 999], [7, 8, 30, 31, 700], [999], [0], list(range(0, 1000, 111))]


@pytest.mark.parametrize("kept", STRIDES)
def test_a_strided_chain_has_the_same_marginals(kept: list[int]) -> None:
    full = GaussianDiffusion(LINEAR)
    chain, abar = full.strided(kept), cumulative(LINEAR)
    assert chain.alphas_cumprod.tolist() == pytest.approx([abar[t] for t in kept], rel=1e-12)
    assert chain.timesteps.tolist() == kept
    before = [1.0, *(abar[t] for t in kept[:-1])]
    ratios = [1 - abar[t] / b for t, b in zip(kept, before, strict=True)]
    assert chain.betas.tolist() == pytest.approx(ratios, rel=1e-11)  # 1 - a ratio near 1: an ulp of 1 on 1e-4


@pytest.mark.parametrize("kept", [s for s in STRIDES if len(s) > 1])
def test_a_strided_posterior_is_bayes_rule_over_the_steps_between(kept: list[int]) -> None:
    """The step from kept[i-1] to kept[i], composed of its single steps, and the prior at kept[i-1]."""
    chain = GaussianDiffusion(LINEAR).strided(kept)
    betas, x_0, x_t = LINEAR.tolist(), -0.8, 0.45
    means, variances = [], []
    for a, b in itertools.pairwise(kept):
        prior_gain, prior_variance = 1.0, 0.0
        for beta in betas[: a + 1]:
            prior_gain, prior_variance = math.sqrt(1 - beta) * prior_gain, (1 - beta) * prior_variance + beta
        gain, noise = 1.0, 0.0
        for beta in betas[a + 1 : b + 1]:
            gain, noise = math.sqrt(1 - beta) * gain, (1 - beta) * noise + beta
        precision = 1 / prior_variance + gain**2 / noise
        means.append((prior_gain * x_0 / prior_variance + gain * x_t / noise) / precision)
        variances.append(1 / precision)
    n = len(kept)
    q = chain.q_posterior_mean_variance(scalars(*[x_0] * (n - 1)), scalars(*[x_t] * (n - 1)), every(n)[1:])
    assert q.mean.flatten().tolist() == pytest.approx(means, rel=1e-10)
    assert q.variance.flatten().tolist() == pytest.approx(variances, rel=1e-10)


def test_a_strided_chain_asks_the_network_at_the_original_timesteps() -> None:
    asked: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.extend(t.tolist())
        return x

    chain = GaussianDiffusion(LINEAR).strided([3, 50, 999]).strided([0, 2])
    chain.p_mean_variance(denoise, scalars(0.0, 0.0), torch.tensor([0, 1]))
    assert asked == [3, 999]


def test_the_stride_one_is_the_chain_itself() -> None:
    diffusion = GaussianDiffusion(LINEAR)
    assert diffusion.strided(range(1000)) is diffusion


STEPWISE: list[dict[str, Any]] = [{"mean_type": "xprev"}, {"var_type": "learned", "loss_type": "kl"}]


@pytest.mark.parametrize("choice", STEPWISE)
def test_a_network_of_single_steps_is_refused_only_if_steps_are_left_out(choice: dict[str, Any]) -> None:
    diffusion = GaussianDiffusion(LINEAR, **choice)
    with pytest.raises(ValueError, match=r"fits only the full chain; take steps=1000"):
        diffusion.strided([0, 2])
    tail = diffusion.strided(range(500))  # x_500 down to x_0: an interpolation in latents
    assert tail.betas.tolist() == pytest.approx(LINEAR[:500].tolist(), rel=1e-11)


@pytest.mark.parametrize(
    ("betas", "sentence"),
    [
        (LINEAR.float(), r"betas are torch.float32 \[1000\]: a float64 vector"),
        (LINEAR[None], r"betas are torch.float64 \[1, 1000\]"),
        (LINEAR[:0], r"betas are torch.float64 \[0\]"),
        (LINEAR - 0.001, r"betas run from -0.0009 to 0.019: each must lie in \(0, 1\]"),
        (LINEAR * 100, r"betas run from 0.01 to 2: each must lie in \(0, 1\]"),
        (torch.cat([LINEAR, LINEAR[:1] * 0]), r"betas run from 0 to 0.02: each must lie in \(0, 1\]"),
        (LINEAR * math.nan, r"betas run from nan to nan"),
    ],
)
@unchecked()
def test_betas_that_are_no_variances_are_refused(betas: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianDiffusion(betas)


@pytest.mark.parametrize("name", ["mean_type", "var_type", "loss_type"])
@unchecked()
def test_unknown_choices_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 'epsilon': it must be one of"):
        GaussianDiffusion(LINEAR, **{name: "epsilon"})  # type: ignore[arg-type]


Call = Callable[[GaussianDiffusion, Tensor, Tensor], Any]
ZERO = constant(scalars(0.0))
CALLS: dict[str, Call] = {
    "q_mean_variance": lambda d, x, t: d.q_mean_variance(x, t),
    "q_sample": lambda d, x, t: d.q_sample(x, t, x),
    "q_posterior_mean_variance": lambda d, x, t: d.q_posterior_mean_variance(x, x, t),
    "p_mean_variance": lambda d, x, t: d.p_mean_variance(ZERO, x, t),
    "p_sample": lambda d, x, t: d.p_sample(ZERO, x, t, x),
    "training_losses": lambda d, x, t: d.training_losses(ZERO, x, t, x),
    "vb_terms_bpd": lambda d, x, t: d.vb_terms_bpd(ZERO, x, x, t),
    "predict_xstart_from_eps": lambda d, x, t: d.predict_xstart_from_eps(x, t, x),
    "predict_eps_from_xstart": lambda d, x, t: d.predict_eps_from_xstart(x, t, x),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("t", "sentence"),
    [
        (torch.tensor([5, -1]), r"t runs from -1 to 5: it must lie in 0..999"),
        (torch.tensor([5, 1000]), r"t runs from 5 to 1000: it must lie in 0..999"),
        (torch.tensor([5]), r"t is torch.int64 \[1\]: one int64 timestep an image, \[2\]"),
        (torch.tensor([1, 1], dtype=torch.uint8), r"t is torch.uint8 \[2\]"),
        (torch.tensor([0.5, 1.0]), r"t is torch.float32 \[2\]"),
    ],
)
@unchecked()
def test_timesteps_that_are_none_are_refused_and_never_wrap(call: str, t: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CALLS[call](GaussianDiffusion(LINEAR), torch.zeros(2, 1, 4, 4), t)


@pytest.mark.parametrize("call", [name for name in CALLS if not name.startswith("predict")])
@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            r"is torch.uint8 \[2, 1, 4, 4\]: floating-point images \[B,C,H,W\]",
        ),
        (torch.zeros(2, 4, 4), r"is torch.float32 \[2, 4, 4\]: floating-point images \[B,C,H,W\]"),
    ],
)
@unchecked()
def test_what_is_no_float_image_is_refused_by_name(call: str, x: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^(x_start|x_t|noise) " + sentence):
        CALLS[call](GaussianDiffusion(LINEAR), x, torch.tensor([0, 1]))


@unchecked()
def test_prior_bpd_refuses_bytes_and_nan() -> None:
    diffusion = GaussianDiffusion(LINEAR)
    with pytest.raises(ValueError, match=r"^x_start is torch.uint8"):
        diffusion.prior_bpd(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^x_start holds NaN or infinity"):
        diffusion.prior_bpd(torch.full((1, 1, 2, 2), math.nan))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@unchecked()
def test_values_that_are_not_finite_are_refused_where_data_enters(value: float) -> None:
    diffusion, t = GaussianDiffusion(LINEAR), torch.tensor([0])
    good, bad = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    bad[0, 0, 1, 1] = value
    calls: dict[str, Callable[[], Any]] = {
        "x_start": lambda: diffusion.q_sample(bad, t, good),
        "noise": lambda: diffusion.training_losses(ZERO, good, t, bad),
        "x_t": lambda: diffusion.vb_terms_bpd(ZERO, good, bad, t),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
            call()


@unchecked()
def test_images_of_two_shapes_are_refused_and_never_broadcast() -> None:
    diffusion, t = GaussianDiffusion(LINEAR), torch.tensor([0, 0])
    x, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    calls: dict[str, Callable[[], Any]] = {
        "noise": lambda: diffusion.q_sample(x, t, other),
        "x_t": lambda: diffusion.q_posterior_mean_variance(x, other, t),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name} is \[2, 1, 4, 4\]: the shape of the images"):
            call()


@unchecked()
def test_a_network_with_the_wrong_channels_is_refused() -> None:
    diffusion = GaussianDiffusion(LINEAR, var_type="learned_range", loss_type="hybrid")
    with pytest.raises(
        ValueError, match=r"denoise_fn returned \[2, 3, 4, 4\].*var_type 'learned_range' wants 6 channels"
    ):
        diffusion.p_mean_variance(lambda x, t: x, torch.zeros(2, 3, 4, 4), torch.tensor([0, 0]))


@pytest.mark.parametrize("kept", [[], [3, 3], [5, 4]])
def test_timesteps_that_do_not_ascend_are_refused(kept: list[int]) -> None:
    with pytest.raises(ValueError, match="they must be ascending, each once"):
        GaussianDiffusion(LINEAR).strided(kept)


@pytest.mark.parametrize("kept", [[-1, 3], [3, 1000]])
def test_timesteps_outside_the_schedule_are_refused(kept: list[int]) -> None:
    with pytest.raises(ValueError, match=r"they must lie in 0\.\.999"):
        GaussianDiffusion(LINEAR).strided(kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_passes_through(dtype: torch.dtype) -> None:
    diffusion, x, t = GaussianDiffusion(LINEAR), torch.ones(2, 1, 2, 2, dtype=dtype), torch.tensor([1, 999])
    assert diffusion.q_sample(x, t, x).dtype == dtype
    assert diffusion.p_mean_variance(lambda x, t: x, x, t).mean.dtype == dtype
    assert diffusion.training_losses(lambda x, t: x, x, t, x).dtype == dtype


def test_the_module_has_no_parameters_and_no_state_to_save() -> None:
    diffusion = GaussianDiffusion(LINEAR)
    assert list(diffusion.parameters()) == []
    assert diffusion.state_dict() == {}


def test_coefficients_follow_the_module_to_a_device() -> None:
    moved = GaussianDiffusion(LINEAR).to("meta")
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    x = torch.zeros(2, 1, 4, 4, device="meta")
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    # On meta no value can be read: a step that needs one (a hidden synchronisation on a GPU) would raise.
    assert moved.p_sample(lambda x, t: x, x, t, x)[0].device.type == "meta"
    assert moved.training_losses(lambda x, t: x, x, t, x).device.type == "meta"
    assert moved.vb_terms_bpd(lambda x, t: x, x, x, t)[0].device.type == "meta"
