"""FLOPs and bytes against a network that is traced, a count by hand, and what the allocator gave out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import traced_costs
from torch.profiler import ProfilerActivity, profile

from ddpm_core import costs
from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.configs import Precision
from ddpm_core.costs import plan
from ddpm_core.dropout import dropout_keys
from ddpm_core.errors import InputError
from ddpm_core.presets import PRESETS
from ddpm_core.training import Execution, OptimConfig, TrainState
from ddpm_core.unet import UNet, UNetConfig

CIFAR10, AT_256, LARGE = (PRESETS[name].unet for name in ("cifar10", "lsun_church", "lsun_bedroom_large"))
SMALL = UNetConfig(image_size=32, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(16,), dropout=0.1)


def products(config: UNetConfig) -> tuple[int, int]:
    """Multiplications of an image's forward pass, by hand from the paper's description: (all, those of conv_in)."""
    total, ch, size = 0, config.ch, config.image_size

    def conv(into: int, out: int, side: int, kernel: int = 3) -> None:
        nonlocal total
        total += into * out * kernel**2 * side**2

    def res(into: int, out: int, side: int) -> None:
        nonlocal total
        conv(into, out, side)
        conv(out, out, side)
        total += 4 * ch * out  # the timestep's
        if into != out:
            conv(into, out, side, 1)

    def attend(width: int, side: int) -> None:
        nonlocal total
        total += 4 * width**2 * side**2 + 2 * width * side**4

    conv(config.in_channels, ch, size)
    first = total
    total += ch * 4 * ch + (4 * ch) ** 2
    stack, now = [ch], ch
    for level, factor in enumerate(config.ch_mult):
        side = size >> level
        for _ in range(config.num_res_blocks):
            res(now, now := factor * ch, side)
            if side in config.attn_resolutions:
                attend(now, side)
            stack.append(now)
        if level + 1 < len(config.ch_mult):
            conv(now, now, side // 2)
            stack.append(now)
    res(now, now, side)
    attend(now, side)
    res(now, now, side)
    for level, factor in reversed(list(enumerate(config.ch_mult))):
        side = size >> level
        for _ in range(config.num_res_blocks + 1):
            res(now + stack.pop(), now := factor * ch, side)
            if side in config.attn_resolutions:
                attend(now, side)
        if level:
            conv(now, now, 2 * side)
    conv(now, config.out_channels or config.in_channels, size)
    return total, first


def assert_equal_to_a_traced_network(config: UNetConfig, batch: int) -> None:
    for count in ("parameters", "forward_flops", "training_flops"):
        assert getattr(costs, count)(config) == getattr(traced_costs, count)(config), count
    for precision in get_args(Precision):
        for checkpointing in (False, True):
            asked = config, batch, precision, checkpointing
            assert costs._saved(*asked) == traced_costs.saved(*asked), asked


@pytest.mark.parametrize(
    "config", {preset.unet: name for name, preset in PRESETS.items()}, ids=lambda config: config.ch
)
def test_costs_of_the_presets_equal_those_of_a_traced_network(config: UNetConfig) -> None:
    assert_equal_to_a_traced_network(config, batch=16)


small_networks = st.fixed_dictionaries(
    {
        "in_channels": st.integers(1, 4),
        "out_channels": st.none() | st.integers(1, 8),
        "ch": st.sampled_from([32, 64]),
        "ch_mult": st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
        "num_res_blocks": st.integers(1, 2),
        "attn_resolutions": st.sets(st.sampled_from([1, 2, 3, 4, 6, 8])).map(tuple),
        "dropout": st.sampled_from([0.0, 0.1]),
    }
)


@settings(max_examples=5, deadline=None)
@given(values=small_networks, side=st.integers(1, 3), batch=st.sampled_from([16, 32]))
def test_costs_of_any_network_equal_those_of_a_traced_one(values: dict[str, Any], side: int, batch: int) -> None:
    """side: of the images at the last level."""
    config = UNetConfig(image_size=side * 2 ** (len(values["ch_mult"]) - 1), **values)
    assert_equal_to_a_traced_network(config, batch)


@pytest.mark.parametrize("config", [CIFAR10, AT_256, LARGE, SMALL], ids=["cifar10", "256", "256-large", "small"])
def test_flops_equal_a_count_by_hand(config: UNetConfig) -> None:
    """The backward pass is two more, of weights and of inputs, but for the input of conv_in, which needs no gradient, and
    that of the timestep's first layer."""
    forward, first = products(config)
    assert costs.forward_flops(config) == 2 * forward
    assert costs.training_flops(config) == 2 * (3 * forward - first - config.ch * 4 * config.ch)


