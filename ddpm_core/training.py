"""One training step (Algorithm 1) on a batch that the caller made. No loop, no data, no randomness of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.ema import Ema


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser: Adam without weight decay, linear warm-up from 0, a clip of the global gradient norm, EMA."""

    batch_size: int = 128
    """Images a step over all workers."""
    lr: float = 2e-4
    """Learning rate after the warm-up."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises from 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay of the first and second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon, added after the bias correction."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of the whole batch."""
    ema_decay: float = 0.9999
    """Of the averaged weights."""

    def __post_init__(self) -> None:
        for name, value in [("batch_size", self.batch_size), ("lr", self.lr), ("grad_clip", self.grad_clip)]:
            if not value > 0:
                raise ValueError(f"{name} is {value}: it must be positive")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}: it must be 0 or more")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay is {self.ema_decay}: it must lie in [0, 1)")

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`, counted from 0: as in Ho's code, the first of a warm-up is 0."""
        return self.lr * min(step / self.warmup_steps, 1.0) if self.warmup_steps else self.lr


class TrainState:
    """Everything a step reads and writes: model, EMA, optimizer, and `step`, the number of updates done."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.model = model
        self.ema = Ema(model, config.ema_decay)
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=config.lr, betas=config.adam_betas, eps=config.adam_eps
        )
        self.step = 0

    def to(self, device: torch.device) -> None:
        """Move weights and EMA to a device; to be called before the first step."""
        self.model.to(device)
        self.ema.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


class StepMetrics(NamedTuple):
    """What a step measured, left on the device: reading it is the caller's choice, and a synchronisation."""

    loss: Tensor  # of this worker's images, times their share of the global batch; the sum over workers is the loss
    grad_norm: Tensor  # of the global gradient, before the clip


def train_step(
    state: TrainState,
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    config: OptimConfig,
    *,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    world_size: int = 1,
) -> StepMetrics:
    """One update of weights and EMA from this worker's share of the global batch.

    x_start, noise: [b,C,H,W]; t: [b]. denoise_fn: the model, or its DistributedDataParallel wrapper, which averages
    gradients over `world_size` workers. The loss is the mean over the global batch of config.batch_size images,
    however they are shared out.
    """
    lr = config.learning_rate(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    loss = diffusion.training_losses(denoise_fn, x_start, t, noise).sum() / config.batch_size
    (loss * world_size).backward()  # the wrapper divides by world_size
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    state.optimizer.step()
    state.ema.update(state.step)
    state.step += 1
    return StepMetrics(loss.detach(), grad_norm.detach())
