"""Moving averages of the weights: exponential (paper, appendix B: decay 0.9999), and of a power function."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddpm_core.configs import EmaStart
from ddpm_core.posthoc_ema import exponent


class Ema:
    """Shadow weights in float32: shadow += (1 - d) (weight - shadow) after every update, one group of kernels for all.

    start: how update n = 0, 1, ... begins, without debiasing. copy: the first copies the weights, then d = decay, as in
    Ho's code. initial: d = decay at once, so the shadow remembers the initial weights, as TensorFlow's
    ExponentialMovingAverage by default. warmup: d = min(decay, (1 + n) / (10 + n)), as TensorFlow's with num_updates = n.
    """

    def __init__(self, model: nn.Module, decay: float, start: EmaStart = "copy") -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}: it must lie in [0, 1)")
        self.decay, self.start = decay, start
        self._weights = dict(model.named_parameters())  # the parameters themselves: they follow the model to a device
        self.shadow = {name: p.detach().clone() for name, p in self._weights.items()}

    def to(self, device: torch.device) -> None:
        """Move the shadow to a device, after the model moved there."""
        self.shadow = {name: tensor.to(device) for name, tensor in self.shadow.items()}

    def decay_of(self, step: int) -> float:
        """d of update number `step`, counted from 0."""
        if self.start == "warmup":
            return min(self.decay, (1 + step) / (10 + step))
        return 0.0 if step == 0 and self.start == "copy" else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after update number `step` (0 for the first)."""
        # shadow += (1 - d) (weight - shadow)
        torch._foreach_lerp_(list(self.shadow.values()), list(self._weights.values()), 1.0 - self.decay_of(step))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self.shadow.keys():
            raise ValueError(
                f"EMA state has {len(state)} tensors: the {len(self.shadow)} of the model were wanted, by name"
            )
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)


class PowerEma(Ema):
    """The average with a power function's profile of a relative standard deviation `length` (Karras et al. 2024, section 3.1):
    beta(t) = (1 - 1 / t)^(gamma + 1) after update t = 1, 2, ... (their Eq. 127).

    It is exactly the integral of the profile over each update's unit of time: weights after update i count by
    (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1). The initial weights do not count.
    """

    def __init__(self, model: nn.Module, length: float) -> None:
        super().__init__(model, 0.0)
        self.exponent = exponent(length)

    def decay_of(self, step: int) -> float:
        return float((1.0 - 1.0 / (step + 1)) ** (self.exponent + 1.0))
