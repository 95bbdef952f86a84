"""Which timesteps a sampler visits, and which of them a person is shown. Torch is imported for spacings that need a schedule."""

from typing import TYPE_CHECKING

from ddpm_core.configs import DiffusionConfig, Spacing, check_choice

if TYPE_CHECKING:
    import torch


def select_timesteps(
    num_timesteps: int, steps: int, spacing: Spacing = "uniform", alphas_cumprod: "torch.Tensor | None" = None
) -> list[int]:
    """`steps` timesteps of 0..num_timesteps-1, ascending, from 0; one alone is T-1, but 0 if leading.

    uniform: evenly from 0 to T-1. quadratic: squares of evenly spaced numbers up to 0.8 T, dense where little noise is
    left, as in the DDIM paper (Song et al. 2021, appendix D.2 and its code). leading: the multiples of T // steps, as that
    code's "uniform" takes them; they end T // steps before T. logsnr: evenly in lambda = ln(sqrt(abar)/sqrt(1-abar)) from
    T-1 to 0, as Lu et al. 2022 (arXiv:2211.01095) recommend for DPM-Solver++; it needs alphas_cumprod, float64 [T]. Equal
    neighbours are moved apart. Raises ValueError unless 1 <= steps <= num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps is {steps}: it must lie in 1..{num_timesteps}, the schedule's num_timesteps")
    check_choice("spacing", spacing, Spacing)
    if steps == num_timesteps:
        return list(range(num_timesteps))
    if spacing == "leading":
        return [i * (num_timesteps // steps) for i in range(steps)]
    if steps == 1:
        return [num_timesteps - 1]
    if spacing == "uniform":
        return [round(i * (num_timesteps - 1) / (steps - 1)) for i in range(steps)]
    if spacing == "logsnr":
        assert alphas_cumprod is not None
        wanted = _evenly_in_logsnr(alphas_cumprod, steps)
    else:
        wanted = [int(0.8 * num_timesteps * (i / (steps - 1)) ** 2) for i in range(steps)]
    timesteps: list[int] = []
    for i, t in enumerate(wanted):
        last = num_timesteps - steps + i  # leaves room for those that follow
        timesteps.append(min(max(t, timesteps[-1] + 1), last) if timesteps else min(t, last))
    return timesteps


def _evenly_in_logsnr(alphas_cumprod: "torch.Tensor", steps: int) -> list[int]:
    """The timesteps nearest to evenly spaced values of lambda, ascending in t; the last is T-1, whatever is left there."""
    import torch

    abar = alphas_cumprod.cpu().clamp(min=torch.finfo(torch.float64).tiny)
    lam = (abar.log() - torch.log1p(-abar)) / 2.0
    wanted = torch.linspace(float(lam[0]), float(lam[-1]), steps, dtype=torch.float64)
    return [int((lam - value).abs().argmin()) for value in wanted]


def visited_timesteps(process: DiffusionConfig, steps: int, spacing: Spacing) -> list[int]:
    """Those of `select_timesteps` for a process, ascending."""
    alphas_cumprod = process.build().alphas_cumprod if spacing == "logsnr" else None
    return select_timesteps(process.num_timesteps, steps, spacing, alphas_cumprod)


def progress_timesteps(process: DiffusionConfig, steps: int, spacing: Spacing, points: int) -> tuple[int, ...]:
    """Timesteps at evenly spaced places of a chain, from its first step to its last, in the order of generation."""
    visited = visited_timesteps(process, steps, spacing)[::-1]
    if points < 2:
        return tuple(visited[:points])
    places = {round(i * (len(visited) - 1) / (points - 1)) for i in range(points)}
    return tuple(visited[place] for place in sorted(places))


def coarse_to_fine_depths(num_timesteps: int) -> tuple[int, ...]:
    """The depths of Fig. 9's rows of `interpolate`: eighths of T from T, which leaves nothing of the sources, to 0, which
    mixes their pixels. For T = 1000: 1000, 875, .., 125, 0. Short processes have fewer rows."""
    return tuple(sorted({num_timesteps * eighths // 8 for eighths in range(9)}, reverse=True))
