"""Laws of one device against the CPU, as functions of the device: tests/gpu calls them with a GPU, the default suite with the
CPU, so that they do not rot. They need torch, numpy, safetensors, jaxtyping and pytest; what else one needs, it skips without.

Each tolerance is stated where it is used, and is that of the device's arithmetic: none on the CPU would be as wide.
"""

import contextlib
import copy
import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import images, rng
from ddpm_core.codec import Codec
from ddpm_core.configs import Precision
from ddpm_core.costs import fit_micro_batch
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.dropout import addressed_dropout, dropout_keys
from ddpm_core.errors import InputError
from ddpm_core.inception.network import InceptionV3
from ddpm_core.latents import interpolate
from ddpm_core.likelihood import variational_bound
from ddpm_core.pixel_range import scaled_values
from ddpm_core.precision import full_float32, in_precision
from ddpm_core.presets import PRESETS
from ddpm_core.samplers import sample, sample_steps
from ddpm_core.schedules import make_betas
from ddpm_core.training import Execution, OptimConfig, TrainState, train_step
from ddpm_core.unet import AttnBlock, UNet, UNetConfig

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
SMALL = UNetConfig(image_size=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.2)
OPTIM = OptimConfig(batch_size=8, lr=1e-3, warmup_steps=0, grad_clip=0.5)
DIFFUSION = GaussianDiffusion(make_betas("linear", 1000))
SHAPE = (4, 3, 8, 8)

# How a step is carried out: (execution, relative tolerance of losses and gradient norms over ten steps against float64).
# Float32 multiplies in TF32 on a GPU, which has 10 bits, bfloat16 has 8; norms of gradients add up the error of a network's
# depth, and ten steps of Adam that of each step.
EXECUTIONS: dict[str, tuple[Execution, float]] = {
    "eager": (Execution(), 0.02),
    "micro-batches": (Execution(micro_batch=3), 0.02),
    "checkpointing": (Execution(activation_checkpointing=True), 0.02),
    "fused Adam": (Execution(fused_adam=True), 0.02),
    "channels-last": (Execution(channels_last=True), 0.02),
    "bfloat16": (Execution(precision="bfloat16", channels_last=True), 0.1),
}
COMPILED: dict[str, tuple[Execution, float]] = {
    "compiled": (Execution(compile=True), 0.02),
    "fast": (Execution(mode="fast").resolved(fast=True), 0.1),
}


def network(dtype: torch.dtype = torch.float32, config: UNetConfig = SMALL) -> UNet:
    """Random weights, none near 0, the same whatever the dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = UNet(config)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return made.to(dtype)


def batch(step: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    g = torch.Generator().manual_seed(step)
    return {
        "x_start": (torch.rand((8, 3, 8, 8), generator=g) * 2 - 1).to(device, dtype),
        "t": torch.randint(1000, (8,), generator=g).to(device),
        "noise": torch.randn((8, 3, 8, 8), generator=g).to(device, dtype),
        "dropout_key": dropout_keys(0, torch.arange(8 * step, 8 * step + 8), SMALL.dropout_layers).to(device),
    }


def ten_steps(device: torch.device, execution: Execution, dtype: torch.dtype, optim: OptimConfig = OPTIM) -> Tensor:
    """(loss, gradient norm) of ten steps, float64 [10, 2]."""
    state, diffusion = TrainState(network(dtype), optim, execution), copy.deepcopy(DIFFUSION).to(device)
    state.to(device)
    metrics = [train_step(state, diffusion, state.model, optim, **batch(step, dtype, device)) for step in range(10)]
    return torch.stack([torch.stack([m.loss, m.grad_norm]).double() for m in metrics]).cpu()


@functools.cache
def exact_steps(optim: OptimConfig) -> Tensor:
    """ten_steps() on the CPU in float64."""
    return ten_steps(CPU, Execution(), torch.float64, optim)


def check_integers_are_the_cpus(device: torch.device) -> None:
    """Philox, draws below a bound, coins, dropout's keys and masks: bit for bit."""
    here, there = torch.tensor([0, 31_337, 2**35 + 1]), torch.tensor([0, 31_337, 2**35 + 1], device=device)
    for step in (0, 999, 2**31):
        assert torch.equal(rng.bits(7, "noise", there, step, 5).cpu(), rng.bits(7, "noise", here, step, 5))
    assert torch.equal(rng.integers(7, "t", there, 3, 1000).cpu(), rng.integers(7, "t", here, 3, 1000))
    assert torch.equal(rng.coins(7, "flip", there, 3).cpu(), rng.coins(7, "flip", here, 3))
    keys = dropout_keys(7, there, 5)
    assert torch.equal(keys.cpu(), dropout_keys(7, here, 5))
    h = torch.ones(3, 32, 8, 8, device=device)
    expected = addressed_dropout(h.cpu(), 0.3, keys.cpu()[:, 1])
    for ordered in (h, h.to(memory_format=torch.channels_last)):
        assert torch.equal(addressed_dropout(ordered, 0.3, keys[:, 1]).cpu(), expected)


