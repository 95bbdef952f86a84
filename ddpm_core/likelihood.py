"""The variational bound in bits/dim, term by term (paper, Eq. 5 and section 4.3), and rate against distortion (Fig. 5).

    L = L_T + sum of L_t, t = 1..T-1 + L_0        here: prior + terms[:, 1:] + terms[:, 0]

As in the authors' code every t has its own fresh x_t ~ q(x_t|x_0), not one trajectory. The full bound takes T forward
passes an image; `estimate_bound` takes fewer and says how far off it may be.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ddpm_core import rng
from ddpm_core.configs import Cdf
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.pixel_range import SCALE
from ddpm_core.samplers import Noise


@dataclass(frozen=True)
class Bound:
    """The bound of B images, float64 in bits/dim."""

    terms: Float64[Tensor, "b T"]  # L_0 first, then L_1..L_{T-1}
    prior: Float64[Tensor, " b"]  # L_T
    mse: Float64[Tensor, "b T"]  # mean over pixels of (x_0 - predicted x_0)^2 at each t, in [-1, 1] units

    @property
    def total(self) -> Float64[Tensor, " b"]:
        """The whole bound L."""
        return self.prior + self.terms.sum(1)


class RateDistortion(NamedTuple):
    """Fig. 5 and Table 4, float64 [T]; entry i is for who has received the paper's x_{i+1}, in Table 4 the row T - i."""

    rate: Tensor  # bits/dim
    distortion: Tensor  # root mean square error of the predicted x_0, on the scale 0..255


@torch.no_grad()
def bound_term(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    x_start: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    *,
    clip_denoised: bool = True,
    cdf: Cdf = "exact",
) -> tuple[Float64[Tensor, " b"], Float64[Tensor, " b"]]:
    """(the term at t in bits/dim, the MSE of the predicted x_0), at one x_t = q_sample(x_start, t, noise) an image."""
    x_t = diffusion.q_sample(x_start, t, noise)
    term, pred_xstart = diffusion.vb_terms_bpd(denoise_fn, x_start, x_t, t, clip_denoised, cdf)
    mse = (x_start - pred_xstart).square().flatten(1).mean(1)
    return term.to(torch.float64), mse.to(torch.float64)


def variational_bound(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    x_start: Float[Tensor, "b c h w"],
    noise: Noise,
    *,
    clip_denoised: bool = True,
    cdf: Cdf = "exact",
) -> Bound:
    """Every term of the bound, one timestep after the other: T forward passes, no image kept.

    x_start: 8-bit images in [-1, 1]. noise: address t in 0..T-1 -> the eps of x_t, [B,C,H,W]. clip_denoised: clip the
    predicted x_0 to [-1, 1], as the authors evaluate. cdf: the decoder's normal CDF, exact, or tanh for the authors'
    approximation. With `diffusion.strided(...)` it is the bound of that shorter chain, a model of its own.
    Raises ValueError for images outside [-1, 1].
    """
    _check_range(x_start)
    terms, errors = [], []
    for i in range(diffusion.num_timesteps):
        t = torch.full((len(x_start),), i, device=x_start.device)
        term, mse = bound_term(diffusion, denoise_fn, x_start, t, noise(i), clip_denoised=clip_denoised, cdf=cdf)
        terms.append(term)
        errors.append(mse)
    return Bound(torch.stack(terms, dim=1), diffusion.prior_bpd(x_start), torch.stack(errors, dim=1))


def rate_distortion(bound: Bound) -> RateDistortion:
    """Rate and distortion over the images of `bound` (section 4.3, Algorithms 3 and 4).

    Having x_t (paper's t) has cost rate = L_T + L_{T-1} + .. + L_t, and the image shown is the x_0 predicted from it. The
    paper does not say how its RMSE averages over images; here it is the root of their mean MSE.
    """
    # Algorithm 3: who sends x_t has sent L_T + L_{T-1} + .. + L_t.
    later = bound.terms.flip(1).cumsum(1).flip(1) - bound.terms  # of column i: the terms i+1..T-1
    return RateDistortion((bound.prior[:, None] + later).mean(0), SCALE * bound.mse.mean(0).sqrt())


@dataclass(frozen=True)
class BoundEstimate:
    """An unbiased estimate of the bound of each of B images, float64 in bits/dim.

    The images' draws of t and noise are independent: the standard error of a mean over images is that of any sample.
    """

    total: Float64[Tensor, " b"]
    prior: Float64[Tensor, " b"]  # L_T, exact
    decoder: Float64[Tensor, " b"]  # L_0, evaluated for every image
    mse: Float64[Tensor, " b"]  # mean over pixels of (x_0 - the x_0 predicted from x_1)^2, in [-1, 1] units


def stratify(num_timesteps: int, strata: int) -> list[range]:
    """1..T-1 cut into `strata` consecutive ranges whose lengths grow in proportion to t.

    The terms fall about like 1/t, so that each range then contributes about the same variance.
    Raises ValueError if there are more strata than timesteps.
    """
    if not 1 <= strata <= num_timesteps - 1:
        raise ValueError(f"strata is {strata}: it must lie in 1..{num_timesteps - 1}, the number of terms L_1..L_(T-1)")
    edges = [1]  # T^(k / strata), at least 1 apart, with room for the strata that follow
    for k in range(1, strata + 1):
        edge = round(num_timesteps ** (k / strata))
        edges.append(min(max(edge, edges[-1] + 1), num_timesteps - (strata - k)))
    return [range(low, high) for low, high in itertools.pairwise(edges)]


def estimate_bound(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    x_start: Float[Tensor, "b c h w"],
    noise: Noise,
    *,
    seed: int,
    indices: Int[Tensor, " b"],
    strata: int = 32,
    clip_denoised: bool = True,
    cdf: Cdf = "exact",
) -> BoundEstimate:
    """The bound from 1 + strata forward passes an image instead of T, without bias.

    L_0, half of the whole, is always evaluated. In each stratum of `stratify` every image draws a timestep of its own,
    uniformly; its term times the stratum's length estimates the stratum's sum. The timesteps are a function of (seed,
    image index, stratum). indices: the images' numbers in the data set, on their device. noise: address j -> [B,C,H,W], 0
    for L_0 and 1, 2, .. for the strata in their order. With T-1 strata it is the full loop. Raises ValueError for images
    outside [-1, 1] and a number of strata that does not fit.
    """
    _check_range(x_start)
    ranges = stratify(diffusion.num_timesteps, strata)
    t = torch.zeros_like(indices)
    decoder, mse = bound_term(diffusion, denoise_fn, x_start, t, noise(0), clip_denoised=clip_denoised, cdf=cdf)
    prior = diffusion.prior_bpd(x_start)
    total = prior + decoder
    for address, stratum in enumerate(ranges, 1):
        t = stratum.start + rng.integers(seed, "bound", indices, address, len(stratum))
        term, _ = bound_term(diffusion, denoise_fn, x_start, t, noise(address), clip_denoised=clip_denoised, cdf=cdf)
        total = total + len(stratum) * term  # a draw of probability 1 / length, weighed by its inverse
    return BoundEstimate(total, prior, decoder, mse)


def _check_range(x_start: Tensor) -> None:
    low, high = x_start.aminmax()
    if not bool((low >= -1.0) & (high <= 1.0)):  # also False for NaN
        raise ValueError(
            f"x_start runs from {low:g} to {high:g}: 8-bit images scaled to [-1, 1] are wanted "
            "(ddpm_core.images.to_float makes them)"
        )
