"""The variance schedules and their L_T against the anchors and closed forms, the constraint L_T ~ 0, and what is refused."""

import math
import warnings
from decimal import Decimal, getcontext
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gaussian_case import ANCHORS, SCHEDULES_WITH_ANCHORS, cumulative, unchecked
from torch import Tensor

from ddpm_core.configs import Schedule
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.schedules import check_prior, make_betas, matching_beta_end, prior_bits_per_dim

# A product of 1000 factors, each wrong by half an ulp, is wrong by sqrt(1000) to 1000 times 1.1e-16. beta-tilde and coef1
# of const at T divide differences of numbers near 1 by each other, and lose two digits more.
RTOL = 1e-12


def at(table: Tensor, times: list[int]) -> list[float]:
    return [float(table[t - 1]) for t in times]


@pytest.mark.parametrize("name", SCHEDULES_WITH_ANCHORS)
def test_betas_and_alphas_cumprod_equal_the_anchors(name: Schedule) -> None:
    anchor, betas = ANCHORS[name], make_betas(name)
    assert betas.dtype == torch.float64
    assert betas.shape == (1000,)
    assert at(betas, anchor["t"]) == pytest.approx(anchor["beta"], rel=RTOL)
    assert at(GaussianDiffusion(betas).alphas_cumprod, anchor["t"]) == pytest.approx(anchor["abar"], rel=RTOL)


@pytest.mark.parametrize("name", SCHEDULES_WITH_ANCHORS)
def test_posterior_tables_equal_the_anchors(name: Schedule) -> None:
    anchor, diffusion = ANCHORS[name], GaussianDiffusion(make_betas(name))
    for key, table in [
        ("beta_tilde", diffusion.posterior_variance),
        ("log_beta_tilde_clipped", diffusion.posterior_log_variance_clipped),
        ("coef1", diffusion.posterior_mean_coef1),
        ("coef2", diffusion.posterior_mean_coef2),
    ]:
        assert table.dtype == torch.float64
        # 1 - abar_1 = 1e-4 is known to 1e-16 absolute only: 1e-12 relative, which enters every table at small t.
        assert at(table, anchor["t"]) == pytest.approx(anchor[key], rel=2e-12, abs=1e-30), key


@pytest.mark.parametrize("name", SCHEDULES_WITH_ANCHORS)
def test_sums_over_whole_tables_equal_the_anchors(name: Schedule) -> None:
    sums, diffusion = ANCHORS[name]["sums"], GaussianDiffusion(make_betas(name))
    abar = diffusion.alphas_cumprod
    tables = {
        "sum_beta": diffusion.betas,
        "sum_abar": abar,
        "sum_sqrt_abar": abar.sqrt(),
        "sum_sqrt_1m_abar": (1 - abar).sqrt(),
        "sum_beta_tilde": diffusion.posterior_variance,
        "sum_coef1": diffusion.posterior_mean_coef1,
        "sum_coef2": diffusion.posterior_mean_coef2,
        "sum_log_beta_tilde_clipped": diffusion.posterior_log_variance_clipped,
    }
    assert {key: float(table.sum()) for key, table in tables.items()} == pytest.approx(sums, rel=RTOL)


def test_other_linear_values_and_the_half_way_points_equal_the_anchors() -> None:
    abar = cumulative(make_betas("linear"))
    expected = {
        5: 9.993009943420809e-01,
        20: 9.942309516861578e-01,
        50: 9.710157229394402e-01,
        150: 7.883213508874032e-01,
        200: 6.590385082317941e-01,
        300: 3.964197594582525e-01,
        400: 1.951464449334324e-01,
        600: 2.587938942333488e-02,
        700: 6.966110556527834e-03,
        800: 1.532089549647948e-03,
        900: 2.752059119033984e-04,
    }
    assert {t: abar[t - 1] for t in expected} == pytest.approx(expected, rel=RTOL)
    first_below_half = {
        name: 1 + next(i for i, value in enumerate(cumulative(make_betas(name))) if value <= 0.5)
        for name in SCHEDULES_WITH_ANCHORS
    }
    assert first_below_half == {"linear": 260, "quad": 419, "const": 35}


