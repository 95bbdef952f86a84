"""From noise to images: ancestral sampling (Algorithm 2), DDIM, and DPM-Solver++(2M), behind one signature."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddpm_core.checks import check_images
from ddpm_core.configs import Method, Spacing, check_choice
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.timesteps import select_timesteps as select_timesteps

Noise = Callable[[int], Tensor]  # address -> [B,C,H,W]: T gives x_T, a timestep the noise drawn there


class SamplerOptions(TypedDict, total=False):
    """What `sample_steps` takes by name, apart from the noise and the start."""

    method: Method
    steps: int | None
    spacing: Spacing
    eta: float
    clip_denoised: bool


class Step(NamedTuple):
    """One step of a chain: the timestep t it left, the state it reached, the x_0 predicted at t (Eq. 15)."""

    t: int
    x: Tensor
    pred_xstart: Tensor


def sample_steps(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    shape: tuple[int, ...],
    *,
    noise: Noise | Tensor,
    method: Method = "ancestral",
    steps: int | None = None,
    spacing: Spacing = "uniform",
    eta: float = 0.0,
    clip_denoised: bool = True,
    start: tuple[Tensor, int] | None = None,
) -> Iterator[Step]:
    """Yields each step of a sampling chain, so that a caller keeps what it wants and no more.

    shape: [B,C,H,W]. noise: a function from an address to noise of that shape (ddpm_core.rng.SampleNoise), or, if
    nothing but x_T is drawn (dpmpp_2m; ddim with eta 0), the tensor x_T itself. steps: how many of the T timesteps to
    visit (all by default). eta: DDIM's stochasticity, 0 to 1 (Song et al. 2021, Eq. 16). clip_denoised: clip every
    predicted x_0 to [-1, 1], as Ho's code does. start: (x_t, t) to begin at timestep t from a given x_t instead of
    x_T; the chain then visits the selected timesteps up to t, and t itself.

    The last state is not clipped. Runs without gradients. Raises ValueError for arguments that do not fit together.
    """
    _check_method(method, eta, noise)
    T = diffusion.num_timesteps
    timesteps = select_timesteps(T, T if steps is None else steps, spacing, diffusion.alphas_cumprod)
    draw: Noise = (lambda address: noise) if isinstance(noise, Tensor) else noise
    if start is None:
        x = draw(T)
    else:
        x, first = start
        if not 0 <= first < T:
            raise ValueError(f"start is at timestep {first}: it must lie in 0..{T - 1}")
        timesteps = [t for t in timesteps if t < first] + [first]
    check_images("the initial noise" if start is None else "start", x, finite=True)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"the initial noise is {list(x.shape)}: shape {list(shape)} was asked for")
    x = x.detach()
    chain = diffusion.strided(timesteps)
    if method == "ancestral":
        yield from _ancestral(chain, denoise_fn, x, draw, timesteps, clip_denoised)
    elif method == "ddim":
        yield from _ddim(chain, denoise_fn, x, draw, timesteps, clip_denoised, eta)
    else:
        yield from _dpmpp_2m(chain, denoise_fn, x, timesteps, clip_denoised, last_order=2 if "second" in method else 1)


def _check_method(method: Method, eta: float, noise: Noise | Tensor) -> None:
    """ValueError unless eta and the kind of noise are those that the method takes."""
    check_choice("method", method, Method)
    if eta != 0.0 and (method != "ddim" or not 0.0 <= eta <= 1.0):
        raise ValueError(f"eta is {eta} with method {method!r}: it belongs to method 'ddim' and lies in [0, 1]")
    if isinstance(noise, Tensor) and (method == "ancestral" or eta != 0.0):
        raise ValueError(
            f"noise is a tensor, but method {method!r} with eta {eta} draws noise at every step: give a function of "
            "the address, such as ddpm_core.rng.SampleNoise"
        )


def sample(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    shape: tuple[int, ...],
    *,
    noise: Noise | Tensor,
    start: tuple[Tensor, int] | None = None,
    **options: Unpack[SamplerOptions],
) -> Float[Tensor, "b c h w"]:
    """The end of the chain of `sample_steps`: images [B,C,H,W], nominally in [-1, 1], not clipped."""
    for step in sample_steps(diffusion, denoise_fn, shape, noise=noise, start=start, **options):
        last = step
    return last.x


def _timestep(x: Tensor, i: int) -> Int[Tensor, " b"]:
    """Step i of the chain for every image."""
    return torch.full((len(x),), i, device=x.device)


@torch.no_grad()
def _predict_xstart(chain: GaussianDiffusion, denoise_fn: DenoiseFn, x: Tensor, i: int, clip: bool) -> Tensor:
    """The x_0 predicted at step i (Eq. 15)."""
    return chain.p_mean_variance(denoise_fn, x, _timestep(x, i), clip).pred_xstart


def _ancestral(
    chain: GaussianDiffusion, denoise_fn: DenoiseFn, x: Tensor, noise: Noise, timesteps: list[int], clip: bool
) -> Iterator[Step]:
    """x_{t-1} ~ p_theta(x_{t-1}|x_t), Algorithm 2, over the strided chain's own posterior."""
    for i, t in reversed(list(enumerate(timesteps))):
        # No noise at the last step: "we display mu_theta(x_1, 1) noiselessly" (section 3.3).
        z = noise(t) if i > 0 else torch.zeros_like(x)
        with torch.no_grad():
            x, pred_xstart = chain.p_sample(denoise_fn, x, _timestep(x, i), z, clip)
        yield Step(t, x, pred_xstart)


