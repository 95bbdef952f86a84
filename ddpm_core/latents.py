"""Experiments with the latents x_t: interpolation, shared latents, progressive generation (section 4.3, 4.4 and appendix
D), each on top of the samplers.

`depth` says how many diffusion steps an image has behind it: the paper's t, 0..T, as its figures are labelled. Depth 0 is
the image itself; depth d > 0 is x_t at the code's timestep t = d - 1. Every noise is an argument. Sampler options
(method, steps, spacing, eta, clip_denoised) are those of `ddpm_core.samplers.sample`.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.samplers import Noise, SamplerOptions, Step, sample, sample_steps, select_timesteps


class Progression(NamedTuple):
    """The captured x_0-predictions by timestep, in the order of generation, and the finished samples."""

    predictions: dict[int, Tensor]
    sample: Tensor


def encode(
    diffusion: GaussianDiffusion, x_start: Float[Tensor, "b c h w"], depth: int, noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """x_t ~ q(x_t|x_0) at `depth` (Eq. 4): the stochastic encoder of section 4.4."""
    _check_depth(diffusion, depth)
    if depth == 0:
        return x_start
    t = torch.full((len(x_start),), depth - 1, device=x_start.device)  # the paper's t minus one
    return diffusion.q_sample(x_start, t, noise)


def decode(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    x_t: Float[Tensor, "b c h w"],
    depth: int,
    noise: Noise,
    **options: Unpack[SamplerOptions],
) -> Float[Tensor, "b c h w"]:
    """x_0 ~ p_theta(x_0|x_t): the reverse process from `depth` on."""
    _check_depth(diffusion, depth)
    if depth == 0:
        return x_t
    return sample(diffusion, denoise_fn, tuple(x_t.shape), noise=noise, start=(x_t, depth - 1), **options)


def mix_latents(
    diffusion: GaussianDiffusion,
    sources: tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]],
    weight: float,
    depth: int,
    *,
    encoder_noise: tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]],
) -> Float[Tensor, "b c h w"]:
    """(1 - weight) x_t + weight x'_t of two noised images: weight 0 is the first, 1 the second.

    It mixes the noised latents, as the released code does; the formula of section 4.4 prints x_0. The mix's noise has
    variance (1-abar_t) ((1 - weight)^2 + weight^2), half the nominal at weight 1/2: the network takes it for a less noisy
    image. Raises ValueError if the weight is outside [0, 1].
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight is {weight}: it must lie in [0, 1], from the first image to the second")
    keep = 1.0 - weight
    # x_t is linear in (x_0, eps): mixing both before Eq. 4 mixes the noised latents.
    noise = keep * encoder_noise[0] + weight * encoder_noise[1]
    return encode(diffusion, keep * sources[0] + weight * sources[1], depth, noise)


def interpolate(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    sources: tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]],
    weights: Sequence[float],
    depth: int,
    *,
    encoder_noise: tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]],
    noise: Noise,
    **options: Unpack[SamplerOptions],
) -> Float[Tensor, "weights b c h w"]:
    """Images [len(weights),B,C,H,W] between `sources`, mixed at `depth` and sampled back (section 4.4, Fig. 8).

    All weights share the encoder's two noises ("we fixed the noise for different values of lambda") and the reverse
    process's, so that weight 0 and 1 are the sources' reconstructions. noise: address -> [B,C,H,W], as for one weight.
    """
    mixed = [mix_latents(diffusion, sources, weight, depth, encoder_noise=encoder_noise) for weight in weights]
    count = len(weights)
    # One chain for the whole row: a batch of len(weights) * B, its noise repeated for each weight.
    row = decode(
        diffusion, denoise_fn, torch.cat(mixed), depth, lambda address: noise(address).repeat(count, 1, 1, 1), **options
    )
    return row.unflatten(0, (count, -1))


def draw_latent(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    shape: tuple[int, ...],
    depth: int,
    *,
    noise: Noise,
    **options: Unpack[SamplerOptions],
) -> Float[Tensor, "b c h w"]:
    """x_t of a chain from the prior, stopped at `depth` (1..T): what samples of Fig. 7 share. `decode` goes on from it.

    With the same noise and method ancestral or ddim, stopping and going on is the undivided chain. Raises
    ValueError if that chain, given fewer `steps`, does not visit the depth.
    """
    _check_depth(diffusion, depth)
    T = diffusion.num_timesteps
    visited = select_timesteps(
        T, options.get("steps") or T, options.get("spacing", "uniform"), diffusion.alphas_cumprod
    )
    if depth == T:
        return noise(T)
    if depth - 1 not in visited[:-1]:
        depths = [t + 1 for t in visited[:-1]]
        named = f"{', '.join(map(str, depths[:12]))}{', ..' if len(depths) > 12 else ''}"
        raise ValueError(
            f"depth is {depth}: a chain of {len(visited)} steps does not stop there; take one of {named}, {T}, or other steps"
        )
    before = visited[visited.index(depth - 1) + 1]  # the timestep whose step ends at `depth`
    chain = sample_steps(diffusion, denoise_fn, shape, noise=noise, **options)
    return next(step.x for step in chain if step.t == before)


def share_latent(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    shape: tuple[int, ...],
    depth: int,
    count: int,
    *,
    latent_noise: Noise,
    noise: Noise,
    **options: Unpack[SamplerOptions],
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b count c h w"]]:
    """(x_t, `count` samples from p_theta(x_0|x_t) for each): images that share their x_t at `depth` (Fig. 7, appendix D).

    shape: [B,C,H,W] of the latents. latent_noise: address -> [B,C,H,W], of the chains from the prior down to x_t. noise:
    address -> [B*count,C,H,W], a stream of its own for each sample after it; those of one latent stand together.
    """
    x_t = draw_latent(diffusion, denoise_fn, shape, depth, noise=latent_noise, **options)
    samples = decode(diffusion, denoise_fn, x_t.repeat_interleave(count, 0), depth, noise, **options)
    return x_t, samples.unflatten(0, (len(x_t), count))


def capture(chain: Iterable[Step], timesteps: Collection[int]) -> Progression:
    """Run a chain of `sample_steps` to its end and keep the x_0 predicted at `timesteps` alone (Fig. 6 and 14, Eq. 15).

    Raises ValueError if the chain does not visit one of them.
    """
    predictions: dict[int, Tensor] = {}
    x: Tensor | None = None
    for step in chain:
        x = step.x
        if step.t in timesteps:
            predictions[step.t] = step.pred_xstart
    missing = sorted(set(timesteps) - predictions.keys())
    if missing or x is None:
        raise ValueError(
            f"timesteps {missing} are not visited by this chain: take some that it visits, or all its steps"
        )
    return Progression(predictions, x)


def _check_depth(diffusion: GaussianDiffusion, depth: int) -> None:
    if not 0 <= depth <= diffusion.num_timesteps:
        raise ValueError(f"depth is {depth}: it must lie in 0..{diffusion.num_timesteps}, the steps of this process")