@pytest.mark.parametrize(
    ("name", "abar", "log_snr"),
    [
        ("linear", 4.035829765375676e-05, -10.11767318330103),
        ("quad", 7.334124595808159e-04, -7.217068632140245),
        ("const", 1.682967357215927e-09, -20.20270731583650),
        ("warmup10", 4.613686681671336e-09, -19.19423858089656),
        ("warmup50", 2.606135133702270e-07, -15.16022705815067),
    ],
)
def test_last_alphas_cumprod_and_log_snr_equal_the_anchors(name: Schedule, abar: float, log_snr: float) -> None:
    last = float(GaussianDiffusion(make_betas(name)).alphas_cumprod[-1])
    assert last == pytest.approx(abar, rel=RTOL)
    assert math.log(last / (1 - last)) == pytest.approx(log_snr, rel=RTOL)


def test_linear_alphas_cumprod_equals_a_product_of_forty_digits() -> None:
    getcontext().prec = 40
    product = Decimal(1)
    for i in range(1000):
        product *= 1 - (Decimal("0.0001") + (Decimal("0.02") - Decimal("0.0001")) * i / 999)
    assert float(GaussianDiffusion(make_betas("linear")).alphas_cumprod[-1]) == pytest.approx(float(product), rel=1e-14)


@pytest.mark.parametrize(("name", "warm"), [("warmup10", 100), ("warmup50", 500)])
def test_warmup_is_linear_and_then_constant(name: Schedule, warm: int) -> None:
    betas = make_betas(name, 1000, 3e-4, 0.01)
    assert betas[:warm].tolist() == pytest.approx(
        [3e-4 + (0.01 - 3e-4) * i / (warm - 1) for i in range(warm)], rel=1e-13
    )
    assert betas[warm - 1] == 0.01
    assert bool((betas[warm:] == 0.01).all())


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_jsd_alphas_cumprod_falls_linearly_to_zero(T: int) -> None:
    abar = GaussianDiffusion(make_betas("jsd", T), mean_type="xstart").alphas_cumprod
    assert abar[-1] == 0.0
    # Differences of numbers near 1: absolute, not relative.
    assert abar.tolist() == pytest.approx([1 - t / T for t in range(1, T + 1)], abs=1e-13)


