"""Variance schedules beta_1..beta_T of the forward process (paper, section 2 and 4), in float64."""

import math

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm_core.configs import Schedule, check_schedule

__all__ = ["Schedule", "make_betas", "prior_bits_per_dim"]


def make_betas(
    schedule: Schedule, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64[Tensor, " T"]:
    """beta_1..beta_T, float64 [T], each in (0, 1].

    linear, quad, const, warmup10, warmup50 and jsd are those of Ho's code; cosine is Nichol & Dhariwal 2021,
    Eq. 17, clipped at 0.999. const uses only beta_end; jsd and cosine use neither end. What Stable Diffusion calls
    linear is `quad` here. ValueError for an unknown name or values that are no variances.
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
        betas = 1.0 / np.linspace(T, 1, T)
    elif schedule == "cosine":
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
    # -ln(1-a) - a cancels to a^2/2 + a^3/3 + ...; below 1e-3 the series is exact to float64.
    gap = sum(abar**k / k for k in range(2, 9)) if abar < 1e-3 else -math.log1p(-abar) - abar
    return 0.5 * (gap + abar * second_moment) / math.log(2.0)
