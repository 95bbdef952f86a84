"""One training step of ours against diffusers' UNet2DModel of the same size, and against a loop as one writes it by hand
around our own network: alternating in one run, median of the ratios of CPU time, which other work on the machine disturbs
less than the clock; torch has one thread here."""

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.contest import contest
from support.synthetic_shards import random_pixels, write_dataset
from support.timing import seconds
from torch import Tensor, nn

from ddpm_core.dropout import dropout_keys
from ddpm_core.precision import compile_network
from ddpm_core.presets import PRESETS
from ddpm_core.training import Execution, TrainState, train_step
from ddpm_core.unet import UNet
from pipelines.train.config import config_for
from pipelines.train.loader import Loader, make_batch
from pipelines.train.meter import Meter
from pipelines.train.worker import initial_state

pytestmark = pytest.mark.bench
BATCH, ROUNDS = 4, 8
PRESET = PRESETS["cifar10"]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    x, noise = torch.randn(2, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    return x, torch.arange(BATCH) * 200, noise


def step_of_ours(execution: Execution) -> Callable[[], Any]:
    """Drawing the step's dropout keys included."""
    state, diffusion = TrainState(UNet(PRESET.unet), PRESET.optim, execution), PRESET.diffusion.build()
    x, t, noise = batch()

    def once() -> None:
        keys = dropout_keys(0, torch.arange(BATCH), PRESET.unet.dropout_layers)
        train_step(state, diffusion, state.model, PRESET.optim, x_start=x, t=t, noise=noise, dropout_key=keys)

    return once


def step_by_hand(model: nn.Module, predict: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
    """The same loss, Adam, clip and EMA, as an eager loop spells them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=PRESET.optim.lr)
    shadow = [p.detach().clone() for p in model.parameters()]
    abar = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x, t, noise = batch()

    def once() -> None:
        a = abar[t].float()[:, None, None, None]
        loss = nn.functional.mse_loss(predict(a.sqrt() * x + (1.0 - a).sqrt() * noise, t), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, p in zip(shadow, model.parameters(), strict=True):
                average.mul_(0.9999).add_(p, alpha=1e-4)

    return once


def test_a_step_of_the_cifar10_model_against_diffusers_and_a_loop_by_hand() -> None:
    from diffusers import UNet2DModel

    reference = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        dropout=0.1,
    )
    ours = UNet(PRESET.unet)
    assert sum(p.numel() for p in reference.parameters()) == sum(p.numel() for p in ours.parameters())
    steps = {
        "ours": step_of_ours(Execution()),
        "ours, Adam in many kernels": step_of_ours(Execution(fused_adam=False)),
        "ours, bfloat16": step_of_ours(Execution(precision="bfloat16")),
        "diffusers": step_by_hand(reference, lambda x_t, t: reference(x_t, t).sample),
        "our network, loop by hand": step_by_hand(ours, ours),
    }
    for step in steps.values():
        step()  # warm up
    names = list(steps)  # there and back: what ran before leaves its mark in the caches
    rounds = [{name: seconds(steps[name]) for name in (names, names[::-1])[i % 2]} for i in range(ROUNDS)]
    print(f"\na training step of 35.7M parameters, batch {BATCH}:")
    for name in steps:
        print(f"  {name}: {BATCH / statistics.median(r[name] for r in rounds):.2f} images a CPU second", end="")
        for rival in ("diffusers", "our network, loop by hand"):
            print(f", {statistics.median(r[rival] / r[name] for r in rounds):.3f} x {rival}", end="")
        print()
    for rival in ("diffusers", "our network, loop by hand"):
        for name, least in (("ours", 1.0), ("ours, Adam in many kernels", 0.97), ("ours, bfloat16", 1.2)):
            assert statistics.median(r[rival] / r[name] for r in rounds) > least, f"{name} against {rival}"


def test_dropout_by_address_costs_no_more_than_torchs() -> None:
    """A whole step with either, of the network that drops a tenth."""
    state, diffusion = TrainState(UNet(PRESET.unet), PRESET.optim), PRESET.diffusion.build()
    x, t, noise = batch()
    keys = dropout_keys(0, torch.arange(BATCH), PRESET.unet.dropout_layers)

    def step(key: Tensor | None) -> None:
        train_step(state, diffusion, state.model, PRESET.optim, x_start=x, t=t, noise=noise, dropout_key=key)

    step(keys)  # warm up
    step(None)
    ratios = [seconds(lambda: step(keys)) / seconds(lambda: step(None)) for _ in range(ROUNDS)]
    print(f"\na step with dropout by address takes {statistics.median(ratios):.3f} of one with torch's")
    assert statistics.median(ratios) < 1.03


def test_the_share_of_a_small_training_outside_its_network(tmp_path: Path) -> None:
    """Steps of the preset tiny as a worker makes them, batches, Adam, averages and records included, against the passes of its
    network alone."""
    dataset = write_dataset(tmp_path / "shards", random_pixels(512, (8, 8, 1)), [512])
    config = config_for("tiny", shards=str(dataset.path), steps=60)
    cpu = torch.device("cpu")

    def training() -> TrainState:
        state, diffusion, meter = initial_state(config), config.diffusion.build(), Meter(config, cpu, 1)
        with Loader(config, dataset, rank=0, world_size=1, device=cpu) as loader:
            for step in loader:
                meter.add(train_step(state, diffusion, state.model, config.optim, **step._asdict()))
            meter.close(state, loader.seconds_waited)
        return state

    # Trained, and given what it was trained on: a new one multiplies by 1e-10 in places, and denormal numbers are slow.
    network, drawn = training().model, make_batch(config, dataset, 0, 0, 1)
    x_t = config.diffusion.build().q_sample(drawn.x_start, drawn.t, drawn.noise)

    def passes() -> None:
        for _ in range(config.steps):
            nn.functional.mse_loss(network(x_t, drawn.t), drawn.noise).backward()
            network.zero_grad(set_to_none=True)

    work = f"{config.steps} steps of the preset tiny, with their batches, Adam, averages and records"
    row = contest(work, "the passes of its network alone", training, passes)
    assert row.ratio > 0.75


@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_what_torch_compile_costs_and_gains_without_a_gpu() -> None:
    """A sampling step of the same network, compiled as evaluations compile it."""
    network = UNet(PRESET.unet).eval()
    compiled = copy.deepcopy(network)
    compile_network(compiled)
    x, t, _ = batch()
    with torch.no_grad():
        expected = network(x, t)  # warm up
        eager = statistics.median(seconds(lambda: network(x, t)) for _ in range(ROUNDS))
        start = seconds(lambda: torch.testing.assert_close(compiled(x, t), expected, rtol=1e-3, atol=1e-4))
        ratios = [seconds(lambda: network(x, t)) / seconds(lambda: compiled(x, t)) for _ in range(ROUNDS)]
    print(
        f"\na compiled sampling step is {statistics.median(ratios):.2f} x as fast; to compile it takes as long as "
        f"{start / eager:,.0f} steps of {BATCH} images"
    )
    assert statistics.median(ratios) > 0.8