def test_cosine_is_nichol_and_dhariwals_but_for_the_clip() -> None:
    betas = make_betas("cosine", 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    # beta = 1 - a ratio near 1: the product of 998 of them keeps about 13 digits.
    assert cumulative(betas)[:-2] == pytest.approx([value / f[0] for value in f[1:-2]], rel=1e-11)
    assert float(betas[-1]) == 0.999
    assert float(betas[-2]) < 0.999


@given(
    name=st.sampled_from(get_args(Schedule)),
    T=st.integers(1, 300),
    ends=st.tuples(st.floats(1e-6, 0.5), st.floats(1e-6, 0.5)).map(sorted),
)
@settings(max_examples=60, deadline=None)
def test_betas_are_variances_and_alphas_cumprod_falls(name: Schedule, T: int, ends: list[float]) -> None:
    betas = make_betas(name, T, *ends)
    assert betas.shape == (T,)
    assert betas.dtype == torch.float64
    assert bool(((betas > 0) & (betas <= 1)).all())
    assert bool((betas.diff() >= -1e-15).all())  # never less noise than the step before
    abar = torch.tensor([1.0, *cumulative(betas)], dtype=torch.float64)
    assert bool((abar.diff() < 0).all()) or abar[-1] < 1e-300  # underflow apart
    if name in ("linear", "quad", "warmup50") and T > 3:
        assert betas[-1].item() == pytest.approx(ends[1], rel=1e-12)
        assert betas[0].item() == pytest.approx(ends[0], rel=1e-12)


def test_quad_is_linear_in_the_root() -> None:
    roots = make_betas("quad", 50, 1e-4, 0.04).sqrt()
    assert roots.diff().tolist() == pytest.approx([(0.2 - 0.01) / 49] * 49, rel=1e-11)


MOMENTS = {"x0=0": 0.0, "x0=+-1": 1.0, "uniform256": 65535 / (12 * 127.5**2), "E[x0^2]=0.25": 0.25}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", SCHEDULES_WITH_ANCHORS)
def test_prior_bits_equal_the_anchors(name: Schedule, moment: str) -> None:
    # 1.02e-18 for const at x_0 = 0: the series, not a difference of numbers near 1. The anchors' abar holds 12 digits.
    expected = ANCHORS[name]["L_T_bits_per_dim"][moment]
    assert prior_bits_per_dim(make_betas(name), MOMENTS[moment]) == pytest.approx(expected, rel=1e-11)


@given(abar=st.floats(1e-12, 0.999), moment=st.floats(0, 4))
@settings(max_examples=100, deadline=None)
def test_prior_bits_equal_the_formula_in_fifty_digits(abar: float, moment: float) -> None:
    getcontext().prec = 50
    betas = torch.tensor([1.0 - abar], dtype=torch.float64)
    a = Decimal(1.0 - betas.item())
    exact = (-(1 - a).ln() - a + a * Decimal(moment)) / 2 / Decimal(2).ln()
    # At abar = 1e-3, where the series takes over, the difference a^2/2 = 5e-7 keeps 1e-16 * 1e-3 / 5e-7 = 2e-13.
    assert prior_bits_per_dim(betas, moment) == pytest.approx(float(exact), rel=1e-12)


def test_prior_bits_are_linear_in_the_moment_and_infinite_without_noise() -> None:
    betas = make_betas("linear")
    zero, one = prior_bits_per_dim(betas, 0.0), prior_bits_per_dim(betas, 1.0)
    assert prior_bits_per_dim(betas, 0.25) == pytest.approx(0.75 * zero + 0.25 * one, rel=1e-13)
    assert prior_bits_per_dim(torch.tensor([1e-20], dtype=torch.float64), 1.0) == math.inf


def test_quad_and_the_others_keep_their_side_of_the_linear_level() -> None:
    level = {name: prior_bits_per_dim(make_betas(name), 1.0) for name in SCHEDULES_WITH_ANCHORS}
    assert level["const"] < level["linear"] < level["quad"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sigmoid",), "schedule is 'sigmoid': it must be one of linear, quad,"),
        (("linear", 0), "num_timesteps is 0"),
        (("linear", 10, 0.0, 0.02), "beta_start, beta_end are 0.0, 0.02"),
        (("linear", 10, 1e-4, 1.5), "beta_start, beta_end are 0.0001, 1.5"),
        (("const", 10, 1e-4, math.nan), "beta_start, beta_end are 0.0001, nan"),
    ],
)
@unchecked()
def test_values_that_are_no_schedule_are_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_betas(*arguments)


@pytest.mark.parametrize("moment", [-1.0, math.nan, math.inf])
def test_a_second_moment_that_is_none_is_refused(moment: float) -> None:
    for function in (prior_bits_per_dim, check_prior):
        with pytest.raises(ValueError, match="second_moment is"):
            function(make_betas("linear"), moment)


WITH_END_POINT: list[Schedule] = ["linear", "quad", "const", "warmup10", "warmup50"]


def prior_at(abar: float, second_moment: float) -> float:
    """L_T of the one-step schedule that ends at abar."""
    return prior_bits_per_dim(torch.tensor([1.0 - abar], dtype=torch.float64), second_moment)


def final_abar(betas: torch.Tensor) -> float:
    return float(torch.cumprod(1.0 - betas, 0)[-1])


@given(
    st.floats(1e-8, 0.99),
    st.floats(1e-6, 1.0),
    st.floats(0.0, 1.0),
)
def test_prior_bits_rise_with_abar_for_every_second_moment(abar: float, growth: float, second_moment: float) -> None:
    larger = abar + growth * (0.995 - abar)
    assert prior_at(abar, second_moment) < prior_at(larger, second_moment)


