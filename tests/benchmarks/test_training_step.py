"""One training step of ours against diffusers' UNet2DModel of the same size: paired, alternating, median of ratios."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddpm_core.presets import PRESETS
from ddpm_core.training import TrainState, train_step
from ddpm_core.unet import UNet

pytestmark = pytest.mark.bench
BATCH, PAIRS = 4, 7


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def test_a_step_of_the_cifar10_model_against_diffusers() -> None:
    from diffusers import UNet2DModel

    preset = PRESETS["cifar10"]
    state = TrainState(UNet(preset.unet), preset.optim)
    diffusion = preset.diffusion.build()
    x, noise = torch.randn(2, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.arange(BATCH) * 200
    theirs = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        dropout=0.1,
    )
    their_state = TrainState(theirs, preset.optim)

    def ours_once() -> None:
        train_step(state, diffusion, state.model, preset.optim, x_start=x, t=t, noise=noise)

    def theirs_once() -> None:
        denoise = lambda x_t, at: theirs(x_t, at).sample  # noqa: E731
        train_step(their_state, diffusion, denoise, preset.optim, x_start=x, t=t, noise=noise)

    ours_once()  # warm up
    theirs_once()
    ratios = [seconds(theirs_once) / seconds(ours_once) for _ in range(PAIRS)]
    print(f"\na training step of 35.7M parameters, batch {BATCH}: {statistics.median(ratios):.2f} x diffusers' speed")
    assert statistics.median(ratios) > 0.9
