"""The paper's U-Net (appendix B): PixelCNN++ backbone, group norm, one-head self-attention at 16x16.

Layer by layer as in Ho's code: 3x3 stride-2 downsampling padded (0, 1, 0, 1) as TensorFlow's SAME, nearest upsampling,
GroupNorm(32, eps 1e-6), concatenation [h, skip], Glorot-uniform weights, and the layers that close a residual branch
scaled to 1e-5 of that, so that a new network outputs about 0.

Memory format: channels_last weights carry through the whole network. Under autocast convolutions and products are bfloat16;
norms, the swish and the dropout behind them work in the weights' float32, softmax adds up in float32. Compiled, these are
kernels that read bfloat16 twice, for the sums and to apply them, and write it once, in either format.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_core.checks import check_images, check_timesteps
from ddpm_core.configs import UNetConfig as UNetConfig
from ddpm_core.dropout import addressed_dropout


def timestep_embedding(t: Int[Tensor, " b"], dim: int) -> Float[Tensor, "b {dim}"]:
    """[sin(t f), cos(t f)] with dim/2 frequencies f from 1 down to 1e-4, float32."""
    half = dim // 2
    # float64 for the frequencies: a relative error of 1e-7 in f is an error of 1e-4 radians at t = 999.
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / (half - 1)
    # f_k = 10000^(-k / (half - 1))
    angles = t.to(torch.float64)[:, None] * torch.exp(-math.log(10000.0) * exponents)[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.float32)


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def _init(layer: Layer, scale: float = 1.0) -> Layer:
    """Variance scaling, fan_avg, uniform: U(-L, L) with L = sqrt(3 scale / ((fan_in + fan_out) / 2)); biases 0.
    Scale 0 stands for 1e-10, as in Ho's code."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale or 1e-10))
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _conv3x3(in_channels: int, out_channels: int, scale: float = 1.0) -> nn.Conv2d:
    return _init(nn.Conv2d(in_channels, out_channels, 3, padding=1), scale)


