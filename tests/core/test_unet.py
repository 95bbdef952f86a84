"""The U-Net against exact counts, an independent functional forward, and the details by which ports differ."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.gaussian_case import unchecked
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core.presets import PRESETS
from ddpm_core.unet import AttnBlock, Block, Downsample, ResBlock, UNet, UNetConfig, Upsample, timestep_embedding

CIFAR10 = PRESETS["cifar10"].unet
AT_256 = PRESETS["lsun_church"].unet
LARGE = PRESETS["lsun_bedroom_large"].unet
# Two channels a norm group, two levels, attention at one of them.
SMALL = UNetConfig(image_size=8, ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))


def on_meta(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def learned(config: UNetConfig) -> UNetConfig:
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return UNetConfig(**{**values, "out_channels": 6})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(config: UNetConfig, seed: int = 0) -> UNet:
    """A float64 network of random weights, none of them near 0, in evaluation mode."""
    model = UNet(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64) / math.sqrt(fan)
            )
            seed += 1
    return model


def inputs(config: UNetConfig, batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return x, torch.arange(batch) * 333 % 1000


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        (CIFAR10, 35_746_307, 328),
        (learned(CIFAR10), 35_749_766, 328),
        (AT_256, 113_673_219, 450),
        (LARGE, 255_677_955, 450),
    ],
    ids=["cifar10", "cifar10-learned", "256", "256-large"],
)
def test_parameters_equal_the_papers_models_exactly(config: UNetConfig, parameters: int, tensors: int) -> None:
    weights = list(on_meta(config).parameters())
    assert sum(p.numel() for p in weights) == parameters
    assert len(weights) == tensors


def breakdown(model: UNet) -> dict[str, tuple[int, int]]:
    """(weights, biases) by kind of layer, told apart by type and place."""
    counts: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            kind = "norm"
        elif isinstance(module, nn.Conv2d):
            kind = "conv3x3" if module.kernel_size == (3, 3) else "nin_shortcut"
        elif isinstance(module, nn.Linear):
            kind = "temb_proj" if name.endswith("temb_proj") else "timestep" if name.startswith("temb") else "attention"
        else:
            continue
        weight, bias = counts.get(kind, (0, 0))
        assert module.weight is not None
        assert module.bias is not None
        counts[kind] = (weight + module.weight.numel(), bias + module.bias.numel())
    return counts


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            CIFAR10,
            {
                "conv3x3": (29_940_480, 11_523),
                "nin_shortcut": (1_294_336, 2_944),
                "attention": (1_572_864, 6_144),
                "temb_proj": (2_555_904, 4_992),
                "timestep": (327_680, 1_024),
                "norm": (14_208, 14_208),
            },
        ),
        (
            AT_256,
            {
                "conv3x3": (97_622_784, 23_043),
                "nin_shortcut": (4_210_688, 6_144),
                "attention": (6_291_456, 12_288),
                "temb_proj": (5_111_808, 9_984),
                "timestep": (327_680, 1_024),
                "norm": (28_160, 28_160),
            },
        ),
        (
            LARGE,
            {
                "conv3x3": (219_646_080, 34_563),
                "nin_shortcut": (9_474_048, 9_216),
                "attention": (14_155_776, 18_432),
                "temb_proj": (11_501_568, 14_976),
                "timestep": (737_280, 1_536),
                "norm": (42_240, 42_240),
            },
        ),
    ],
    ids=["cifar10", "256", "256-large"],
)
def test_parameters_break_down_by_kind_as_counted_apart(config: UNetConfig, expected: dict[str, Any]) -> None:
    assert breakdown(on_meta(config)) == expected


@pytest.mark.parametrize(
    ("config", "flops"),
    [
        (CIFAR10, 12_443_713_536),
        (learned(CIFAR10), 12_450_791_424),
        (AT_256, 497_027_514_368),
        (LARGE, 1_117_122_822_144),
    ],
    ids=["cifar10", "cifar10-learned", "256", "256-large"],
)
def test_flops_of_a_forward_pass_equal_the_anchors_exactly(config: UNetConfig, flops: int) -> None:
    model, counter = on_meta(config), FlopCounterMode(display=False)
    with counter:
        out = model(
            torch.empty(1, 3, config.image_size, config.image_size, device="meta"),
            torch.zeros(1, dtype=torch.int64, device="meta"),
        )
    assert out.shape == (1, config.out_channels or 3, config.image_size, config.image_size)
    assert counter.get_total_flops() == flops


def trace(config: UNetConfig) -> tuple[list[str], list[str]]:
    """What each block of the way down and up takes and gives, read off a forward pass: 'R in>out @height A'."""
    model = on_meta(config)
    seen: dict[str, list[str]] = {"down": [], "up": []}

    def watch(way: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, Block):
                mark = " A" if isinstance(module.attn, AttnBlock) else ""
                seen[way].append(f"{args[0].shape[1]}>{output.shape[1]} @{output.shape[2]}{mark}")
            else:
                assert args[0].shape[1] == output.shape[1]
                seen[way].append(f"{args[0].shape[2]}:{output.shape[2]}")

        module.register_forward_hook(hook)

    for way in ("down", "up"):
        for layer in getattr(model, way):
            watch(way, layer)
    size = config.image_size
    model(torch.empty(1, 3, size, size, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))
    return seen["down"], seen["up"]


def test_channels_of_cifar10_follow_the_papers_trace() -> None:
    down, up = trace(CIFAR10)
    assert down == [
        *["128>128 @32"] * 2,
        "32:16",
        *["128>256 @16 A", "256>256 @16 A"],
        "16:8",
        *["256>256 @8"] * 2,
        "8:4",
        *["256>256 @4"] * 2,
    ]
    assert up == [
        *["512>256 @4"] * 3,
        "4:8",
        *["512>256 @8"] * 3,
        "8:16",
        *["512>256 @16 A", "512>256 @16 A", "384>256 @16 A"],
        "16:32",
        *["384>128 @32", "256>128 @32", "256>128 @32"],
    ]
    assert 1 + len(down) == sum(">" in layer for layer in up) == 12  # skips: conv_in and every layer down


def test_channels_at_256_follow_the_papers_trace() -> None:
    down, up = trace(AT_256)
    assert down == [
        *["128>128 @256"] * 2,
        "256:128",
        *["128>128 @128"] * 2,
        "128:64",
        *["128>256 @64", "256>256 @64"],
        "64:32",
        *["256>256 @32"] * 2,
        "32:16",
        *["256>512 @16 A", "512>512 @16 A"],
        "16:8",
        *["512>512 @8"] * 2,
    ]
    assert up == [
        *["1024>512 @8"] * 3,
        "8:16",
        *["1024>512 @16 A", "1024>512 @16 A", "768>512 @16 A"],
        "16:32",
        *["768>256 @32", "512>256 @32", "512>256 @32"],
        "32:64",
        *["512>256 @64", "512>256 @64", "384>256 @64"],
        "64:128",
        *["384>128 @128", "256>128 @128", "256>128 @128"],
        "128:256",
        *["256>128 @256"] * 3,
    ]
    assert 1 + len(down) == sum(">" in layer for layer in up) == 18


@pytest.mark.parametrize("config", [CIFAR10, AT_256], ids=["cifar10", "256"])
def test_there_are_six_attention_blocks_one_of_them_in_the_middle(config: UNetConfig) -> None:
    model = on_meta(config)
    assert sum(isinstance(module, AttnBlock) for module in model.modules()) == 6
    assert isinstance(model.mid1.attn, AttnBlock)
    assert not isinstance(model.mid2.attn, AttnBlock)


def layers(model: UNet) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, module


BOUNDS = {  # paper.md, 6.6: (kind, in, out) -> L of U(-L, L)
    ("conv3", 128, 128): 5.103103630798288e-02,
    ("conv3", 256, 256): 3.608439182435161e-02,
    ("conv3", 3, 128): 7.133763750064218e-02,
    ("linear", 128, 512): 9.682458365518543e-02,
    ("linear", 512, 512): 7.654655446197431e-02,
    ("linear", 256, 256): 1.082531754730548e-01,
    ("linear", 512, 256): 8.838834764831845e-02,
}


def test_weights_fill_the_papers_bounds_and_closing_layers_1e5th_of_them() -> None:
    torch.manual_seed(0)
    model = UNet(CIFAR10)
    met = set()
    for name, layer in layers(model):
        assert bool((layer.bias == 0).all()) if layer.bias is not None else False, name
        kind = "linear" if isinstance(layer, nn.Linear) else f"conv{layer.kernel_size[0]}"
        key = (kind, layer.weight.shape[1], layer.weight.shape[0])
        if key not in BOUNDS:
            continue
        met.add(key)
        closing = name.endswith(("conv2", "proj_out")) or name == "conv_out"
        bound = BOUNDS[key] * (1e-5 if closing else 1.0)
        largest = float(layer.weight.detach().abs().max())
        # n numbers uniform in (-L, L): P(max < 0.99 L) = 0.99^n, 1e-15 for the smallest weight, n = 3456. float32.
        assert 0.99 * bound < largest <= bound * (1 + 1e-6), name
        # Their mean square is L^2 / 3, with a standard error of 0.9 / sqrt(n) of itself: five of them.
        n = layer.weight.numel()
        assert float(layer.weight.detach().double().square().mean()) == pytest.approx(
            bound**2 / 3, rel=5 * 0.9 / n**0.5
        )
    assert met == set(BOUNDS)


def test_exactly_the_layers_that_close_a_branch_start_near_zero() -> None:
    torch.manual_seed(0)
    small = {name for name, layer in layers(UNet(SMALL)) if float(layer.weight.detach().abs().max()) < 1e-4}
    expected = {name for name, _ in layers(UNet(SMALL)) if name.endswith(("conv2", "proj_out"))} | {"conv_out"}
    assert small == expected


def test_a_new_network_outputs_about_zero() -> None:
    torch.manual_seed(0)
    config = PRESETS["tiny"].unet
    out = UNet(config)(torch.randn(4, 1, 8, 8, generator=generator(0)), torch.tensor([0, 10, 500, 999])).detach()
    # The paper's network: std 8.3e-6, max 3.5e-5 (paper.md, 6.7). conv_out is 1e-5 of a unit-variance layer.
    assert 1e-7 < float(out.std()) < 3e-5
    assert float(out.abs().max()) < 1e-4


def test_norms_have_32_groups_and_tensorflows_epsilon() -> None:
    norms = [module for module in on_meta(CIFAR10).modules() if isinstance(module, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps, norm.affine) for norm in norms} == {(32, 1e-6, True)}


def test_dropout_stands_between_the_second_swish_and_convolution_alone() -> None:
    """There, at a rate of 1/2, each number is either dropped or doubled; the evaluation leaves it."""
    rates = [module.p for module in on_meta(CIFAR10).modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.1] * 22  # 8 down, 2 in the middle, 12 up
    block = ResBlock(64, 64, 32, dropout=0.5)
    seen: list[Tensor] = []
    block.conv2.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, temb = torch.randn(2, 64, 4, 4, generator=generator(0)), torch.randn(2, 32, generator=generator(1))
    torch.manual_seed(0)
    block.eval()(x, temb)
    block.train()(x, temb)
    kept, dropped = seen[1] == 2 * seen[0], seen[1] == 0
    assert bool((kept | dropped).all())
    assert 0.4 < float(dropped.float().mean()) < 0.6  # of 2048 coins: nine standard errors


def test_downsampling_pads_below_and_at_the_right_only() -> None:
    """A kernel with a single 1 at (a, b) reads pixel (2i + a, 2j + b): beyond the last row and column is 0, and there is
    nothing before the first. Symmetric padding would read (2i + a - 1, 2j + b - 1)."""
    down = Downsample(1)
    x = torch.arange(1.0, 37.0).reshape(1, 1, 6, 6)
    padded = torch.zeros(7, 7)
    padded[:6, :6] = x[0, 0]
    for a in range(3):
        for b in range(3):
            with torch.no_grad():
                down.conv.weight.zero_()
                down.conv.weight[0, 0, a, b] = 1.0
            assert torch.equal(down(x)[0, 0], padded[a : a + 5 : 2, b : b + 5 : 2])


def test_upsampling_repeats_each_pixel_before_its_convolution() -> None:
    up = Upsample(1)
    x = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    with torch.no_grad():
        up.conv.weight.zero_()
        up.conv.weight[0, 0, 1, 1] = 1.0
    assert torch.equal(up(x)[0, 0], x[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_attention_is_a_softmax_over_all_pixels_with_one_head() -> None:
    block = AttnBlock(64).to(torch.float64)
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(i), dtype=torch.float64) * 0.3)
    x = torch.randn(2, 64, 3, 5, generator=generator(9), dtype=torch.float64)
    h = F.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-6)
    q, k, v = (
        torch.einsum("bchw,oc->bohw", h, layer.weight) + layer.bias.reshape(-1, 1, 1)
        for layer in (block.q, block.k, block.v)
    )
    logits = torch.einsum("bchw,bcij->bhwij", q, k) / math.sqrt(64)
    weights = logits.flatten(3).exp()
    weights = (weights / weights.sum(-1, keepdim=True)).reshape(logits.shape)
    mixed = torch.einsum("bhwij,bcij->bchw", weights, v)
    out = x + torch.einsum("bchw,oc->bohw", mixed, block.proj_out.weight) + block.proj_out.bias.reshape(-1, 1, 1)
    # Sums of 64 float64 products.
    torch.testing.assert_close(block(x), out, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("i", "entries", "total"),
    [
        (0, {0: 0.0, 63: 0.0, 64: 1.0, 127: 1.0}, 64.0),
        (
            1,
            {0: 8.414709848078965e-01, 1: 7.604387421101088e-01, 64: 5.403023058681398e-01, 65: 6.494096700065340e-01},
            69.01759369797136,
        ),
        (
            500,
            {0: -4.677718053224761e-01, 63: 4.997916927067828e-02, 127: 9.987502603949663e-01},
            22.23961501440704,
        ),
        (
            999,
            {
                0: -2.646075273706413e-02,
                1: 7.267088255747884e-01,
                64: 9.996498529808264e-01,
                65: -6.869456185402973e-01,
            },
            13.49846386150112,
        ),
    ],
)
def test_the_timestep_embedding_equals_the_anchors(i: int, entries: dict[int, float], total: float) -> None:
    e = timestep_embedding(torch.tensor([i]), 128)[0]
    assert e.dtype == torch.float32
    # Rounded once, to float32: 3e-8 for each of 128 entries. Frequencies in float32 would miss by 1e-4 at i = 999.
    assert {k: float(e[k]) for k in entries} == pytest.approx(entries, abs=6e-8)
    assert float(e.double().sum()) == pytest.approx(total, abs=128 * 3e-8)
    assert float(e.double().norm()) == pytest.approx(8.0, abs=1e-6)


def independent_forward(weights: dict[str, Tensor], config: UNetConfig, x: Tensor, t: Tensor) -> Tensor:
    """The network by the pseudo-code of paper.md, 4.2, in plain functions of named weights."""

    def swish(h: Tensor) -> Tensor:
        return h / (1 + torch.exp(-h))

    def norm(name: str, h: Tensor) -> Tensor:
        groups = h.reshape(len(h), 32, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        scale, shift = (weights[f"{name}.{part}"].reshape(1, -1, 1, 1) for part in ("weight", "bias"))
        return groups.reshape(h.shape) * scale + shift

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        """A sum over the nine shifted images."""
        w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if w.shape[-1] == 1:
            return torch.einsum("bchw,oc->bohw", h, w[:, :, 0, 0]) + b.reshape(1, -1, 1, 1)
        first, size = (1, h.shape[2]) if stride == 1 else (0, h.shape[2] // 2)
        padded = h.new_zeros(*h.shape[:2], h.shape[2] + 2, h.shape[3] + 2)
        padded[:, :, first : first + h.shape[2], first : first + h.shape[3]] = h
        out = b.reshape(1, -1, 1, 1).expand(len(h), -1, size, size)
        for a in range(3):
            for c in range(3):
                window = padded[:, :, a : a + stride * size : stride, c : c + stride * size : stride]
                out = out + torch.einsum("bchw,oc->bohw", window, w[:, :, a, c])
        return out

    def dense(name: str, h: Tensor) -> Tensor:
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def res(name: str, h: Tensor) -> Tensor:
        inner = (
            conv(f"{name}.conv1", swish(norm(f"{name}.norm1", h)))
            + dense(f"{name}.temb_proj", swish(temb))[..., None, None]
        )
        inner = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", inner)))
        return (conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in weights else h) + inner

    def attention(name: str, h: Tensor) -> Tensor:
        pixels = norm(f"{name}.norm", h).flatten(2).mT
        q, k, v = (dense(f"{name}.{part}", pixels) for part in "qkv")
        w = (q @ k.mT * h.shape[1] ** -0.5).exp()
        return h + dense(f"{name}.proj_out", w / w.sum(-1, keepdim=True) @ v).mT.reshape(h.shape)

    def block(name: str, h: Tensor) -> Tensor:
        h = res(f"{name}.res", h)
        return attention(f"{name}.attn", h) if h.shape[2] in config.attn_resolutions else h

    half = config.ch // 2
    frequencies = [math.exp(-j * math.log(10000) / (half - 1)) for j in range(half)]
    rows = [[f(i * w) for f in (math.sin, math.cos) for w in frequencies] for i in t.tolist()]
    temb = dense("temb.2", swish(dense("temb.0", torch.tensor(rows, dtype=torch.float32).to(x.dtype))))

    h = conv("conv_in", x)
    hs = [h]
    levels, layer = len(config.ch_mult), 0
    for level in range(levels):
        for _ in range(config.num_res_blocks):
            hs.append(block(f"down.{layer}", hs[-1]))
            layer += 1
        if level != levels - 1:
            hs.append(conv(f"down.{layer}.conv", hs[-1], stride=2))
            layer += 1
    h = res("mid2.res", attention("mid1.attn", res("mid1.res", hs[-1])))
    layer = 0
    for level in reversed(range(levels)):
        for _ in range(config.num_res_blocks + 1):
            h = block(f"up.{layer}", torch.cat([h, hs.pop()], 1))
            layer += 1
        if level != 0:
            h = conv(f"up.{layer}.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            layer += 1
    assert not hs
    return conv("conv_out", swish(norm("norm_out", h)))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        PRESETS["tiny"].unet,
        UNetConfig(image_size=8, out_channels=6, ch=32, ch_mult=(1, 2, 3), num_res_blocks=2, attn_resolutions=(8, 2)),
    ],
    ids=["small", "tiny", "three-levels"],
)
def test_the_network_equals_the_papers_pseudo_code(config: UNetConfig) -> None:
    model = trained(config)
    x, t = inputs(config, 3)
    with torch.no_grad():
        out, expected = model(x, t), independent_forward(dict(model.named_parameters()), config, x, t)
    assert float(out.std()) > 0.01
    # float64 rounding, 1e-16, through sums of up to 1152 products and some twenty layers.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10 * float(out.std()))


@pytest.mark.parametrize("half", ["first", "second"])
def test_the_skip_joins_behind_what_comes_from_below(half: str) -> None:
    """[h, skip]: cut off from the first half of its input, the first block up no longer sees the middle; cut off from the
    second, it still does. (128 channels make 32 groups of four, so no norm mixes the halves.)"""
    model = trained(UNetConfig(image_size=8, ch=64, ch_mult=(1,), num_res_blocks=1, attn_resolutions=()))
    x, t = inputs(model.config, 2)
    block = model.up[0]
    assert isinstance(block, Block)
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        for weight in (block.res.conv1.weight, block.res.shortcut.get_parameter("weight")):
            weight[:, slice(0, 64) if half == "first" else slice(64, 128)] = 0
        model(x, t)
        model.mid2.register_forward_hook(lambda module, args, out: out.square() + 1)
        model(x, t)
    assert torch.equal(seen[0], seen[1]) == (half == "first")


def test_a_gradient_reaches_every_parameter_but_the_key_bias() -> None:
    """A constant added to every key shifts all of a query's logits alike, and softmax does not see it."""
    model = trained(SMALL)
    x, t = inputs(SMALL, 2)
    model(x, t).square().mean().backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    assert sizes.keys() == dict(model.named_parameters()).keys()
    unreached = {name for name, size in sizes.items() if size < 1e-12}
    assert unreached == {name for name in sizes if name.endswith("k.bias")}


