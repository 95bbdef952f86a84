"""The coded image's first bytes: what it is, which model and which shared randomness it was made with.

    "x0<-"  version  seed  C  H  W  steps  model (8 bytes)  check (2 bytes)

Numbers are base-128 varints. model: the start of the sha256 of everything the predictions depend on. check: the start of
the sha256 of what precedes it. The rest of the file is one range-coded stream, with checks of its own (ddpm_core.codec.codec).
"""

import hashlib
from dataclasses import dataclass

from ddpm_core.errors import InputError

MAGIC = b"x0<-"
VERSION = 1
MODEL_BYTES, CHECK_BYTES = 8, 2
MOST = 1 << 32  # no field is larger


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a receiver must know before the first symbol."""

    shape: tuple[int, int, int]  # C, H, W
    steps: int
    model: bytes
    seed: int

    def pack(self) -> bytes:
        numbers = b"".join(_varint(n) for n in (self.seed, *self.shape, self.steps))
        content = MAGIC + bytes([VERSION]) + numbers + self.model
        return content + _check(content)


def model_digest(*facts: str) -> bytes:
    """The name of a model: everything that its predictions depend on, each as a text."""
    return hashlib.sha256("\0".join(facts).encode()).digest()[:MODEL_BYTES]


def read_header(data: bytes, name: str) -> tuple[Header, int]:
    """(header, its length). Raises InputError if these are not the first bytes of a coded image of this version."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise InputError(f"{name} is not a coded image: give a file that jobs/compress.py encode wrote")
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise InputError(
            f"{name} is of version {data[len(MAGIC)]} of the format, not {VERSION}: decode it with the release that wrote it"
        )
    numbers, place = [], len(MAGIC) + 1
    for _ in range(5):
        number = shift = 0
        while True:
            if place >= len(data):
                raise _cut(data, name)
            byte, place = data[place], place + 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128 or number >= MOST:
                break
        numbers.append(number)
    end = place + MODEL_BYTES + CHECK_BYTES
    if end > len(data):
        raise _cut(data, name)
    seed, *shape, steps = numbers
    if data[end - CHECK_BYTES : end] != _check(data[: end - CHECK_BYTES]) or max(numbers) >= MOST or not all(shape):
        raise InputError(f"{name} is damaged in its header (its check differs): get it again")
    model = data[place : place + MODEL_BYTES]
    return Header(shape=(shape[0], shape[1], shape[2]), steps=steps, model=model, seed=seed), end


def _check(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:CHECK_BYTES]


def _cut(data: bytes, name: str) -> InputError:
    return InputError(f"{name} ends within its header, after {len(data)} bytes: get it again, whole or with more bytes")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