def check_normals_are_the_cpus(device: torch.device, *, compiled: bool = False) -> None:
    """Within 1e-5, which is float32's rounding of a logarithm and a cosine, times the largest normal, 6.8."""
    indices = torch.arange(64)
    drawn = rng.normal(7, "sample", indices.to(device), 5, (3, 32, 32), compiled=compiled).cpu()
    torch.testing.assert_close(drawn, rng.normal(7, "sample", indices, 5, (3, 32, 32)), rtol=0, atol=1e-5)


def check_pixel_values_are_the_cpus(device: torch.device) -> None:
    """All 256, bit for bit, and back."""
    levels = torch.arange(256, dtype=torch.uint8, device=device).reshape(1, 16, 16, 1)
    x = images.to_float(levels)
    assert torch.equal(x.flatten().cpu(), torch.from_numpy(scaled_values()))
    assert torch.equal(images.to_uint8(x), levels)


def check_ten_steps_are_the_cpus_in_float64(device: torch.device, execution: Execution, tolerance: float) -> None:
    ours = ten_steps(device, execution, torch.float32)
    torch.testing.assert_close(ours, exact_steps(OPTIM), rtol=tolerance, atol=0)


def check_replicas_are_clipped_as_on_the_cpu(device: torch.device) -> None:
    optim = replace(OPTIM, clip_replicas=4)
    ours = ten_steps(device, Execution(), torch.float32, optim)
    torch.testing.assert_close(ours, exact_steps(optim), rtol=0.02, atol=0)