def test_an_images_output_does_not_depend_on_its_batch_mates() -> None:
    model = trained(SMALL)
    x, t = inputs(SMALL, 4)
    with torch.no_grad():
        together = model(x, t)
        for i in range(4):
            # float64 rounding: other batch sizes may add in another order.
            torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1])[0], together[i], rtol=1e-10, atol=1e-10)


def test_the_output_depends_on_the_timestep_through_every_residual_block() -> None:
    model = trained(SMALL)
    x, _ = inputs(SMALL, 1)
    changed: list[bool] = []
    previous: dict[int, Tensor] = {}
    for index, module in enumerate(m for m in model.modules() if isinstance(m, ResBlock)):

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, index: int = index) -> None:
            if index in previous:
                changed.append(not torch.equal(previous[index], out))
            previous[index] = out

        module.temb_proj.register_forward_hook(hook)
    with torch.no_grad():
        model(x, torch.tensor([10]))
        model(x, torch.tensor([11]))
    assert changed == [True] * 8  # 2 down, 2 in the middle, 4 up


def mirror(model: UNet, down: str) -> None:
    """Make every kernel symmetric left to right, those of stride 2 in the named way."""
    with torch.no_grad():
        strided = {id(m.conv) for m in model.modules() if isinstance(m, Downsample)}
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                w = module.weight
                if id(module) in strided and down == "two columns":
                    w[..., 1], w[..., 2] = w[..., 0].clone(), 0.0
                else:
                    w.copy_((w + w.flip(3)) / 2)