def test_flops_and_parameters_are_the_papers_models() -> None:
    """Known from two other programs."""
    assert costs.training_flops(CIFAR10) == 37_323_931_648
    assert costs.training_flops(AT_256) == 1_490_629_427_200
    assert costs.training_flops(LARGE) == 3_350_688_694_272
    assert [costs.parameters(c) for c in (CIFAR10, AT_256, LARGE)] == [35_746_307, 113_673_219, 255_677_955]


def allocated(config: UNetConfig, batch: int, execution: Execution) -> tuple[int, int]:
    """Bytes the CPU allocator has out at the end of a forward pass, and at most in it and the backward pass, less those of
    the gradients of the weights."""
    model = UNet(config)
    model.activation_checkpointing = execution.activation_checkpointing
    x, t = torch.zeros(batch, 3, config.image_size, config.image_size), torch.zeros(batch, dtype=torch.int64)
    key = dropout_keys(0, t, config.dropout_layers)
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=execution.precision == "bfloat16"),
    ):
        out = model(x, t, key)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        out.float().sum().backward()
    held, most = 0, 0
    for record in (forward, backward):
        for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        if record is forward:
            after_forward = held
    return after_forward, most


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_equal_what_the_allocator_gave_out(precision: Precision) -> None:
    execution = Execution(precision=precision)
    fixed, each = costs._activations(SMALL, precision, False)
    after_forward, most = allocated(SMALL, 16, execution)
    # The images, timesteps and keys were there before.
    assert after_forward == pytest.approx(fixed + 16 * each, rel=0.01)
    assert most < 1.35 * after_forward  # a floor: gradients pass through on top


def test_checkpointed_activations_lie_between_the_kept_and_the_fullest() -> None:
    fixed, each = costs._activations(SMALL, "float32", True)
    kept, most = allocated(SMALL, 16, Execution(activation_checkpointing=True))
    assert kept < fixed + 16 * each < most
    assert fixed + 16 * each > 0.6 * most
    assert most < allocated(SMALL, 16, Execution())[1] / 2


def test_the_256_pixel_models_memory_is_the_known_floor() -> None:
    """2,106,438,912 bytes an image, by another program's count for a batch of one; ours for many, where attention copies."""
    _, each = costs._activations(AT_256, "float32", False)
    assert each == pytest.approx(2_106_438_912, rel=0.005)
    _, checkpointed = costs._activations(AT_256, "float32", True)
    assert checkpointed < each / 3


