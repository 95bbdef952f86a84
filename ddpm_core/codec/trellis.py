"""A noise vector named by few bits: maximum-likelihood search over a trellis of shared Gaussian noise.

Sender and receiver share a tree of candidates z ~ p = N(0, (1 + r) I_n); the sender names the one that q = N(delta, I)
makes likeliest: log q(z)/p(z) = sqrt(1 + r) delta.c - r |c|^2 / 2 + const for z = sqrt(1 + r) c. If r = |delta|^2 / n, the
candidates must be about 2^KL(q || p), and KL(q || p) = n/2 log2(1 + r) bits; so B bits state r as well.

A path is B bits. The n dimensions are cut into cells, about one a bit and at most 64 wide; a cell reads the WINDOW newest
bits at its place, and their value picks its noise from one code book of 2^WINDOW rows, with signs of the cell's own (and
if cells share a place, a permutation of the rows). So the best of 2^B candidates is found exactly in B 2^WINDOW
additions (Viterbi 1967); with at most WINDOW bits it is a plain random code. Long paths begin with WINDOW/2 bits at once
and end in as many zeros, so that every bit is seen by enough cells.

WINDOW is 14: 12 carries 1 to 4 % less in as many bits, and one more doubles the work.
"""

import functools
import math
from statistics import NormalDist

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ddpm_core import rng

WINDOW = 14
WIDEST = 64
HELD = 1 << 27  # bytes that a search takes at once, about
ROWS = 1 << WINDOW


@functools.cache
def _quantiles() -> Tensor:
    """The standard normal at 65,536 equally likely places, in multiples of 2^-16: the same bits on every machine."""
    normal = NormalDist()
    upper = [round(normal.inv_cdf((i + 0.5) / 65536) * 65536) / 65536 for i in range(32768, 65536)]
    return torch.tensor([-value for value in reversed(upper)] + upper, dtype=torch.float64)


