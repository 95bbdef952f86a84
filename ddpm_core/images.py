"""The one place where pixels change range: uint8 HWC outside, float32 CHW in [-1, 1] inside (paper, section 3.3)."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ddpm_core.checks import check_images
from ddpm_core.pixel_range import OFFSET, SCALE


def to_float(pixels: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
    """uint8 [b,h,w,c] -> float32 [b,c,h,w] in [-1, 1], by pixel/127.5 - 1."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}: uint8 [B,H,W,C] is wanted")
    # A GPU divides float32 by a number as a product with its reciprocal, which rounds otherwise. In float64 either rounds to
    # the same 256 values.
    scaled = torch.arange(256, dtype=torch.float64, device=pixels.device) / SCALE
    values = scaled.to(torch.float32) + OFFSET
    return values.index_select(0, pixels.reshape(-1).to(torch.int32)).reshape(pixels.shape).permute(0, 3, 1, 2)


def to_uint8(images: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
    """float [b,c,h,w] -> uint8 [b,h,w,c], clipped to [-1, 1] and rounded half up: floor((x+1)*127.5 + 1/2).
    Raises ValueError for NaN, which has no pixel."""
    check_images("images", images)
    if torch.isnan(images).any():
        raise ValueError("images hold NaN: give finite values, nominally in [-1, 1]")
    scaled = (images.to(torch.float32) * SCALE + (SCALE + 0.5)).clamp(0.0, 255.0)
    return scaled.floor().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