def test_memory_counts_what_each_switch_holds() -> None:
    optim, w = OptimConfig(batch_size=16), 4 * costs.parameters(SMALL)
    alone = costs.memory(SMALL, optim, Execution(), workers=1)
    stacked = 4 * 3 * 64 * 64 * 4  # the four attention layers' weights of q, k and v, kept once more for their product
    assert (alone.weights, alone.gradients, alone.adam, alone.ema) == (w + stacked, w, 2 * w, w)
    assert alone.total == 5 * w + stacked + alone.activations
    four = costs.memory(SMALL, optim, Execution(), workers=4)
    assert (four.gradients, four.activations) == (w, alone.activations // 4)
    assert costs.memory(SMALL, optim, Execution(micro_batch=2), workers=1).activations == alone.activations // 8
    eight = costs.memory(SMALL, replace(optim, clip_replicas=8), Execution(), workers=1)
    assert (eight.gradients, eight.activations) == (2 * w, alone.activations // 8)
    # Several workers hold besides the wrapper's buckets, unused, and the one buffer that they exchange.
    exchanged = costs.memory(SMALL, replace(optim, clip_replicas=8), Execution(), workers=2)
    assert (exchanged.gradients, exchanged.activations) == (4 * w, alone.activations // 8)
    assert w < costs.memory(SMALL, optim, Execution(precision="bfloat16"), workers=1).weights <= 1.6 * w


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(posthoc_ema=True)], ids=["plain", "posthoc_ema"])
def test_a_checkpoint_takes_the_disk_that_was_planned(tmp_path: Path, optim: OptimConfig) -> None:
    state = TrainState(UNet(SMALL), optim)
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    saved = write_checkpoint(tmp_path, snapshot(state), {})
    size = sum(file.stat().st_size for file in saved.path.iterdir())
    assert costs.checkpoint_bytes(SMALL, optim) <= size < costs.checkpoint_bytes(SMALL, optim) + 250_000
    assert costs.memory(SMALL, optim, Execution(), workers=1).ema == 4 * sum(
        tensor.numel() for ema in (state.ema, *state.averages.values()) for tensor in ema.shadow.values()
    )


def test_hours_of_the_papers_run_follow_from_its_speed() -> None:
    """21 steps a second of 128 images are 100.3 TFLOP/s, of whatever peak: 800,000 steps take 10.58 hours."""
    preset = PRESETS["cifar10"]
    planned = plan(
        preset.unet,
        preset.optim,
        steps=800_000,
        checkpoint_every=5000,
        workers=8,
        peak_flops=100.3265e12 / 8 / 0.25,
        utilisation=0.25,
    )
    assert planned.hours == pytest.approx(800_000 / 21 / 3600, rel=1e-4)
    assert planned.images_per_second == pytest.approx(21 * 128, rel=1e-4)
    assert planned.step_flops == 128 * 37_323_931_648
    assert planned.disk_bytes == 160 * planned.checkpoint_bytes == 160 * 16 * 35_746_307
    assert json.dumps(planned.__dict__, default=vars)  # plain numbers


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"utilisation": 0.0}, "utilisation is 0.0"),
        ({"utilisation": 1.5}, "utilisation is 1.5"),
        ({"workers": 0}, "workers is 0"),
        ({"peak_flops": 0.0}, "peak_flops is 0.0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(values: dict[str, float], sentence: str) -> None:
    given = {"steps": 10, "checkpoint_every": 5, "workers": 1, "peak_flops": 1e12, "utilisation": 0.5, **values}
    with pytest.raises(ValueError, match=sentence):
        plan(SMALL, OptimConfig(), **given)  # type: ignore[arg-type]


def test_a_micro_batch_is_the_largest_half_of_the_share_that_fits() -> None:
    """More memory never makes it smaller, all of it leaves the share whole, and what is chosen has room for its floor."""
    optim, sizes = OptimConfig(batch_size=24), []
    for gib in (2.2, 2.4, 2.6, 3.0, 4.0, 8.0):
        capacity = int(gib * 2**30)
        chosen = costs.fit_micro_batch(SMALL, optim, Execution(), 1, capacity)
        assert costs.memory(SMALL, optim, chosen, 1).total < capacity
        sizes.append(chosen.micro_batch or 24)
    assert sizes == sorted(sizes)
    assert set(sizes) <= {1, 2, 3, 6, 12, 24}
    assert sizes[0] < 24 == sizes[-1]


def test_the_256_pixel_models_share_is_cut_for_a_gpu_of_80_gib() -> None:
    optim, capacity = PRESETS["lsun_church"].optim, 80 << 30
    for execution in (Execution(), Execution(precision="bfloat16")):
        chosen = costs.fit_micro_batch(AT_256, optim, execution, 1, capacity)
        assert chosen.micro_batch is not None
        assert chosen.micro_batch >= 16
        assert costs.memory(AT_256, optim, replace(chosen, micro_batch=None), 1).total > capacity


def test_a_micro_batch_that_cannot_fit_is_refused() -> None:
    optim = OptimConfig(batch_size=64)
    with pytest.raises(
        InputError, match=r"--execution.micro-batch is 64, which needs at least \d+\.\d GiB of a GPU that has 1.0"
    ):
        costs.fit_micro_batch(CIFAR10, optim, Execution(micro_batch=64), 1, 1 << 30)
    with pytest.raises(InputError, match="one image at a time needs about"):
        costs.fit_micro_batch(CIFAR10, optim, Execution(), 1, 1 << 30)
    asked = Execution(micro_batch=4)
    assert costs.fit_micro_batch(CIFAR10, optim, asked, 1, 8 << 30) == asked