def _ddim(
    chain: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    x: Tensor,
    noise: Noise,
    timesteps: list[int],
    clip: bool,
    eta: float,
) -> Iterator[Step]:
    """Song, Meng & Ermon 2021, Eq. 12, with sigma = eta sqrt(beta-tilde) of the strided chain (Eq. 16)."""
    for i, t in reversed(list(enumerate(timesteps))):
        pred_xstart = _predict_xstart(chain, denoise_fn, x, i, clip)
        eps = chain.predict_eps_from_xstart(x, _timestep(x, i), pred_xstart)
        # In float64: 1 - abar_1 - sigma_1^2 is 5e-5, of which float32 would lose the third digit.
        abar_prev = chain.alphas_cumprod_prev[i]
        variance = eta**2 * chain.posterior_variance[i]
        direction = (1.0 - abar_prev - variance).clamp(min=0.0).sqrt()
        # Eq. 12: x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma z
        x = abar_prev.sqrt().to(x.dtype) * pred_xstart + direction.to(x.dtype) * eps
        if eta > 0.0 and i > 0:
            x = x + variance.sqrt().to(x.dtype) * noise(t)
        yield Step(t, x, pred_xstart)


def _dpmpp_2m(
    chain: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    x: Tensor,
    timesteps: list[int],
    clip: bool,
    last_order: Literal[1, 2],
) -> Iterator[Step]:
    """Lu et al. 2022 (arXiv:2211.01095), Algorithm 2: second order, multistep, in lambda = ln(sqrt(abar)/sqrt(1-abar)).

    The first step has no history. The last one goes to sigma = 0, where the formula's limit is the predicted x_0.
    last_order: of the one before it, to the first timestep. Published code has it of second order (diffusers), or of first
    in fewer than 10 or 15 steps (the authors' `lower_order_final`). Here it is of first order by default: with uniform
    timesteps it is much the longest in lambda, and extrapolates far beyond what two predictions know."""
    abar = chain.alphas_cumprod
    alpha, sigma = abar.sqrt(), (1.0 - abar).sqrt()
    lam = alpha.log() - sigma.log()
    previous: Tensor | None = None
    for i, t in reversed(list(enumerate(timesteps))):
        pred_xstart = _predict_xstart(chain, denoise_fn, x, i, clip)
        if i == 0:
            x = pred_xstart
        else:
            h = lam[i - 1] - lam[i]
            data = pred_xstart
            if previous is not None and (i > 1 or last_order == 2):
                # D = (1 + 1/(2r)) x_0(t_i) - 1/(2r) x_0(t_{i+1}), r = h_{i+1} / h_i
                ratio = (lam[i] - lam[i + 1]) / h
                data = pred_xstart + (pred_xstart - previous) * (0.5 / ratio).to(x.dtype)
            # x_{i-1} = sigma_{i-1} / sigma_i x_i - alpha_{i-1} (e^-h - 1) D
            x = (sigma[i - 1] / sigma[i]).to(x.dtype) * x - (alpha[i - 1] * torch.expm1(-h)).to(x.dtype) * data
        previous = pred_xstart
        yield Step(t, x, pred_xstart)
