"""One image's stream of symbols, as it is sent and as it is received.

    for each step:  each block's shift of the grid, each block's rate, each block's path, and a check if one is due
    at the end:     the decoder's scale, its shifts, the levels, a check of 32 bits

A rate is a number of bits, from a ladder whose rungs are 12 % apart, and is sent as the distance from what the step before
lets expect. A check is 16 bits of the sha256 of the header, of all paths and of all rounded predictions so far: it fails
for damaged bytes as for predictions that were rounded otherwise. Checks come after 16 bytes at first, then whenever the
bytes have grown by half, and after the last step.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ddpm_core.codec.chain import BLOCK, FREQUENCY_BITS, MOST_SHIFTS, Chain
from ddpm_core.codec.entropy import RangeDecoder, RangeEncoder, decode_count, decode_flag, encode_count, encode_flag
from ddpm_core.errors import InputError

SCALES = [2.0 ** (i / 6 - 10) for i in range(64)]  # of the decoder, in [-1, 1] units: 1/8 of a level to 1.4
SCALE_BITS = 6
CHECK_BITS, LAST_CHECK_BITS = 16, 32
FIRST_CHECK = 128  # bits
AS_EXPECTED, NO_FURTHER, EITHER = 26000, 30000, 32768  # chances in 2^16


@dataclass
class BitCounts:
    """What an image's bits were spent on and what they are worth, in bits; lists have an entry a step, from x_T on."""

    header: int = 0
    t: list[int] = field(default_factory=list)  # the timestep that is left
    paper_kl: list[float] = field(default_factory=list)  # KL(q || p) with the variance beta-tilde, of the coded x_t
    kl: list[float] = field(default_factory=list)  # KL(q || p) with the variance that the rate implies
    shifts: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    paths: list[float] = field(default_factory=list)
    checks: list[float] = field(default_factory=list)
    paper_decoder: float = 0.0  # -log2 p(x_0|x_1) with the variance beta-tilde_2 of the whole chain
    decoder: float = 0.0  # what x_0 took, the last check included

    @property
    def lossy(self) -> float:
        """All that was spent on the steps, the header left out."""
        return sum(map(sum, (self.shifts, self.rates, self.paths, self.checks)))


