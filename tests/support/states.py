"""Training states that cost nothing."""

import torch
from torch import nn

from ddpm_core.training import OptimConfig, TrainState


def new_state(step: int = 0, width: int = 8) -> TrainState:
    torch.manual_seed(0)
    state = TrainState(nn.Linear(width, width), OptimConfig(warmup_steps=0))
    state.step = step
    return state