def exact_normal(seed: int, purpose: str, step: int, size: int) -> Float64[Tensor, " size"]:
    """Standard normals, a function of the address, of the same bits on every machine and device."""
    words = rng.bits(seed, purpose, torch.zeros(1, dtype=torch.int64), step, -(-size // 8))[0]
    return _quantiles()[torch.stack([words & 0xFFFF, words >> 16], dim=1).flatten()[:size]]


class Trellis:
    """The shared candidates of one step for blocks of n dimensions; a function of (seed, step, block)."""

    def __init__(self, seed: int, step: int, blocks: int, n: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.blocks, self.n, self.device = seed, step, blocks, n, torch.device(device)
        self.book = _book(seed).to(device)

    def search(
        self, delta: Float64[Tensor, "rows n"], block: Int[Tensor, " rows"], bits: int
    ) -> Int[Tensor, "rows bits"]:
        """The likeliest path, 0s and 1s, of each row; `block` says which block it is."""
        if bits == 0:
            return torch.zeros(len(delta), 0, dtype=torch.int64, device=self.device)
        cells, rows = _Cells(self, bits), max(1, HELD // (ROWS * (bits + 8 * WIDEST)))
        parts = zip(delta.split(rows), block.split(rows), strict=True)
        return torch.cat([cells.search(part, part_block) for part, part_block in parts])

    def excess(self, bits: int) -> float:
        """r of candidates that so many bits name."""
        return math.expm1(2.0 * math.log(2.0) * bits / self.n)

    def noise(self, path: Int[Tensor, "rows bits"], block: Int[Tensor, " rows"]) -> Float64[Tensor, "rows n"]:
        """The candidates that paths of one length name."""
        return _Cells(self, path.shape[1]).noise(path, block)


class _Cells:
    """How paths of one length are spread over the dimensions."""

    def __init__(self, trellis: Trellis, bits: int) -> None:
        self.bits, self.n, self.device = bits, trellis.n, trellis.device
        self.free = bits <= WINDOW  # the whole path is in every window
        start = bits if self.free else WINDOW // 2
        places = 1 if self.free else bits + WINDOW - 2 * start + 1
        self.width = min(WIDEST, -(-self.n // places))
        self.count = -(-self.n // self.width)
        self.places = (start + torch.arange(self.count) * (places - 1) // max(1, self.count - 1)).to(self.device)
        self.spread = trellis.excess(bits)
        self.book = trellis.book[:, : self.width]
        cell = torch.arange(trellis.blocks * self.count, device=self.device)
        words = rng.bits(trellis.seed, "codec cells", cell, trellis.step, 1).reshape(trellis.blocks, self.count, 4)
        self.signs = (words[..., :2, None] >> torch.arange(32, device=self.device) & 1).flatten(2)[..., : self.width]
        self.signs = (self.signs * 2 - 1).to(torch.float64)
        self.permuted = self.count > places  # cells that share a place read different rows
        self.multiplier = words[..., 2] % ROWS | 1  # odd: a permutation of the rows
        self.shift = words[..., 3] % ROWS

    def noise(self, path: Tensor, block: Tensor) -> Tensor:
        """What paths name, [rows, n]: each cell's row of the code book is the number that its window of the path spells."""
        padded = torch.nn.functional.pad(path, (WINDOW, WINDOW))
        window = torch.zeros(len(path), self.count, dtype=torch.int64, device=self.device)
        for age in range(WINDOW):
            window += padded[:, self.places + WINDOW - 1 - age] << age
        if self.permuted:
            window = (window * self.multiplier[block] + self.shift[block]) % ROWS
        return math.sqrt(1.0 + self.spread) * (self.book[window] * self.signs[block]).flatten(1)[:, : self.n]

    def search(self, delta: Tensor, block: Tensor) -> Tensor:
        """The likeliest path of each row of delta, [rows, bits]."""
        padded = torch.nn.functional.pad(delta, (0, self.count * self.width - self.n))
        targets = padded.reshape(len(delta), self.count, self.width) * self.signs[block]
        targets *= math.sqrt(1.0 + self.spread)
        # log q(z)/p(z) = sqrt(1 + r) delta.c - r |c|^2 / 2 + const
        self.cost = 0.5 * self.spread * self.book.square().sum(1)
        if self.free:
            gains = self._gains(targets, block, slice(None), 1 << self.bits)
            return _bits(gains.sum(1).argmax(1), self.bits).flip(1)
        window, leaving = self._best_window(targets, block)
        return self._trace_back(window, leaving)

    def _best_window(self, targets: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Viterbi's forward pass over the places: (the best last window [rows], for each place, row and window without its
        newest bit the bit that left it on the best path there [places, rows, ROWS/2])."""
        half = ROWS // 2
        first, last = int(self.places[0]), int(self.places[-1])
        best = torch.full((len(targets), ROWS), -torch.inf, dtype=torch.float64, device=self.device)
        best[:, : 1 << first] = 0.0  # the window is filled by what has been sent
        leaving = torch.zeros(last + 1, len(targets), half, dtype=torch.bool, device=self.device)
        first_cell = torch.searchsorted(
            self.places, torch.arange(last + 2, device=self.device)
        ).tolist()  # at each place
        for place in range(first, last + 1):
            if place > first:
                zero, one = best[:, :half], best[:, half:]  # by the bit that leaves the window
                torch.gt(one, zero, out=leaving[place])
                best = torch.maximum(zero, one).repeat_interleave(2, 1)
            if place > self.bits:
                best[:, 1::2] = -torch.inf  # the path is over: zeros follow
            if first_cell[place] < first_cell[place + 1]:
                cells = slice(first_cell[place], first_cell[place + 1])
                best = best + self._gains(targets, block, cells, ROWS).sum(1)
        return best.argmax(1), leaving

    def _trace_back(self, window: Tensor, leaving: Tensor) -> Tensor:
        """The path that ends in a window, [rows, bits]."""
        first, last = int(self.places[0]), int(self.places[-1])
        path = [_bits(window, WINDOW)]  # newest first
        for place in range(last, first, -1):
            bit = leaving[place].gather(1, (window >> 1)[:, None]).to(torch.int64)
            window = window >> 1 | bit[:, 0] * (ROWS // 2)
            path.append(bit)
        return torch.cat(path, dim=1)[:, last - self.bits : last].flip(1)

    def _gains(self, targets: Tensor, block: Tensor, cells: slice, windows: int) -> Tensor:
        """log q/p of each window's noise in some cells, but for a constant: [rows, cells, windows]."""
        gains = targets[:, cells] @ self.book.T - self.cost
        if not self.permuted:
            return gains[..., :windows]
        every = torch.arange(windows, device=self.device)
        rows = (every * self.multiplier[block, cells, None] + self.shift[block, cells, None]) % ROWS
        return gains.gather(2, rows)


def _bits(window: Tensor, count: int) -> Tensor:
    """The `count` newest bits [rows, count], newest first."""
    return window[:, None] >> torch.arange(count, device=window.device) & 1


@functools.lru_cache(maxsize=4)
def _book(seed: int) -> Tensor:
    return exact_normal(seed, "codec book", 0, ROWS * WIDEST).reshape(ROWS, WIDEST)