@pytest.mark.parametrize("abar", [1e-5, 5e-4, 0.02, 0.5, 0.9])
@pytest.mark.parametrize("second_moment", [0.0, 0.25, 1.0])
def test_prior_bits_rise_with_abar_at_the_known_rate(abar: float, second_moment: float) -> None:
    step = 1e-5 * abar
    slope = (prior_at(abar + step, second_moment) - prior_at(abar - step, second_moment)) / (2 * step)
    # d/da of 0.5 (-ln(1-a) - a + a m) / ln 2. Central difference: truncation 1e-10, rounding 1e-16 / 1e-5 of the value,
    # and the one-step schedule rounds 1 - (1 - abar) to 1e-16 / abar.
    assert slope == pytest.approx(0.5 * (abar / (1 - abar) + second_moment) / math.log(2), rel=1e-5)


@pytest.mark.parametrize("schedule", WITH_END_POINT)
@pytest.mark.parametrize("num_timesteps", [100, 1000])
def test_matched_schedule_leaves_as_much_of_any_data_in_x_T_as_linear(schedule: Schedule, num_timesteps: int) -> None:
    betas = make_betas(schedule, num_timesteps, beta_end=matching_beta_end(schedule, num_timesteps))
    linear = make_betas("linear", num_timesteps)
    for second_moment in (0.0, 0.25599, 0.3359477124183007, 1.0):
        # A product of 1000 rounded factors: 1000 * 1e-16, and L_T at E[x_0^2] = 0 goes as abar squared.
        assert prior_bits_per_dim(betas, second_moment) == pytest.approx(
            prior_bits_per_dim(linear, second_moment), rel=1e-12
        )


def test_matched_const_is_linears_geometric_mean_and_linear_itself() -> None:
    abar = final_abar(make_betas("linear", 1000))
    # The root of 1000 factors: relative accuracy of 1 - abar^(1/T) in float64 is 1e-14.
    assert matching_beta_end("const") == pytest.approx(-math.expm1(math.log(abar) / 1000), rel=1e-12)
    assert matching_beta_end("linear") == pytest.approx(0.02, rel=1e-13)


def test_quad_must_end_higher_than_linear_and_const_lower() -> None:
    assert matching_beta_end("quad") > 0.02 > matching_beta_end("const")


def test_bisection_ends_between_neighbouring_floats() -> None:
    end = matching_beta_end("quad")
    target = torch.log1p(-make_betas("linear", 1000)).sum()

    def excess(beta_end: float) -> float:
        return float(torch.log1p(-make_betas("quad", 1000, beta_end=beta_end)).sum() - target)

    assert excess(end) <= 0.0 < excess(math.nextafter(end, 0.0))


@pytest.mark.parametrize("schedule", ["jsd", "cosine"])
def test_schedules_without_an_end_point_are_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="no end point"):
        matching_beta_end(schedule)


def test_unreachable_level_is_refused() -> None:
    with pytest.raises(ValueError, match="no beta_end"):
        matching_beta_end("linear", 1000, beta_start=0.5)


def test_check_warns_of_quad_with_linears_ends_and_names_both_levels() -> None:
    with pytest.warns(UserWarning, match="above the linear schedule's"):
        check = check_prior(make_betas("quad"), 1.0)
    # Values of an independent program, at E[x_0^2] = 1
    assert check.bits_per_dim == pytest.approx(5.292393582830287e-04, rel=1e-9)
    assert check.reference_bits_per_dim == pytest.approx(2.911294542030787e-05, rel=1e-9)
    assert not check.met


@pytest.mark.parametrize(
    ("schedule", "beta_end"),
    [("linear", None), ("const", 0.02), ("jsd", 0.02), *[(schedule, None) for schedule in WITH_END_POINT]],
)
def test_check_is_silent_at_or_below_the_linear_level(schedule: Schedule, beta_end: float | None) -> None:
    betas = make_betas(schedule, beta_end=beta_end or matching_beta_end(schedule))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check = check_prior(betas, 0.256)
    assert check.met
