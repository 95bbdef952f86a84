"""How many kernels an eager step launches on a GPU, and that a step's randomness compiles whole. The counts are held: what
adds a kernel says so here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.gaussian_case import unchecked
from support.kernels import compiled, compiled_gradient, graphs, kernels
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core.configs import Precision
from ddpm_core.dropout import addressed_dropout, dropout_keys
from ddpm_core.presets import PRESETS
from ddpm_core.samplers import sample_steps
from ddpm_core.training import Execution, TrainState, train_step
from ddpm_core.unet import Norm, UNet
from pipelines.train.config import TrainConfig, config_for
from pipelines.train.loader import draw, draw_at, positions_of

PRESET = PRESETS["cifar10"]
UNET = replace(PRESET.unet, ch=32)  # all of its layers, narrower: kernels are counted, not timed
PIXELS = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def config() -> TrainConfig:
    return config_for("cifar10", shards="shards", unet=UNET, optim=replace(PRESET.optim, batch_size=1))


def step_with(precision: Precision) -> Callable[[], Any]:
    """A training step of an image, as on a GPU with Adam as one kernel; clipping is counted a tensor at a time."""
    how = config()
    state = TrainState(UNet(how.unet), how.optim, Execution(precision=precision, fused_adam=True))
    diffusion, batch = how.diffusion.build(), draw(how, PIXELS, 3, 0, 1)

    def step() -> None:
        train_step(state, diffusion, state.model, how.optim, **batch._asdict())

    step()  # Adam makes its moments in the first
    return step


def test_the_kernels_of_a_training_step_are_no_more_than_they_were() -> None:
    assert kernels(lambda: draw(config(), PIXELS, 3, 0, 1)) <= 474
    assert kernels(step_with("float32")) <= 1348
    assert kernels(step_with("bfloat16")) <= 1960


def test_the_kernels_of_a_sampling_step_are_no_more_than_they_were() -> None:
    network, diffusion = UNet(UNET).eval(), PRESET.diffusion.build()
    noise = rng.SampleNoise(0, torch.arange(2), (3, 32, 32))
    chain = sample_steps(diffusion, network, (2, 3, 32, 32), noise=noise)
    next(chain)
    assert kernels(lambda: noise(5)) <= 136
    assert kernels(lambda: next(chain)) <= 518


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_a_batchs_randomness_compiles_into_one_graph_of_the_same_numbers() -> None:
    """Hashing of keys included, which stays outside; operator by operator, so to the bit."""
    how = config()
    with unchecked():
        graph = torch.compile(draw_at, fullgraph=True, dynamic=False, backend="aot_eager")
        for step in (3, 4):
            positions = positions_of(how, step, 0, 1, torch.device("cpu"))
            ours, expected = graph(how, PIXELS, positions), draw(how, PIXELS, step, 0, 1)
            assert all(
                a is not None and b is not None and torch.equal(a, b) for a, b in zip(ours, expected, strict=True)
            )


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_dropout_compiles_into_one_kernel(format: torch.memory_format) -> None:
    """By the code that the compiler generates. A view of each word as two halves it would leave to PyTorch."""
    h = torch.randn(2, 32, 8, 8).to(memory_format=format)
    count, _ = compiled(lambda h, key: addressed_dropout(h, 0.1, key), h, dropout_keys(0, torch.arange(2), 1)[:, 0])
    assert count == 1


def test_addressed_normals_compile_into_two_kernels() -> None:
    """All of Philox and of Box and Muller in the first, their order in memory in the second."""
    keys = rng.round_keys(0, "noise")
    assert compiled(lambda indices: rng._normals(keys, indices, 7, 3072), torch.arange(4))[0] <= 2


def norm_swish_dropout(drops: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """(A function of bfloat16 images, the other tensors that it takes)."""
    norm, key = Norm(64), dropout_keys(0, torch.arange(4), 1)[:, 0]

    def run(x: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = nn.functional.silu(torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x))
        return (addressed_dropout(h, 0.1, key) if drops else h).bfloat16()

    return run, [key, norm.weight.detach(), norm.bias.detach()]


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("drops", [False, True])
def test_norm_swish_and_dropout_compile_to_two_readings_and_a_writing(format: torch.memory_format, drops: bool) -> None:
    """Of bfloat16, with the sums in float32 and nothing of the images' size in between: once for mean and variance, once to
    apply them. What else is read and written is a number a channel and image."""
    run, others = norm_swish_dropout(drops)
    x = torch.randn(4, 64, 32, 32).bfloat16().to(memory_format=format)
    _, moved = compiled(run, x, *others)
    assert 3 * x.nbytes <= moved <= 3.05 * x.nbytes


@pytest.mark.parametrize("drops", [False, True])
def test_the_gradient_of_norm_swish_and_dropout_moves_no_more_than_it_did(drops: bool) -> None:
    """In channels-last. The compiler's own limits, where it would cut it, make that 13 and 17."""
    run, others = norm_swish_dropout(drops)
    x = torch.randn(4, 64, 32, 32).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    _, moved = compiled_gradient(run, x, *(each.requires_grad_(each.is_floating_point()) for each in others))
    assert moved <= 12.05 * x.nbytes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_a_compiled_step_adds_up_in_a_fixed_order_and_stays_in_channels_last() -> None:
    """By its operators: no additions to addresses, which are atomic on a GPU, and no convolution with an image in another
    format."""
    network = UNet(UNET).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.zeros(2, 3, 32, 32).to(memory_format=torch.channels_last)
    key = dropout_keys(0, torch.arange(2), UNET.dropout_layers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = graphs(network, x, torch.arange(2), key)
    assert len(found) == 2
    nodes = [node for graph, _ in found for node in graph.graph.nodes if node.op == "call_function"]
    assert {str(node.target) for node in nodes if "index" in str(node.target) or "scatter" in str(node.target)} == set()
    convolutions = [node for node in nodes if "convolution" in str(node.target)]
    assert len(convolutions) > 100
    for node in convolutions:
        made = node.meta["val"] if isinstance(node.meta["val"], Tensor) else node.meta["val"][0]
        # By the stride of its channels, for a gradient may be a part of the channels of another.
        images = [*(each.meta["val"] for each in node.args[:2]), made]
        assert all(image is None or image.stride(1) == 1 for image in images), node.name
