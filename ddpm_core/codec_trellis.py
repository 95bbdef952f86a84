"""A noise vector chosen by few bits: maximum-likelihood search over a trellis of shared Gaussian noise.

Sender and receiver share a tree of candidates z ~ N(0, I_n); the sender names the one that q = N(delta, I) makes likeliest
against p = N(0, I): log q(z)/p(z) = delta.z - |delta|^2/2. Reaching delta takes KL(q || p) = |delta|^2/2 nats.

A path is B bits. The n dimensions are cut into cells of 8; a cell reads the WINDOW newest bits at its place, and their
value picks its noise from one code book of 2^WINDOW rows, through a permutation and signs of the cell's own. So 2^B
candidates are searched exactly in B 2^WINDOW additions (Viterbi 1967), and with at most WINDOW bits it is a plain random
code. Paths begin with WINDOW/2 bits at once, and end in as many zeros, so that every bit is seen by enough cells.
"""

import functools
from statistics import NormalDist

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ddpm_core import rng

WINDOW = 12
CELL = 8
ROWS = 1 << WINDOW
MOST_BITS = WINDOW // 2  # a cell on average, so that none is passed over
SEARCHED = 1 << 24  # candidates of cells held at once: 128 MiB


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
    """The shared candidates of one step, for blocks of `cells` * CELL dimensions; a function of (seed, step, block)."""

    def __init__(self, seed: int, step: int, blocks: int, cells: int, device: torch.device | str = "cpu") -> None:
        self.cells, self.device = cells, torch.device(device)
        self.book = _book(seed).to(device)
        words = rng.bits(seed, "codec cells", torch.arange(blocks * cells, device=device), step, 1)
        words = words.reshape(blocks, cells, 4)
        self._multiplier = words[..., 0] % ROWS | 1  # odd: a permutation of the rows
        self._shift = words[..., 1] % ROWS
        self._signs = ((words[..., 2:3] >> torch.arange(CELL, device=device) & 1) * 2 - 1).to(torch.float64)

    def search(
        self, delta: Float64[Tensor, "rows n"], block: Int[Tensor, " rows"], bits: int
    ) -> Int[Tensor, "rows bits"]:
        """The likeliest path, 0s and 1s, of each row; `block` says which block it is."""
        if bits == 0:
            return torch.zeros(len(delta), 0, dtype=torch.int64, device=self.device)
        rows = max(1, SEARCHED // (self.cells * ROWS))
        parts = zip(delta.split(rows), block.split(rows), strict=True)
        return torch.cat([self._search(part, its_block, bits) for part, its_block in parts])

    def noise(self, path: Int[Tensor, "rows bits"], block: Int[Tensor, " rows"]) -> Float64[Tensor, "rows n"]:
        """The candidates that paths of one length name."""
        bits = path.shape[1]
        places = _places(bits, self.cells).to(self.device)
        padded = torch.nn.functional.pad(path, (WINDOW, WINDOW))
        window = torch.zeros(len(path), self.cells, dtype=torch.int64, device=self.device)
        for age in range(WINDOW):
            window += padded[:, places + WINDOW - 1 - age] << age
        return (self.book[self._row(window, block)] * self._signs[block]).flatten(1)

    def _row(self, window: Tensor, block: Tensor) -> Tensor:
        """Rows of the code book [rows, cells] for each cell's window."""
        return (window * self._multiplier[block] + self._shift[block]) % ROWS

    def _search(self, delta: Tensor, block: Tensor, bits: int) -> Tensor:
        places, windows = _places(bits, self.cells).to(self.device), 1 << min(bits, WINDOW)
        first, last = int(places[0]), int(places[-1])
        scores = (delta.reshape(len(delta), self.cells, CELL) * self._signs[block]) @ self.book.T  # [rows, cells, ROWS]
        every = torch.arange(windows, device=self.device)
        rows = (every * self._multiplier[block][..., None] + self._shift[block][..., None]) % ROWS
        scores = scores.gather(2, rows)
        gains = scores.new_zeros(len(delta), last - first + 1, windows).index_add_(1, places - first, scores)
        best = gains[:, 0].clone()
        best[:, 1 << min(first, WINDOW) :] = -torch.inf  # the window is filled by what has been sent
        chosen = []
        for place in range(first + 1, last + 1):
            best, oldest = best.reshape(len(delta), 2, windows // 2).max(1)  # over the bit that leaves the window
            best = best.repeat_interleave(2, 1)
            if place > bits:
                best[:, 1::2] = -torch.inf  # the path is over: zeros follow
            best = best + gains[:, place - first]
            chosen.append(oldest)
        window = best.argmax(1)
        path = [window >> age & 1 for age in range(min(bits, WINDOW))]
        for oldest in reversed(chosen):
            bit = oldest.gather(1, (window >> 1)[:, None])[:, 0]
            window = window >> 1 | bit * (windows >> 1)
            path.append(bit)
        newest_first = torch.stack(path, dim=1)  # from `last` down; the ending zeros are left out
        return newest_first[:, last - bits : last].flip(1)


@functools.lru_cache(maxsize=4)
def _book(seed: int) -> Tensor:
    return exact_normal(seed, "codec book", 0, ROWS * CELL).reshape(ROWS, CELL)


def _places(bits: int, cells: int) -> Int[Tensor, " cells"]:
    """How many bits, ending zeros included, have entered the window at each cell."""
    if bits <= WINDOW:
        return torch.full((cells,), bits)
    start = WINDOW // 2
    return start + torch.arange(cells) * (bits + WINDOW - 2 * start) // (cells - 1)
