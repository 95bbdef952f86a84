"""Exponential moving average of the weights (paper, appendix B: decay 0.9999)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Shadow weights in float32. As in Ho's code, the first update copies the weights and every later one is
    shadow += (1 - decay) (weight - shadow): no warm-up of the decay, no debiasing."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}: it must lie in [0, 1)")
        self.decay = decay
        self._weights = dict(model.named_parameters())  # the parameters themselves: they follow the model to a device
        self.shadow = {name: p.detach().clone() for name, p in self._weights.items()}

    def to(self, device: torch.device) -> None:
        """Move the shadow to a device, after the model moved there."""
        self.shadow = {name: tensor.to(device) for name, tensor in self.shadow.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after update number `step` (0 for the first)."""
        weight = 1.0 if step == 0 else 1.0 - self.decay
        torch._foreach_lerp_(list(self.shadow.values()), list(self._weights.values()), weight)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self.shadow.keys():
            raise ValueError(
                f"EMA state has {len(state)} tensors: the {len(self.shadow)} of the model were wanted, by name"
            )
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)
