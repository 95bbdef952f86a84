"""Gaussians as the bound needs them: their KL divergence, and the discretised decoder (paper, Eq. 13)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ddpm_core.configs import Cdf, check_choice


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) in nats, elementwise."""
    # 0.5 (-1 + ln s2^2 - ln s1^2 + s1^2 / s2^2 + (m1 - m2)^2 / s2^2); expm1 keeps the digits of nearly equal variances.
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(difference) - difference + (mean1 - mean2).square() * torch.exp(-log_variance2))


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)  # torch.special.ndtr is (1 + erf) / 2 and has no digits below 1e-16


def _normal_cdf_tanh(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))


def discretized_gaussian_log_likelihood(
    x: Float[Tensor, "b c h w"],
    mean: Float[Tensor, "b c h w"],
    log_scale: Float[Tensor, "*s"],
    cdf: Cdf = "exact",
) -> Float[Tensor, "b c h w"]:
    """ln p(x) of the decoder, Eq. 13: the Gaussian's mass on x's bin of width 2/255, the outer bins reaching to
    infinity; at least ln 1e-12 as in Ho's code. `tanh` is that code's approximation of the normal CDF.

    Computed in float64 and returned in the dtype of `mean`. x holds 8-bit pixels scaled to [-1, 1].
    """
    check_choice("cdf", cdf, Cdf)
    phi = _normal_cdf if cdf == "exact" else _normal_cdf_tanh
    centred = x.to(torch.float64) - mean.to(torch.float64)
    inv_scale = torch.exp(-log_scale.to(torch.float64))
    # Eq. 13: the integral of N(mean, scale^2) from x - 1/255 to x + 1/255
    upper = (centred + 1.0 / 255.0) * inv_scale
    lower = (centred - 1.0 / 255.0) * inv_scale
    # Both ends far to the right: Phi(u) - Phi(l) = Phi(-l) - Phi(-u) keeps the digits that 1 - 1 would lose.
    right = lower > 0
    inner = phi(torch.where(right, -lower, upper)) - phi(torch.where(right, -upper, lower))
    mass = torch.where(x < -0.999, phi(upper), torch.where(x > 0.999, phi(-lower), inner))
    return mass.clamp(min=1e-12).log().to(mean.dtype)