class Norm(nn.GroupNorm):
    """GroupNorm(32, eps 1e-6) in the precision of its weights, also under autocast, on every device."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Downsample(nn.Module):
    """Halves height and width: 3x3 convolution, stride 2, padded below and at the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _init(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        # [B,C,H,W] -> [B,C,H/2,W/2]; TensorFlow's SAME pads an even size at its far end alone.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_double(x))


def _double(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,C,2H,2W]: each pixel four times."""
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    # The compiler would make the gradient of that by atomic additions in float32, in no fixed order and no memory format.
    b, c, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, height, 2, width, 2, c)
    doubled = rows.reshape(b, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
    return doubled.contiguous() if x.is_contiguous() else doubled


class ResBlock(nn.Module):
    """x + conv(dropout(swish(norm(conv(swish(norm(x))) + dense(swish(temb))))))."""

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = Norm(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels)
        self.temb_proj = _init(nn.Linear(temb_channels, out_channels))
        self.norm2 = Norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(out_channels, out_channels, scale=0.0)
        self.shortcut = _init(nn.Conv2d(in_channels, out_channels, 1)) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor, key: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # [B,C_in,H,W] -> [B,C_out,H,W]
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = F.silu(self.norm2(h))
        h = self.dropout(h) if key is None else addressed_dropout(h, self.dropout.p, key)
        return self.shortcut(x) + self.conv2(h)


class AttnBlock(nn.Module):
    """Self-attention over all pixels with one head of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q = _init(nn.Linear(channels, channels))
        self.k = _init(nn.Linear(channels, channels))
        self.v = _init(nn.Linear(channels, channels))
        self.proj_out = _init(nn.Linear(channels, channels), scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        # [B,C,H,W] -> [B,1,HW,C]: one head, pixels as the sequence; the attention's scale C^-1/2 is the default.
        h = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
        # One product for all three, by weights stacked here, for they keep their names in files.
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        q, k, v = F.linear(h, weight, bias).chunk(3, dim=-1)
        h = self.proj_out(F.scaled_dot_product_attention(q, k, v))
        return x + h.squeeze(1).transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """A residual block, followed by attention at the resolutions that have it."""

    def __init__(
        self, in_channels: int, out_channels: int, temb_channels: int, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, temb_channels, dropout)
        self.attn = AttnBlock(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor, key: Tensor | None = None) -> Tensor:
        return self.attn(self.res(x, temb, key))


def _run_joined(block: Block, h: Tensor, skip: Tensor, temb: Tensor, key: Tensor | None) -> Tensor:
    """A block on [h, skip]: one call, so that a checkpointed block keeps both and not their concatenation too."""
    return block(torch.cat([h, skip], dim=1), temb, key)


class UNet(nn.Module):
    """UNet(config)(x [B,C,H,W], t [B]) -> [B,C or 2C,H,W]; t is 0..T-1.

    dropout_key: int32 [B, config.dropout_layers, 2], from ddpm_core.dropout.dropout_keys, makes a training network's
    dropout a function of it; without one, dropout draws from torch's generator.
    activation_checkpointing: keep each layer's input alone for the backward pass and compute the rest again there.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        ch, temb_channels = config.ch, 4 * config.ch
        self.temb = nn.Sequential(
            _init(nn.Linear(ch, temb_channels)), nn.SiLU(), _init(nn.Linear(temb_channels, temb_channels))
        )
        self.conv_in = _conv3x3(config.in_channels, ch)

        def block(in_channels: int, out_channels: int, resolution: int) -> Block:
            attention = resolution in config.attn_resolutions
            return Block(in_channels, out_channels, temb_channels, config.dropout, attention)

        widths = [ch * factor for factor in config.ch_mult]
        last = len(widths) - 1
        skips, current = [ch], ch  # channels of each output on the way down, which the way up takes again
        self.down = nn.ModuleList()  # per level: the blocks, then the downsampling of all levels but the last
        for level, width in enumerate(widths):
            resolution = config.image_size // 2**level
            for _ in range(config.num_res_blocks):
                self.down.append(block(current, width, resolution))
                current = width
                skips.append(current)
            if level != last:
                self.down.append(Downsample(current))
                skips.append(current)

        self.mid1 = Block(current, current, temb_channels, config.dropout, attention=True)
        self.mid2 = Block(current, current, temb_channels, config.dropout, attention=False)

        self.up = (
            nn.ModuleList()
        )  # per level from the last: the blocks, then the upsampling of all levels but the first
        for level, width in reversed(list(enumerate(widths))):
            resolution = config.image_size // 2**level
            for _ in range(config.num_res_blocks + 1):
                self.up.append(block(current + skips.pop(), width, resolution))
                current = width
            if level != 0:
                self.up.append(Upsample(current))

        self.norm_out = Norm(current)
        self.conv_out = _conv3x3(current, config.out_channels or config.in_channels, scale=0.0)

    def _check_input(self, x: Tensor, t: Tensor) -> None:
        channels, size = self.config.in_channels, self.config.image_size
        check_images("x", x)
        check_timesteps(t, len(x))
        if x.shape[1:] != (channels, size, size):
            raise ValueError(f"x is {list(x.shape)}: this network wants [B, {channels}, {size}, {size}]")

    def _layer_keys(self, dropout_key: Tensor | None) -> list[Tensor | None]:
        """The dropout key of each residual block, the last block's first: forward() pops them. None for torch's dropout."""
        if dropout_key is None or not self.training:
            return [None] * (len(self.down) + len(self.up) + 2)
        if dropout_key.shape[1] != self.config.dropout_layers:
            raise ValueError(
                f"dropout_key is {list(dropout_key.shape)}: this network wants [B, {self.config.dropout_layers}, 2]"
            )
        return list(reversed(dropout_key.unbind(1)))

    def _run(self, layer: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        dropout_key: Int32[Tensor, "b layers 2"] | None = None,
    ) -> Float[Tensor, "b out h w"]:
        self._check_input(x, t)
        keys = self._layer_keys(dropout_key)
        temb = self.temb(timestep_embedding(t, self.config.ch).to(x.dtype))  # [B, 4 ch]
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, temb, keys.pop()) if isinstance(layer, Block) else self._run(layer, h)
            skips.append(h)
        h = self._run(self.mid1, h, temb, keys.pop())
        h = self._run(self.mid2, h, temb, keys.pop())
        for layer in self.up:
            if isinstance(layer, Block):
                h = self._run(_run_joined, layer, h, skips.pop(), temb, keys.pop())
            else:
                h = self._run(layer, h)
        return self.conv_out(F.silu(self.norm_out(h)))
