"""Cases whose answer is known: x_0 ~ N(0, s^2 I) with its optimal predictor, and tables recomputed in plain Python.

Nothing here reads a table of GaussianDiffusion: alphas_cumprod comes from the betas by a Python product, the moments
from the joint Gaussian of x_{t-1} and x_t.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor

from ddpm_core.configs import Schedule
from ddpm_core.metrics import FeatureStatistics

ANCHORS: dict[str, Any] = json.loads((Path(__file__).parent / "anchors.json").read_text())
SCHEDULES_WITH_ANCHORS: tuple[Schedule, ...] = ("linear", "quad", "const")
LOG2 = math.log(2.0)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """The code as a user runs it: without pytest's check of annotations, which would refuse bad input first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def scalars(*values: float) -> Tensor:
    """One-pixel images, float64 [B,1,1,1]."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def cumulative(betas: Tensor) -> list[float]:
    """abar_1..abar_T as a running product of Python floats."""
    abar, values = 1.0, []
    for beta in betas.tolist():
        abar *= 1.0 - beta
        values.append(abar)
    return values


def centred_statistics(n: int, cov: Tensor) -> FeatureStatistics:
    """Those of n features whose mean is 0 and whose covariance (ddof = 1) is `cov`, float64 [d, d]."""
    count, zero = torch.tensor(n, dtype=torch.float64), torch.zeros(len(cov), dtype=torch.float64)
    result = FeatureStatistics(len(cov))
    result.merge_state({"n": count, "sum": zero, "outer": (n - 1) * cov})
    return result


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normals, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(features: Tensor) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    result.update(features)
    return result


class GaussianData:
    """Pixels drawn from N(0, s2), independent; the predictor that minimises every loss."""

    def __init__(self, betas: Tensor, s2: float) -> None:
        self.s2 = s2
        self.betas = betas.tolist()
        self.abar = cumulative(betas)

    def marginal(self, t: int) -> float:
        """The variance of x_t."""
        return self.abar[t] * self.s2 + 1.0 - self.abar[t]

    def xstart_gain(self, t: int) -> float:
        """E[x_0|x_t] = gain x_t."""
        return math.sqrt(self.abar[t]) * self.s2 / self.marginal(t)

    def xstart_variance(self, t: int) -> float:
        """Var[x_0|x_t]."""
        return self.s2 * (1.0 - self.abar[t]) / self.marginal(t)

    def xprev_gain(self, t: int) -> float:
        """E[x_{t-1}|x_t] = gain x_t: the covariance of x_{t-1} and x_t over the variance of x_t."""
        before = self.marginal(t - 1) if t > 0 else self.s2
        return math.sqrt(1.0 - self.betas[t]) * before / self.marginal(t)

    def xprev_variance(self, t: int) -> float:
        """Var[x_{t-1}|x_t], the best variance that p_theta(x_{t-1}|x_t) can have."""
        before = self.marginal(t - 1) if t > 0 else self.s2
        return before - self.xprev_gain(t) ** 2 * self.marginal(t)

    def gain(self, mean_type: str, t: int) -> float:
        """The optimal prediction of `mean_type` is gain x_t."""
        a, b = math.sqrt(self.abar[t]), math.sqrt(1.0 - self.abar[t])
        eps = b / self.marginal(t)  # E[eps|x_t] = Cov(eps, x_t) / Var(x_t) x_t
        if mean_type == "eps":
            return eps
        if mean_type == "xstart":
            return self.xstart_gain(t)
        if mean_type == "xprev":
            return self.xprev_gain(t)
        return a * eps - b * self.xstart_gain(t)

    def predictor(
        self, mean_type: str = "eps", extra: Callable[[int], float] | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoise_fn; `extra`(t) fills the channels of a learned variance."""
        gains = torch.tensor([self.gain(mean_type, t) for t in range(len(self.abar))], dtype=torch.float64)
        extras = None if extra is None else torch.tensor([extra(t) for t in range(len(self.abar))], dtype=torch.float64)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            mean = gains[t].to(x.dtype).reshape(-1, 1, 1, 1) * x
            if extras is None:
                return mean
            return torch.cat([mean, extras[t].to(x.dtype).reshape(-1, 1, 1, 1).expand_as(x)], dim=1)

        return denoise


def constant(value: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that says `value` whatever it is asked."""
    return lambda x, t: value.to(x.dtype).expand_as(x)
