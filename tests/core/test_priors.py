"""The constraint L_T ~ 0: the level it asks for, the warning, and the end point that meets it."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.priors import check_prior, matching_beta_end
from ddpm_core.schedules import Schedule, make_betas, prior_bits_per_dim

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
def test_prior_bits_have_the_positive_derivative_that_makes_equal_abar_equal_bits(
    abar: float, second_moment: float
) -> None:
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


def test_matched_const_is_the_geometric_mean_of_linear_and_linear_matches_itself() -> None:
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


def test_matching_another_reference() -> None:
    reference = make_betas("cosine", 50)
    betas = make_betas("quad", 50, beta_end=matching_beta_end("quad", 50, reference=reference))
    assert final_abar(betas) == pytest.approx(final_abar(reference), rel=1e-12)


@pytest.mark.parametrize("schedule", ["jsd", "cosine"])
def test_schedules_without_an_end_point_are_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="no end point"):
        matching_beta_end(schedule)


def test_unreachable_level_is_refused() -> None:
    with pytest.raises(ValueError, match="no beta_end"):
        matching_beta_end("linear", 1000, beta_start=0.5)


def test_check_warns_of_quad_with_the_published_end_points_and_names_both_levels() -> None:
    with pytest.warns(UserWarning, match="above the reference"):
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


@pytest.mark.parametrize("second_moment", [-0.1, math.nan, math.inf])
def test_second_moment_that_is_none_is_refused(second_moment: float) -> None:
    with pytest.raises(ValueError, match="second_moment"):
        check_prior(make_betas("linear"), second_moment)
