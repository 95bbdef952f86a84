"""What noise by address costs, in units of one training step that uses it."""

import statistics

import pytest
import torch
from support.timing import seconds

from ddpm_core import rng
from ddpm_core.presets import PRESETS
from ddpm_core.training import TrainState, train_step
from ddpm_core.unet import UNet

pytestmark = pytest.mark.bench


def test_addressed_noise_is_a_small_part_of_a_step() -> None:
    preset = PRESETS["cifar10"]
    state, diffusion = TrainState(UNet(preset.unet), preset.optim), preset.diffusion.build()
    indices, t = torch.arange(4), torch.arange(4) * 200
    noise = rng.normal(0, "noise", indices, 0, (3, 32, 32))

    def step() -> None:
        train_step(state, diffusion, state.model, preset.optim, x_start=noise, t=t, noise=noise)

    def draw() -> None:
        rng.normal(0, "noise", indices, 0, (3, 32, 32))

    step()  # warm up
    draw()
    shares = [seconds(draw) / seconds(step) for _ in range(7)]
    print(f"\nnoise by address: {statistics.median(shares):.2%} of a training step of 35.7M parameters")
    assert statistics.median(shares) < 0.02
