"""Dropout by address: which units fall is a function of (seed, the image's place in the stream of batches, layer, unit).

So any number of workers and any cut into micro-batches drop the same units, a resumed run too, and recomputed activations
need no saved generator. Two numbers of Philox name an image in a layer; a hash of 32 bits spreads them over its units:
two rounds of multiply and xor-shift with the constants of C. Wellons' lowbias32. One hash decides two units.
"""

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from ddpm_core import rng

# As signed numbers: torch multiplies int32 modulo 2^32.
_WEYL, _FIRST, _SECOND = 0x9E3779B9 - (1 << 32), 0x7FEB352D, 0x846CA68B - (1 << 32)


def dropout_keys(seed: int, positions: Int[Tensor, " b"], layers: int) -> Int32[Tensor, "b {layers} 2"]:
    """A key for each image and dropout layer. positions: each image's place in the stream of all steps' batches."""
    words = rng.bits(seed, "dropout", positions, 0, -(-layers // 2))[:, : 2 * layers]
    return words.to(torch.int32).reshape(len(positions), layers, 2)


def addressed_dropout(h: Float[Tensor, "b c *rest"], p: float, key: Int32[Tensor, "b 2"]) -> Float[Tensor, "b c *rest"]:
    """h with each unit 0 with probability p, rounded to a multiple of 2^-16, and scaled so that its mean stays."""
    cut = min(round(p * 65536), 65535)  # of the 2^16 values of a half of a word, how many drop a unit
    word = torch.arange(-(-h[0].numel() // 2), dtype=torch.int32, device=h.device).mul_(_WEYL) + key[:, :1]
    word ^= (word >> 16) & 0xFFFF  # >> repeats the sign
    word *= _FIRST
    word ^= (word >> 15) & 0x1FFFF
    word += key[:, 1:]
    word *= _SECOND
    # Two units a word w: the lower half of w ^ (w >> 16) decides the even one, the upper half the odd one. As the upper halves
    # of w 2^16 ^ w and of w: an expression short enough for the compiler to keep it in one kernel with what it multiplies.
    halves = word[:, :, None] * torch.arange(65536, -1, -65536, dtype=torch.int32, device=h.device)
    halves ^= word[:, :, None]
    keep = (halves >= (cut - 32768) * 65536).flatten(1)[:, : h[0].numel()].view(h.shape)
    if not h.is_contiguous():
        keep = keep.contiguous(memory_format=torch.channels_last)  # units are numbered alike in both formats
    return h * keep.to(h.dtype).mul_(65536 / (65536 - cut))
