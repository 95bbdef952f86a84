"""A range coder: symbols in the order they are sent, so that a prefix of the bytes decodes a prefix of the symbols.

The interval (Martin 1979) is 56 bits wide and is kept above 2^48, so that a frequency of 2^-24 loses at most 2^-24 of
itself. What the decoder lacks it reads as zeros; `cut` says whether that may have decided a symbol.
"""

import math

WIDTH = 56
BYTES = WIDTH // 8
LEAST = 1 << (WIDTH - 8)  # the interval is renewed below this
MASK = (1 << WIDTH) - 1


class RangeEncoder:
    """Bytes from symbols."""

    def __init__(self) -> None:
        self._low, self._range, self._out = 0, 1 << WIDTH, bytearray()

    def encode(self, start: int, size: int, bits: int) -> None:
        """A symbol of probability size / 2^bits (bits <= 24), whose part of the interval begins at `start`."""
        unit = self._range >> bits
        self._low += unit * start
        self._range = unit * size
        while self._range < LEAST:
            self._carry()
            self._out.append(self._low >> (WIDTH - 8))
            self._low = (self._low << 8) & MASK
            self._range <<= 8

    def uniform(self, value: int, bits: int) -> None:
        """`bits` bits that are as likely 0 as 1."""
        for shift in range(0, bits, 16):
            width = min(16, bits - shift)
            self.encode((value >> shift) & ((1 << width) - 1), 1, width)

    @property
    def bits(self) -> float:
        """What has been spent so far."""
        return 8 * len(self._out) + WIDTH - math.log2(self._range)

    def finish(self) -> bytes:
        """The fewest bytes within the interval; trailing zeros are left out, for the decoder reads zeros beyond the end."""
        for zeros in reversed(range(BYTES + 1)):
            step = 1 << (8 * zeros)
            value = -(-self._low // step) * step
            if value < self._low + self._range:
                break
        self._low = value
        self._carry()
        return bytes(self._out + self._low.to_bytes(BYTES, "big")).rstrip(b"\0")

    def _carry(self) -> None:
        """Add a bit that has left the interval's start to the bytes before it."""
        if self._low > MASK:
            self._low &= MASK
            place = len(self._out) - 1
            while self._out[place] == 255:
                self._out[place] = 0
                place -= 1
            self._out[place] += 1


class RangeDecoder:
    """Symbols from bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._range, self._read = data, 1 << WIDTH, BYTES
        self._offset = int.from_bytes(data[:BYTES].ljust(BYTES, b"\0"), "big")  # of the code in the interval

    def target(self, bits: int) -> int:
        """Where in 0..2^bits-1 the next symbol's part of the interval lies; `take` must follow."""
        return min(self._offset // (self._range >> bits), (1 << bits) - 1)

    def take(self, start: int, size: int, bits: int) -> None:
        """Go on behind the symbol, as `encode` did."""
        unit = self._range >> bits
        self._offset -= unit * start
        self._range = unit * size
        while self._range < LEAST:
            byte = self._data[self._read] if self._read < len(self._data) else 0
            self._offset = ((self._offset << 8) | byte) & MASK  # beyond the mask only in a damaged stream
            self._range <<= 8
            self._read += 1

    def uniform(self, bits: int) -> int:
        """`bits` bits that were as likely 0 as 1."""
        value = 0
        for shift in range(0, bits, 16):
            width = min(16, bits - shift)
            part = self.target(width)
            self.take(part, 1, width)
            value |= part << shift
        return value

    @property
    def cut(self) -> bool:
        """Whether other bytes behind the end could have meant other symbols."""
        missing = self._read - len(self._data)
        return missing > 0 and self._offset + (1 << (8 * missing)) > self._range

    @property
    def needed(self) -> int:
        """The fewest first bytes from which the same symbols are read, followed by zeros."""
        window = self._data[: self._read].ljust(self._read, b"\0")
        for dropped in reversed(range(BYTES + 1)):
            if self._offset >= int.from_bytes(window[self._read - dropped :], "big"):
                return min(self._read - dropped, len(self._data))
        raise AssertionError("nothing dropped always fits")

    @property
    def left_over(self) -> bool:
        """Whether there are bytes that no symbol needed."""
        return len(self._data) > self._read


def encode_flag(coder: RangeEncoder, flag: bool, chance: int) -> None:
    """A flag that is set with probability chance / 2^16."""
    coder.encode(0 if flag else chance, chance if flag else (1 << 16) - chance, 16)


def decode_flag(coder: RangeDecoder, chance: int) -> bool:
    """What encode_flag() sent."""
    flag = coder.target(16) < chance
    coder.take(0 if flag else chance, chance if flag else (1 << 16) - chance, 16)
    return flag


def encode_count(coder: RangeEncoder, count: int, chance: int) -> None:
    """0, 1, 2, .. by a geometric law: `chance` / 2^16 to stop."""
    for _ in range(count):
        encode_flag(coder, False, chance)
    encode_flag(coder, True, chance)


def decode_count(coder: RangeDecoder, chance: int, limit: int) -> int:
    """What encode_count() sent; at most `limit`, beyond which only a damaged stream goes."""
    count = 0
    while count < limit and not decode_flag(coder, chance):
        count += 1
    return count
