"""Everything that runs on a GPU stays on its device: a tensor left on the CPU is found without a GPU."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.other_device import OTHER, other_device

from ddpm_core import rng
from ddpm_core.configs import Execution, Method, OptimConfig, UNetConfig
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.features import PixelFeatures
from ddpm_core.inception.network import InceptionV3
from ddpm_core.latents import interpolate
from ddpm_core.likelihood import bound_term
from ddpm_core.metrics.memorization import nearest
from ddpm_core.precision import full_float32, in_precision, in_slices
from ddpm_core.samplers import sample_steps
from ddpm_core.schedules import make_betas
from ddpm_core.training import TrainState, train_step
from ddpm_core.unet import UNet
from pipelines.train.config import config_for
from pipelines.train.loader import draw

UNET = UNetConfig(image_size=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.1)
SHAPE = (2, 3, 16, 16)


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    # The whole chain in place of a part of it, whose choice looks at values.
    with other_device(), mock.patch.object(GaussianDiffusion, "strided", lambda process, timesteps: process):
        yield


def diffusion(device: torch.device) -> GaussianDiffusion:
    """Made on the CPU of real numbers, then without values on a device."""
    made = GaussianDiffusion(make_betas("linear", 20, 1e-4, 0.4))
    for name, table in made._buffers.items():
        assert table is not None
        made._buffers[name] = torch.empty(table.shape, dtype=table.dtype, device=device)
    return made


def on(device: torch.device) -> UNet:
    with device:
        return UNet(UNET)


def test_a_fake_tensor_of_another_device_is_found() -> None:
    with pytest.raises(Exception, match=r"meta.*cpu|cpu.*meta"):
        on(OTHER).eval()(torch.empty(SHAPE), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("method", ["ancestral", "ddim", "dpmpp_2m"])
def test_a_sampling_step_stays_on_its_device(method: Method) -> None:
    network = in_slices(in_precision(on(OTHER).eval(), "bfloat16"), 1)
    noise = rng.SampleNoise(0, torch.arange(2, device=OTHER), SHAPE[1:])
    with full_float32(OTHER):
        steps = sample_steps(diffusion(OTHER), network, SHAPE, noise=noise, method=method)
        x = [next(steps) for _ in range(3)][-1].x
    assert x.device == OTHER


def test_features_and_sums_stay_on_their_device() -> None:
    pixels = torch.empty(2, 3, 16, 16, dtype=torch.uint8, device=OTHER)
    with mock.patch.object(InceptionV3, "_initialise"), mock.patch.object(InceptionV3, "to_empty"):
        network = InceptionV3()  # made without storage, and left so
    with full_float32(OTHER), torch.no_grad():
        features, logits = network(pixels)
        assert (features.device, logits.device) == (OTHER, OTHER)
        assert PixelFeatures(3)(pixels)[0].device == OTHER
    items = torch.empty(5, 8, dtype=torch.float64, device=OTHER)
    assert nearest(items[:2], items, 0).numbers.device == OTHER


def test_a_term_of_the_bound_and_an_interpolation_stay_on_their_device() -> None:
    x, t = torch.empty(SHAPE, device=OTHER), torch.zeros(2, dtype=torch.int64, device=OTHER)
    noise = rng.SampleNoise(0, torch.arange(2, device=OTHER), SHAPE[1:])
    network, process = on(OTHER).eval(), diffusion(OTHER)
    term, mse = bound_term(process, network, x, t, noise(0))
    assert (term.device, mse.device) == (OTHER, OTHER)
    row = interpolate(process, network, (x, x), [0.0, 1.0], 3, encoder_noise=(noise(1), noise(2)), noise=noise)
    assert row.device == OTHER


def test_a_batch_is_drawn_on_the_device_of_its_pixels() -> None:
    config = config_for("cifar10", shards="shards")
    batch = draw(config, torch.empty(128, 32, 32, 3, dtype=torch.uint8, device=OTHER), 3, 0, 1)
    assert all(column is not None and column.device == OTHER for column in batch)


@pytest.mark.parametrize("execution", [Execution(), Execution(precision="bfloat16", channels_last=True, micro_batch=1)])
def test_a_training_step_stays_on_its_device(execution: Execution) -> None:
    """With what is read of it afterwards."""
    optim, model = OptimConfig(batch_size=2), on(OTHER)
    state = TrainState(model, optim, execution)
    data: dict[str, Any] = {
        "x_start": torch.empty(SHAPE, device=OTHER),
        "t": torch.empty(2, dtype=torch.int64, device=OTHER),
        "noise": torch.empty(SHAPE, device=OTHER),
        "dropout_key": torch.empty(2, UNET.dropout_layers, 2, dtype=torch.int32, device=OTHER),
    }
    metrics = train_step(state, diffusion(OTHER), model, optim, **data)
    values = [*metrics, state.first_bad, state.parameter_norm(), *model.parameters(), *state.ema.shadow.values()]
    assert {value.device for value in values} == {OTHER}
