"""The paper's constraint on schedules, L_T ~ 0 (section 4): a check of it, and the end point that meets it.

"A set of constant, linear, and quadratic schedules, all constrained so that L_T ~ 0": the paper does not publish the
constants of the first and the last. With linear's own end points quad misses linear's level 18 times over and const
stays far below it, so a sweep of schedules compares like with like only after `matching_beta_end`.
"""

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm_core.configs import WITHOUT_ENDS, Schedule
from ddpm_core.schedules import make_betas, prior_bits_per_dim

# Two schedules solved to the same level differ by rounding; this is far above it and far below any real difference.
_ROUNDING = 1e-9


class PriorCheck(NamedTuple):
    """L_T of a schedule beside that of the reference, both in bits/dim of the same data."""

    bits_per_dim: float
    reference_bits_per_dim: float
    second_moment: float  # E[x_0^2], x_0 in [-1, 1]
    met: bool  # bits_per_dim is not above the reference


def check_prior(
    betas: Float64[Tensor, " T"], second_moment: float, reference: Float64[Tensor, " T"] | None = None
) -> PriorCheck:
    """Does the schedule leave as little of x_0 in x_T as the paper's linear one (1e-4 to 0.02) with as many steps?

    second_moment: E[x_0^2] of the data over all pixels. reference: other betas to compare with. Warns (UserWarning)
    where L_T is above the reference. ValueError for a second moment that is none.
    """
    if not (math.isfinite(second_moment) and second_moment >= 0.0):
        raise ValueError(f"second_moment is {second_moment}: it must be the data's E[x_0^2], 0 or more")
    level = prior_bits_per_dim(_linear(len(betas)) if reference is None else reference, second_moment)
    bits = prior_bits_per_dim(betas, second_moment)
    met = bits <= level * (1.0 + _ROUNDING)
    if not met:
        warnings.warn(
            f"L_T is {bits:.3g} bits/dim, above the reference schedule's {level:.3g}: x_T keeps a trace of the images that "
            "sampling from N(0, I) does not have; raise beta_end (ddpm_core.priors.matching_beta_end) or num_timesteps",
            UserWarning,
            stacklevel=2,
        )
    return PriorCheck(bits, level, second_moment, met)


def matching_beta_end(
    schedule: Schedule,
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    *,
    reference: Float64[Tensor, " T"] | None = None,
) -> float:
    """The beta_end at which `schedule` has the L_T of the paper's linear one with as many steps, for any data.

    L_T rises with abar_T whatever E[x_0^2] is (its derivative is (a/(1-a) + E[x_0^2]) / 2 > 0), so equal L_T is equal
    abar_T, and abar_T falls as beta_end rises: a bisection between neighbouring float64 finds it.
    reference: other betas to match. ValueError for a schedule without an end point (jsd, cosine) and where no end point
    in (0, 1] reaches the level.
    """
    if schedule in WITHOUT_ENDS:
        raise ValueError(
            f"schedule is {schedule!r}: it has no end point to solve for, its num_timesteps alone fixes abar_T; "
            "take linear, quad, const, warmup10 or warmup50"
        )

    def excess(beta_end: float) -> float:
        """ln abar_T above the reference's: falls as beta_end rises."""
        return _log_abar(make_betas(schedule, num_timesteps, beta_start, beta_end)) - target

    target = _log_abar(_linear(num_timesteps) if reference is None else reference)
    low, high = torch.finfo(torch.float64).tiny, 1.0
    if excess(low) < 0.0 or excess(high) > 0.0:
        raise ValueError(
            f"no beta_end in (0, 1] gives {schedule!r} the level ln abar_T = {target:.6g} with num_timesteps "
            f"{num_timesteps} and beta_start {beta_start:g}: take a smaller beta_start or other num_timesteps"
        )
    while low < (middle := 0.5 * (low + high)) < high:
        if excess(middle) > 0.0:
            low = middle
        else:
            high = middle
    return high


def _linear(num_timesteps: int) -> Tensor:
    return make_betas("linear", num_timesteps, 1e-4, 0.02)


def _log_abar(betas: Tensor) -> float:
    """ln abar_T; log1p keeps the digits of small betas."""
    return float(torch.log1p(-betas).sum())