class _Pace:
    """What both ends know of the rates to come, and when a check is due."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.ladder = [0]
        while self.ladder[-1] < 2 * chain.width:
            self.ladder.append(max(self.ladder[-1] + 1, round(1.12 * self.ladder[-1])))
        self.start_bits = (len(self.ladder) - 1).bit_length()  # of the first rung, of which nothing is known
        self._last: list[float] = []
        self._sent = self._checked = 0

    def rung(self, bits: float) -> int:
        """The nearest rung of the ladder."""
        above = min(bisect.bisect(self.ladder, bits), len(self.ladder) - 1)
        return above - (bits - self.ladder[above - 1] < self.ladder[above] - bits)

    def expected(self, i: int, block: int) -> int | None:
        """A block's rung if it grows as the capacity does from the step before; None at the first step."""
        return self.rung(self._last[block] * self._chain.growth[i]) if self._last else None

    def check_is_due(self, i: int, rungs: Sequence[int]) -> bool:
        """Take step i's rungs as sent; whether a check follows."""
        bits = [self.ladder[rung] for rung in rungs]
        self._last = [max(1.0, each) for each in bits]
        self._sent += sum(bits) + 4 * len(bits)
        due = i == 1 or self._sent - self._checked >= max(FIRST_CHECK, self._sent // 3)
        if due:
            self._checked = self._sent
        return due


class Sender:
    """Writes an image's stream."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self._coder, self._header = chain, RangeEncoder(), chain.header.pack()
        self._hash = hashlib.sha256(self._header)
        self.pace = _Pace(chain)
        self.ledger = BitCounts(header=8 * len(self._header))

    def step(
        self, i: int, shifts: Sequence[int], rungs: Sequence[int], paths: Sequence[Sequence[int]], numbers: Tensor
    ) -> None:
        """Write step i: each block's shift, rung and path, and what the check covers, the rounded predictions `numbers`."""
        coder, ledger, spent = self._coder, self.ledger, [self._coder.bits]
        for shift in shifts:
            encode_count(coder, shift, self._chain.shift_chance)
        spent.append(coder.bits)
        for block, rung in enumerate(rungs):
            self._send_rung(rung, self.pace.expected(i, block))
        spent.append(coder.bits)
        for path in paths:
            coder.uniform(sum(bit << place for place, bit in enumerate(path)), len(path))
        spent.append(coder.bits)
        self._hash.update(_content(paths, numbers))
        if self.pace.check_is_due(i, rungs):
            coder.uniform(_check(self._hash, CHECK_BITS), CHECK_BITS)
        spent.append(coder.bits)
        for entries, start, end in zip(
            (ledger.shifts, ledger.rates, ledger.paths, ledger.checks), spent, spent[1:], strict=False
        ):
            entries.append(end - start)

    def _send_rung(self, rung: int, expected: int | None) -> None:
        if expected is None:
            self._coder.uniform(rung, self.pace.start_bits)
            return
        encode_flag(self._coder, rung == expected, AS_EXPECTED)
        if rung != expected:
            encode_flag(self._coder, rung > expected, EITHER)
            encode_count(self._coder, abs(rung - expected) - 1, NO_FURTHER)

    def finish(self, scale: int, shifts: Sequence[int], mean: Tensor, levels: Tensor, numbers: Tensor) -> bytes:
        """The file. mean: of the decoder, [D]. levels: the pixels, uint8 [D] in the order of x."""
        coder, bits_before = self._coder, self._coder.bits
        coder.uniform(scale, SCALE_BITS)
        for shift in shifts:
            encode_count(coder, shift, self._chain.shift_chance)
        for part, symbols in zip(mean.split(BLOCK), levels.split(BLOCK), strict=True):
            tables = self._chain.level_frequencies(part, SCALES[scale])
            level = symbols.long()[:, None]
            low, high = tables.gather(1, level)[:, 0], tables.gather(1, level + 1)[:, 0]
            for below, up_to in zip(low.tolist(), high.tolist(), strict=True):
                coder.encode(below, up_to - below, FREQUENCY_BITS)
        self._hash.update(_content([levels.tolist()], numbers))
        coder.uniform(_check(self._hash, LAST_CHECK_BITS), LAST_CHECK_BITS)
        stream = coder.finish()
        self.ledger.decoder = 8 * len(stream) - bits_before
        return self._header + stream


class Receiver:
    """Reads an image's stream. `live` until its bytes are found to have been cut."""

    def __init__(self, chain: Chain, data: bytes, start: int, name: str) -> None:
        self._chain, self._coder, self._start, self.name = chain, RangeDecoder(data[start:]), start, name
        self._hash = hashlib.sha256(data[:start])
        self._pace = _Pace(chain)
        self.live, self.checked, self.nbytes = True, True, start

    def step(self, i: int) -> tuple[list[int], list[list[int]]]:
        """Each block's (shift, path)."""
        coder, ladder = self._coder, self._pace.ladder
        shifts = [decode_count(coder, self._chain.shift_chance, MOST_SHIFTS) for _ in range(self._chain.blocks)]
        rungs = [self._rung(self._pace.expected(i, block)) for block in range(self._chain.blocks)]
        paths = []
        for rung in rungs:
            number = coder.uniform(ladder[rung])
            paths.append([number >> place & 1 for place in range(ladder[rung])])
        self._rungs, self._paths = rungs, paths
        return shifts, paths

    def _rung(self, expected: int | None) -> int:
        if expected is None:
            rung = self._coder.uniform(self._pace.start_bits)
        elif decode_flag(self._coder, AS_EXPECTED):
            rung = expected
        else:
            sign = 1 if decode_flag(self._coder, EITHER) else -1
            rung = expected + sign * (1 + decode_count(self._coder, NO_FURTHER, len(self._pace.ladder)))
        return min(max(rung, 0), len(self._pace.ladder) - 1)  # beyond the ladder only in a damaged stream

    def verify(self, i: int, numbers: Tensor) -> None:
        """Compare the check that is due after step i, if one is. Raises InputError if it differs."""
        self._hash.update(_content(self._paths, numbers))
        self.checked = False
        if self._pace.check_is_due(i, self._rungs):
            self._compare(CHECK_BITS)

    def scale(self) -> tuple[float, list[int]]:
        """(the decoder's scale, each block's shift)."""
        scale = SCALES[self._coder.uniform(SCALE_BITS)]
        chance = self._chain.shift_chance
        return scale, [decode_count(self._coder, chance, MOST_SHIFTS) for _ in range(self._chain.blocks)]

    def finish(self, scale: float, mean: Tensor, numbers: Tensor) -> list[int]:
        """The levels. Raises InputError if the check differs or bytes are left over."""
        coder, levels = self._coder, []
        for part in mean.split(BLOCK):
            for table in self._chain.level_frequencies(part, scale).numpy():
                level = int(table.searchsorted(coder.target(FREQUENCY_BITS), side="right")) - 1
                coder.take(int(table[level]), int(table[level + 1] - table[level]), FREQUENCY_BITS)
                levels.append(level)
        self._hash.update(_content([levels], numbers))
        self._compare(LAST_CHECK_BITS)
        if self.live and coder.left_over:
            raise InputError(f"{self.name} goes on after the image's end: get it again")
        return levels

    def _compare(self, bits: int) -> None:
        if self._coder.uniform(bits) == _check(self._hash, bits):
            self.checked, self.nbytes = True, self._start + self._coder.needed
        elif self._coder.cut:
            self.live = False
        else:
            raise InputError(
                f"{self.name} is damaged somewhere after byte {self.nbytes} (its check differs), or this machine's "
                "arithmetic differs by more than the format allows: get it again, or decode it elsewhere"
            )


def _content(symbols: Sequence[Sequence[int]], numbers: Tensor) -> bytes:
    """What a check covers, as bytes."""
    return b"".join(bytes(each) for each in symbols) + numbers.cpu().numpy().astype("<i4").tobytes()


def _check(digest: "hashlib._Hash", bits: int) -> int:
    return int.from_bytes(digest.digest()[: bits // 8], "little")
