"""Variance schedules beta_1..beta_T of the forward process (paper, section 2 and 4), in float64, and their L_T.

"A set of constant, linear, and quadratic schedules, all constrained so that L_T ~ 0" (section 4): the paper does not publish
the constants of the first and the last. With linear's own ends quad misses linear's level 18 times over and const stays far
below it, so a sweep of schedules compares like with like only after `matching_beta_end`.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm_core.configs import WITHOUT_ENDS, Schedule, check_schedule

# Two schedules solved to the same level differ by rounding; this is far above it and far below any real difference.
_ROUNDING = 1e-9


def make_betas(
    schedule: Schedule, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64[Tensor, " T"]:
    """beta_1..beta_T, float64 [T], each in (0, 1].

    linear, quad, const, warmup10, warmup50 and jsd are those of Ho's code; cosine is Nichol & Dhariwal 2021,
    Eq. 17, clipped at 0.999. const uses only beta_end; jsd and cosine use neither end. What Stable Diffusion calls
    linear is `quad` here. Raises ValueError for an unknown name or values that are no variances.
    """
    check_schedule(schedule, num_timesteps, beta_start, beta_end)
    T = num_timesteps
    if schedule == "linear":
        betas = np.linspace(beta_start, beta_end, T)
    elif schedule == "quad":
        betas = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T) ** 2
    elif schedule == "const":
        betas = np.full(T, beta_end)
    elif schedule == "jsd":
        betas = 1.0 / np.linspace(T, 1, T)  # abar_t = 1 - t/T
    elif schedule == "cosine":
        # Nichol & Dhariwal 2021, Eq. 17: abar_t = f(t) / f(0), f(t) = cos^2((t/T + 0.008) / 1.008 pi/2)
        u = np.arange(T + 1) / T
        alphas_cumprod = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    else:
        warm = int(T * (0.1 if schedule == "warmup10" else 0.5))
        betas = np.full(T, beta_end)
        betas[:warm] = np.linspace(beta_start, beta_end, warm)
    return torch.from_numpy(betas)


def prior_bits_per_dim(betas: Float64[Tensor, " T"], second_moment: float) -> float:
    """L_T = KL(q(x_T|x_0) || N(0, I)) in bits/dim, averaged over data with E[x_0^2] = `second_moment`.

    Paper, Eq. 5 and section 4: 0.5 (-ln(1-abar_T) - abar_T + abar_T E[x_0^2]) / ln 2. Infinite when abar_T is 1.
    """
    if not 0.0 <= second_moment < math.inf:
        raise ValueError(f"second_moment is {second_moment}: a mean square is wanted, 1 or less for pixels in [-1, 1]")
    abar = float(torch.cumprod(1.0 - betas, 0)[-1])
    if abar >= 1.0:
        return math.inf
    # Eq. 5: L_T = 0.5 (-ln(1-abar_T) - abar_T + abar_T E[x_0^2]) / ln 2.
    # -ln(1-a) - a cancels to a^2/2 + a^3/3 + ...; below 1e-3 the series is exact to float64.
    gap = sum(abar**k / k for k in range(2, 9)) if abar < 1e-3 else -math.log1p(-abar) - abar
    return 0.5 * (gap + abar * second_moment) / math.log(2.0)


class PriorCheck(NamedTuple):
    """L_T of a schedule beside that of the reference, both in bits/dim of the same data."""

    bits_per_dim: float
    reference_bits_per_dim: float
    met: bool  # bits_per_dim is not above the reference


def check_prior(betas: Float64[Tensor, " T"], second_moment: float) -> PriorCheck:
    """Does the schedule leave as little of x_0 in x_T as the paper's linear one (1e-4 to 0.02) with as many steps?

    second_moment: E[x_0^2] of the data over all pixels, x_0 in [-1, 1]. Warns (UserWarning) if L_T is above linear's.
    Raises ValueError if the second moment is negative or not finite.
    """
    reference = prior_bits_per_dim(_linear(len(betas)), second_moment)
    bits = prior_bits_per_dim(betas, second_moment)
    met = bits <= reference * (1.0 + _ROUNDING)
    if not met:
        warnings.warn(
            f"L_T is {bits:.3g} bits/dim, above the linear schedule's {reference:.3g}: x_T keeps a trace of the images that "
            "sampling from N(0, I) does not have; raise beta_end (ddpm_core.schedules.matching_beta_end) or num_timesteps",
            UserWarning,
            stacklevel=2,
        )
    return PriorCheck(bits, reference, met)


def matching_beta_end(schedule: Schedule, num_timesteps: int = 1000, beta_start: float = 1e-4) -> float:
    """The beta_end at which `schedule` has the L_T of the paper's linear one with as many steps, for any data.

    L_T rises with abar_T whatever E[x_0^2] is (its derivative is (a/(1-a) + E[x_0^2]) / 2 > 0), so equal L_T is equal
    abar_T, and abar_T falls as beta_end rises: a bisection between neighbouring float64 finds it. Raises ValueError for a
    schedule without ends (jsd, cosine), and if no beta_end in (0, 1] reaches the level.
    """
    if schedule in WITHOUT_ENDS:
        raise ValueError(
            f"schedule is {schedule!r}: it has no end point to solve for, its num_timesteps alone fixes abar_T; "
            "take linear, quad, const, warmup10 or warmup50"
        )
    target = _log_abar(_linear(num_timesteps))

    def excess(beta_end: float) -> float:
        """ln abar_T above linear's: falls as beta_end rises."""
        return _log_abar(make_betas(schedule, num_timesteps, beta_start, beta_end)) - target

    low, high = torch.finfo(torch.float64).tiny, 1.0
    if excess(low) < 0.0 or excess(high) > 0.0:
        raise ValueError(
            f"no beta_end in (0, 1] gives {schedule!r} the level ln abar_T = {target:.6g} with num_timesteps "
            f"{num_timesteps} and beta_start {beta_start:g}: take a smaller beta_start or other num_timesteps"
        )
    while low < (middle := 0.5 * (low + high)) < high:
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    return high


def _linear(num_timesteps: int) -> Tensor:
    return make_betas("linear", num_timesteps, 1e-4, 0.02)


def _log_abar(betas: Tensor) -> float:
    """ln abar_T; log1p keeps the digits of small betas."""
    return float(torch.log1p(-betas).sum())
