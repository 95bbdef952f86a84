"""Addressed randomness: every number is a function of (seed, purpose, index, step), never of call order.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a
keyed bijection of a 128-bit counter. The key is a hash of (seed, purpose); the counter is the address:

    word 0  block of four numbers inside one item       word 2, 3  the item's index (a sample, an image)
    word 1  step (training step, timestep, epoch)

so sample 31,337 draws the same noise on any worker, in any batch, in any order. Written in torch integer
arithmetic: the integers are equal on every device; normals are equal to float32 rounding.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RoundKeys = tuple[tuple[int, int], ...]  # two 32-bit words for each of Philox's ten rounds

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def derive_key(seed: int, purpose: str) -> tuple[int, int]:
    """Two 32-bit words that name a stream; stable across processes, versions and platforms."""
    digest = hashlib.sha256(f"{seed}\x00{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def derive_seed(seed: int, purpose: str, *address: int) -> int:
    """A 63-bit seed for a library that wants one (such as torch.Generator)."""
    text = "\x00".join([str(seed), purpose, *map(str, address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def key_schedule(key: tuple[int, int]) -> RoundKeys:
    """The keys of Philox's rounds: the key, raised by the Weyl constants from round to round."""
    return tuple(((key[0] + i * _WEYL[0]) & _MASK, (key[1] + i * _WEYL[1]) & _MASK) for i in range(10))


@functools.cache
def _round_keys(seed: int, purpose: str) -> RoundKeys:
    return key_schedule(derive_key(seed, purpose))


def round_keys(seed: int, purpose: str) -> RoundKeys:
    """The keys of the rounds in a stream, hashed once."""
    return _round_keys(seed, purpose)


# What torch.compiler.assume_constant_result does, without importing the compiler: compiled code holds the keys themselves.
round_keys._dynamo_marked_constant = True  # type: ignore[attr-defined]


def philox4x32(
    counter: tuple[Int[Tensor, "*#s"], Int[Tensor, "*#s"], Int[Tensor, "*#s"], Int[Tensor, "*#s"]], keys: RoundKeys
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. Words are int64 tensors that hold 32-bit values; shapes broadcast."""
    c0, c1, c2, c3 = counter
    for k0, k1 in keys:
        # 32 x 32 -> 64 bits: the product wraps modulo 2^64, and its bits are right. The mask drops the sign that >> repeats;
        # what c1 and c3 have above their 32 bits goes with it.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) ^ c1 ^ k0) & _MASK,
            product1,
            ((product0 >> 32) ^ c3 ^ k1) & _MASK,
            product0,
        )
    return c0, c1 & _MASK, c2, c3 & _MASK


def bits(seed: int, purpose: str, indices: Int[Tensor, " b"], step: int, count: int) -> Int[Tensor, "b {4*count}"]:
    """4 * `count` words of 32 random bits for each index, as int64."""
    words = _blocks(round_keys(seed, purpose), indices, step, count)
    return torch.stack(words, dim=-1).flatten(1)


def _blocks(keys: RoundKeys, indices: Tensor, step: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each of `count` blocks of each index, int64 [b, count]."""
    index = indices.to(torch.int64)[:, None]
    block = torch.arange(count, device=indices.device)[None, :]
    step_word = torch.full((1, 1), step & _MASK, dtype=torch.int64, device=indices.device)
    return philox4x32((block, step_word, index & _MASK, (index >> 32) & _MASK), keys)


def normal(
    seed: int,
    purpose: str,
    indices: Int[Tensor, " b"],
    step: int,
    shape: Sequence[int],
    *,
    compiled: bool = False,
) -> Float[Tensor, "b ..."]:
    """Standard normals, float32 [b, *shape], by Box and Muller; item i depends on indices[i] alone.

    compiled: by one kernel of torch.compile's in place of 140; the integers are the same, the normals to float32 rounding.
    """
    draw = _compiled_normals() if compiled else _normals
    return draw(round_keys(seed, purpose), indices, step & _MASK, math.prod(shape)).reshape(len(indices), *shape)


def _normals(keys: RoundKeys, indices: Tensor, step: int, size: int) -> Tensor:
    words = _blocks(keys, indices, step, -(-size // 4))
    # (w + 1/2) / 2^32 lies in (0, 1], so the logarithm is finite; the largest normal is 6.8.
    uniform = [(word.to(torch.float32) + 0.5) * 2.0**-32 for word in words]
    # Box & Muller 1958: sqrt(-2 ln u1) (cos 2 pi u2, sin 2 pi u2)
    normals = []
    for u1, u2 in (uniform[:2], uniform[2:]):
        radius, angle = torch.sqrt(-2.0 * torch.log(u1)), (2.0 * math.pi) * u2
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :size]


@functools.cache
def _compiled_normals() -> Callable[[RoundKeys, Tensor, int, int], Tensor]:
    """Compiled once for all streams, steps and sizes, which it takes as numbers."""
    return torch.compile(_normals, fullgraph=True, dynamic=True)


def integers(seed: int, purpose: str, indices: Int[Tensor, " b"], step: int, high: int) -> Int[Tensor, " b"]:
    """Uniform integers in 0..high-1 (high <= 2^31), int64; the bias is below high / 2^32."""
    return (bits(seed, purpose, indices, step, 1)[:, 0] * high) >> 32


def coins(seed: int, purpose: str, indices: Int[Tensor, " b"], step: int) -> Bool[Tensor, " b"]:
    """Fair coin flips."""
    return bits(seed, purpose, indices, step, 1)[:, 0] % 2 == 1


def permutation(seed: int, purpose: str, step: int, size: int) -> Int[Tensor, " size"]:
    """A uniform permutation of 0..size-1: the order of `size` random 63-bit keys."""
    words = bits(seed, purpose, torch.arange(size), step, 1)
    # 63 bits, so that two keys of a million are equal once in 10^7 permutations; stable, so that even then it is one.
    return torch.argsort(((words[:, 0] & 0x7FFFFFFF) << 32) | words[:, 1], stable=True)


@dataclass(frozen=True)
class SampleNoise:
    """Noise of a sampling chain: `noise(i)` is float32 [len(indices), *shape] for address i, where the sampler
    asks for i = T (the initial x_T) and then for each timestep it draws at."""

    seed: int
    indices: Tensor  # int64 [b]: the samples' numbers in the whole evaluation
    shape: tuple[int, ...]  # of one sample, (C, H, W)
    purpose: str = "sample"
    compiled: bool = False  # in one kernel: equal to float32 rounding, not to the bit

    def __call__(self, address: int) -> Tensor:
        return normal(self.seed, self.purpose, self.indices, address, self.shape, compiled=self.compiled)