def flip_error(model: UNet) -> float:
    x, t = inputs(model.config, 2)
    with torch.no_grad():
        out = model(x, t)
        return float((model(x.flip(3), t) - out.flip(3)).abs().max() / out.std())


def test_symmetric_kernels_commute_with_a_flip_without_downsampling() -> None:
    model = trained(UNetConfig(image_size=8, ch=64, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(8,)))
    assert flip_error(model) > 0.1
    mirror(model, "three columns")
    assert flip_error(model) < 1e-9  # float64 rounding through some ten layers


def test_downsampling_is_off_centre_by_half_a_pixel() -> None:
    """Padded at the right only, output j reads columns 2j, 2j+1, 2j+2: the mirror of that pairs the first two. So a
    kernel (a, a, 0) commutes with a flip and the symmetric (a, b, a) does not."""
    model = trained(SMALL)
    mirror(model, "three columns")
    assert flip_error(model) > 0.01
    mirror(model, "two columns")
    assert flip_error(model) < 1e-9


def test_bfloat16_autocast_and_float32_agree_to_bfloat16() -> None:
    model = trained(SMALL).to(torch.float32)
    x, t = inputs(SMALL, 2)
    with torch.no_grad():
        exact = model(x.float(), t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(x.float(), t).float()
    # bfloat16 has 8 bits: 0.4 % a rounding, some thirty roundings that partly cancel.
    assert float((rough - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(
    ("x", "t", "sentence"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2).long(), r"^x is torch.uint8 \[2, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), torch.zeros(2).long(), r"^x is torch.float32 \[3, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), r"^x is \[2, 1, 8, 8\]: this network wants \[B, 3, 8, 8\]"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2).long(), r"^x is \[2, 3, 16, 16\]"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), r"^t is torch.float32 \[2\]: one int64 timestep an image"),
        (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(1).long(),
            r"^t is torch.int64 \[1\]: one int64 timestep an image, \[2\]",
        ),
    ],
)
@unchecked()
def test_what_the_network_cannot_take_is_refused_by_name(x: Tensor, t: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        UNet(SMALL)(x, t)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"ch": 48}, "ch is 48: it must be a multiple of 32"),
        ({"ch": 0}, "ch is 0"),
        ({"ch_mult": ()}, r"ch_mult is \(\)"),
        ({"ch_mult": (1, 0)}, r"ch_mult is 0: give a number from 1 to 64"),
        ({"image_size": 30}, "image_size is 30: 4 levels halve it 3 times, so it must be a multiple of 8"),
        ({"image_size": 4}, "image_size is 4"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_a_configuration_that_is_no_network_is_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        UNetConfig(**{"image_size": 32, **values})