def check_gradients_are_the_cpus(device: torch.device) -> None:
    """In full float32, each weight's within 1e-3 of the largest of its layer; in float64 within 1e-9."""
    data = batch(0, torch.float64, CPU)
    exact = network(torch.float64)
    exact(data["x_start"], data["t"], data["dropout_key"]).square().sum().backward()
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        ours = network(dtype).to(device)
        with full_float32(device):
            there = batch(0, dtype, device)
            ours(there["x_start"], there["t"], there["dropout_key"]).square().sum().backward()
        for (name, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            scale = float(b.grad.abs().max())
            # A bias in front of a norm has the gradient 0 but for rounding.
            near = tolerance * max(scale, 1e-2 * float(exact.conv_in.weight.grad.abs().max()))  # type: ignore[union-attr]
            assert float((a.grad.double().cpu() - b.grad).abs().max()) <= near, name


def check_attention_of_wide_heads(device: torch.device, width: int) -> None:
    """Heads of 256 and 512 channels, which fused kernels do not all take: within 1e-3 in full float32, with gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = AttnBlock(width)
        nn.init.normal_(block.proj_out.weight, std=width**-0.5)
        x = torch.randn(2, width, 16, 16)
    results = []
    for where in (CPU, device):
        there, given = copy.deepcopy(block).to(where), x.clone().to(where).requires_grad_()
        with full_float32(where):
            out = there(given)
            out.square().mean().backward()
        assert given.grad is not None
        results.append((out.detach().cpu(), given.grad.cpu() * x.numel()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def samples_on(device: torch.device, precision: Precision = "float32", **options: Any) -> Tensor:
    diffusion, model = copy.deepcopy(DIFFUSION).to(device), network().to(device).eval()
    noise = rng.SampleNoise(3, torch.arange(SHAPE[0], device=device), SHAPE[1:])
    with full_float32(device):
        return sample(diffusion, in_precision(model, precision), SHAPE, noise=noise, **options).cpu()


def check_samples_are_the_cpus(device: torch.device) -> None:
    """Twenty steps in full float32 of each sampler: within 1e-3 of a range of 2. The network is random and amplifies little."""
    for options in (
        {"method": "ancestral"},
        {"method": "ddim"},
        {"method": "ddim", "eta": 0.5},
        {"method": "dpmpp_2m"},
    ):
        ours, expected = (samples_on(where, steps=20, **options) for where in (device, CPU))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)


def check_bound_and_interpolation_are_the_cpus(device: torch.device) -> None:
    """Bits/dim of a chain of ten steps, relative 1e-3, and images between two, within 1e-3."""
    results = []
    for where in (CPU, device):
        diffusion = copy.deepcopy(DIFFUSION).strided(range(0, 1000, 111)).to(where)
        model = network().to(where).eval()
        x = images.to_float(torch.arange(4 * 8 * 8 * 3, dtype=torch.uint8, device=where).reshape(4, 8, 8, 3))
        noise = rng.SampleNoise(3, torch.arange(4, device=where), SHAPE[1:])
        with full_float32(where), torch.no_grad():
            bound = variational_bound(diffusion, model, x, noise)
            between = interpolate(
                diffusion, model, (x, x.flip(0)), [0.0, 0.5], 5, encoder_noise=(noise(20), noise(21)), noise=noise
            )
        results.append((bound.total.cpu(), bound.mse.cpu(), between.cpu()))
    for (total, mse, between), (ours, our_mse, our_between) in [(results[0], results[1])]:
        torch.testing.assert_close(ours, total, rtol=1e-3, atol=0)
        torch.testing.assert_close(our_mse, mse, rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(our_between, between, rtol=0, atol=1e-3)


def check_inception_is_float32_whatever_surrounds_it(device: torch.device) -> None:
    """With TF32 on outside, features are the CPU's: 1e-4 of the largest, where TF32 would make 1e-3 or more."""
    model = InceptionV3()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with full_float32(CPU):
            expected, logits = model(pixels)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with full_float32(device):
                ours, our_logits = model.to(device)(pixels.to(device))
        finally:
            torch.set_float32_matmul_precision(before)
    for a, b in ((ours, expected), (our_logits, logits)):
        assert float((a.cpu() - b).abs().max()) <= 1e-4 * float(b.abs().max())


def check_metrics_are_the_cpus(device: torch.device) -> None:
    """Of the same features: moments within 1e-9, all numbers within 1e-6, neighbours the same."""
    pytest.importorskip("torchmetrics")
    from ddpm_core import metrics
    from ddpm_core.metrics.frechet import FeatureStatistics, frechet_distance
    from ddpm_core.metrics.memorization import nearest

    features = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    moments = []
    for where in (CPU, device):
        statistics = FeatureStatistics(32).to(where)
        statistics.update(features.to(where))
        moments.append([part.cpu() for part in statistics.moments()])
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    assert frechet_distance(*moments[0], *moments[1]) == pytest.approx(0.0, abs=1e-6)
    reference = torch.randn(400, 32, generator=torch.Generator().manual_seed(2))

    def numbers(where: torch.device) -> Tensor:
        """As an evaluation makes them: the reference's features come from a file, to the CPU."""
        samples, real = features.to(where), FeatureStatistics(32)
        real.update(reference)
        real = real.to(where)
        chunks = metrics.ChunkSums([metrics.FeatureSums.of(part) for part in samples.split(30)])
        indexed = (
            metrics.KernelDistance(reference, subsets=5, subset_size=100),
            metrics.PrecisionRecall(reference),
            metrics.ExtrapolatedFrechetDistance(real, min_samples=100),
        )
        for metric in indexed:
            metric.update(samples, torch.arange(len(samples)))
        kid, neighbourhoods, infinity = (metric.compute() for metric in indexed)
        values = [*metrics.frechet_interval(chunks, real), *kid, *neighbourhoods, *infinity]
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    torch.testing.assert_close(numbers(device), numbers(CPU), rtol=1e-6, atol=0)
    levels = torch.randint(0, 256, (50, 64), generator=torch.Generator().manual_seed(1)).double()
    ours, expected = nearest(levels[:5].to(device), levels.to(device), 0), nearest(levels[:5], levels, 0)
    assert torch.equal(ours.numbers.cpu(), expected.numbers)
    torch.testing.assert_close(ours.distances.cpu(), expected.distances, rtol=1e-12, atol=0)


def check_what_a_device_codes_another_decodes(device: torch.device) -> None:
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codecs = {}
    for where in (CPU, device):
        model = network(torch.float64).to(where).eval()
        codecs[where] = Codec(copy.deepcopy(DIFFUSION).to(where), model, (3, 8, 8), b"a model.")
    with torch.no_grad():
        files = [coded.data for coded in codecs[device].encode(pixels, steps=8)]
        decoded = codecs[CPU].decode(files)
    for image, expected in zip(decoded, pixels, strict=True):
        assert torch.equal(image.pixels.cpu(), expected)


def check_what_cannot_fit_is_refused(device: torch.device) -> None:
    """And what is chosen for the memory that this GPU has trains a step there at 256x256."""
    unet, optim = PRESETS["lsun_church"].unet, PRESETS["lsun_church"].optim
    capacity = torch.cuda.get_device_properties(device).total_memory
    with pytest.raises(InputError, match=r"--execution\.micro-batch is 4096"):
        fit_micro_batch(unet, replace(optim, batch_size=4096), Execution(micro_batch=4096), 1, capacity)
    chosen = fit_micro_batch(unet, optim, Execution(precision="bfloat16"), 1, capacity)
    state, diffusion = TrainState(UNet(unet), optim, chosen), copy.deepcopy(DIFFUSION).to(device)
    state.to(device)
    x = torch.zeros(optim.batch_size, 3, 256, 256, device=device)
    train_step(
        state,
        diffusion,
        state.model,
        optim,
        x_start=x,
        t=torch.zeros(len(x), dtype=torch.int64, device=device),
        noise=x,
    )
    torch.cuda.synchronize(device)


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Inside, what would make the host wait for a GPU raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_steps_do_not_wait_for_the_device(device: torch.device) -> None:
    """A training step, its noise, and a sampling step, once warm."""
    state, diffusion = TrainState(network(), OPTIM), copy.deepcopy(DIFFUSION).to(device)
    state.to(device)
    data, positions = batch(0, torch.float32, device), torch.arange(8, device=device)
    noise = rng.SampleNoise(3, torch.arange(4, device=device), SHAPE[1:])
    chain = sample_steps(diffusion, network().to(device).eval(), SHAPE, noise=noise)
    next(chain)
    train_step(state, diffusion, state.model, OPTIM, **data)
    with no_synchronisation(device):
        train_step(state, diffusion, state.model, OPTIM, **data)
        rng.normal(0, "noise", positions, 0, (3, 8, 8))
        dropout_keys(0, positions, 5)
        rng.integers(0, "t", positions, 0, 1000)
        images.to_float(torch.zeros(8, 8, 8, 3, dtype=torch.uint8, device=device))
        next(chain)


DETERMINISTIC = """
import sys, torch
from support.device_checks import OPTIM, SMALL, batch, network, DIFFUSION
from ddpm_core.precision import compute_deterministically
from ddpm_core.training import Execution, TrainState, train_step
compute_deterministically()
device, path = torch.device(sys.argv[1]), sys.argv[2]
def state():
    made = TrainState(network(), OPTIM, Execution(precision="bfloat16", channels_last=True, deterministic=True))
    made.to(device)
    return made
def steps(made, numbers):
    for step in numbers:
        train_step(made, DIFFUSION.to(device), made.model, OPTIM, **batch(step, torch.float32, device))
if sys.argv[3] == "first":
    made = state()
    steps(made, range(3))
    torch.save(made.state_dict(), path)
    made = state()
    steps(made, range(6))
    torch.save(made.state_dict(), path + ".whole")
else:
    made = state()
    made.load_state_dict(torch.load(path, weights_only=True, map_location=device))
    steps(made, range(3, 6))
    whole = torch.load(path + ".whole", weights_only=True, map_location=device)
    assert all(torch.equal(p, whole["model"][n]) for n, p in made.state_dict()["model"].items())
    assert all(torch.equal(p, whole["ema"][n]) for n, p in made.state_dict()["ema"].items())
"""


def check_a_resumed_training_is_the_undisturbed_one(device: torch.device, folder: Path) -> None:
    """With deterministic kernels, in bfloat16 and channels-last, the rest in a process of its own: bit for bit."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    for part in ("first", "rest"):
        command = [sys.executable, "-c", DETERMINISTIC, str(device), str(folder / "state.pt"), part]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def check_several_networks_go_through_one_compiled_graph(
    device: torch.device, compile: Callable[[nn.Module], None]
) -> None:
    """Ten sets of weights, each with its own output, within float32's rounding by other kernels, 1e-4."""
    compiled = network().to(device).eval()
    plain = network().to(device).eval()
    compile(compiled)
    x, t = (
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device),
        torch.tensor([3, 500]).to(device),
    )
    for seed in range(10):
        weights = {name: p * (1.0 + 0.01 * seed) for name, p in network().state_dict().items()}
        compiled.load_state_dict(weights)
        plain.load_state_dict(weights)
        with torch.no_grad(), full_float32(device):
            torch.testing.assert_close(compiled(x, t), plain(x, t), rtol=1e-4, atol=1e-4 * math.sqrt(x[0].numel()))


CHECKS: dict[str, Callable[[torch.device], None]] = {
    "integers": check_integers_are_the_cpus,
    "normals": check_normals_are_the_cpus,
    "pixel values": check_pixel_values_are_the_cpus,
    "gradients": check_gradients_are_the_cpus,
    "replicas": check_replicas_are_clipped_as_on_the_cpu,
    "heads of 256": lambda device: check_attention_of_wide_heads(device, 256),
    "heads of 512": lambda device: check_attention_of_wide_heads(device, 512),
    "samplers": check_samples_are_the_cpus,
    "bound and interpolation": check_bound_and_interpolation_are_the_cpus,
    "Inception": check_inception_is_float32_whatever_surrounds_it,
    "metrics and neighbours": check_metrics_are_the_cpus,
    "codec": check_what_a_device_codes_another_decodes,
    "no waiting": check_steps_do_not_wait_for_the_device,
}
