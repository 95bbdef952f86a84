"""Progressive lossy-to-lossless compression: Algorithms 3 and 4 with bytes."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.codec_entropy import (
    RangeDecoder,
    RangeEncoder,
    decode_count,
    decode_flag,
    encode_count,
    encode_flag,
)
from ddpm_core.codec_format import Header, read_header
from ddpm_core.codec_trellis import CELL, MOST_BITS, Trellis, exact_normal
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.errors import InputError
from ddpm_core.gaussian import discretized_gaussian_log_likelihood
from ddpm_core.pixel_range import scaled_values

GRID = 2.0**-4
TOLERANCE = 2.0**-17
TRIES = 256
BLOCK = 4096
RATE = 1.0
SCALES = [2.0 ** (-10 + i / 6) for i in range(64)]
FREQUENCY_BITS = 24
CHECK_BITS, LAST_CHECK_BITS = 16, 32
FIRST_CHECK = 128


@dataclass
class Ledger:
    """What an image's bits were spent on, and what the paper's terms say; [steps - 1] each, from x_T on, in bits."""

    t: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    grid: list[float] = field(default_factory=list)
    check: list[int] = field(default_factory=list)
    header: int = 0
    decoder: float = 0.0
    decoder_spent: float = 0.0


@dataclass(frozen=True)
class Coded:
    data: bytes
    ledger: Ledger


@dataclass(frozen=True)
class Frame:
    nbytes: int
    t: int
    pixels: Tensor


@dataclass(frozen=True)
class Decoded:
    pixels: Tensor
    whole: bool
    frames: list[Frame]


def spread_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    if not 2 <= steps <= diffusion.num_timesteps:
        raise InputError(
            f"steps is {steps}: it must lie in 2..{diffusion.num_timesteps}, the model's number of timesteps"
        )
    if steps == diffusion.num_timesteps:
        return list(range(steps))
    abar = diffusion.alphas_cumprod.cpu()
    capacity = -torch.log1p(-abar)  # log(1 + SNR)
    wanted = torch.linspace(float(capacity[0]), float(capacity[-1]), steps, dtype=torch.float64)
    return sorted({int((capacity - value).abs().argmin()) for value in wanted})


def rate_ladder(most: int) -> list[int]:
    ladder = [0]
    while ladder[-1] < most:
        ladder.append(min(most, max(ladder[-1] + 1, round(1.12 * ladder[-1]))))
    return ladder


class Codec:
    def __init__(
        self,
        diffusion: GaussianDiffusion,
        denoise_fn: DenoiseFn,
        shape: tuple[int, int, int],
        model: bytes,
    ) -> None:
        self.diffusion, self.denoise_fn, self.shape, self.model = diffusion, denoise_fn, shape, model
        self.device = diffusion.betas.device

    def encode(self, pixels: Tensor, *, steps: int = 50, seed: int = 0) -> list[Coded]:
        header = Header(shape=self.shape, steps=steps, model=self.model, seed=seed)
        walk = _Walk(self, header)
        senders = [_Sender(header.pack(), walk) for _ in pixels]
        x0 = images.to_float(pixels).to(self.device, torch.float64).flatten(1)
        x = walk.prior.expand(len(pixels), -1)
        for i in reversed(range(1, walk.steps)):
            predicted = walk.predict(x, i)
            scale, shrink, sigma = walk.coefficients(i)
            shifts = walk.safe_shifts(predicted * scale)
            numbers, mean = walk.rounded(predicted * scale, shifts)
            exact = 0.5 * (scale * (x0 - predicted)).square().sum(1) / math.log(2.0)
            delta = walk.blocks(x0 * scale - mean)
            wanted = RATE * 0.5 * delta.square().sum(1) / math.log(2.0)
            classes = (walk.ladder_tensor[None].sub(wanted[:, None].cpu()).abs()).argmin(1)
            bits = walk.ladder_tensor[classes].long()
            noise = torch.empty_like(delta)
            paths: dict[int, Tensor] = {}
            trellis = walk.trellis(i)
            for length in bits.unique().tolist():
                rows = (bits == length).nonzero()[:, 0].to(self.device)
                path = trellis.search(delta[rows], rows % walk.block_count, length)
                noise[rows] = trellis.noise(path, rows % walk.block_count)
                paths.update(zip(rows.tolist(), path.cpu(), strict=True))
            x = shrink * x + sigma * (mean + walk.unblocks(noise))
            numbers = numbers.cpu().numpy()
            for image, sender in enumerate(senders):
                mine = range(image * walk.block_count, (image + 1) * walk.block_count)
                sender.step(
                    i,
                    [int(shifts[row]) for row in mine],
                    [int(classes[row]) for row in mine],
                    [paths[row].tolist() for row in mine],
                    numbers[image].tobytes(),
                    float(exact[image]),
                )
        predicted = walk.predict(x, 0)
        own_scale = (
            float(self.diffusion.posterior_log_variance_clipped[0]) / 2 if self.diffusion.num_timesteps > 1 else 0.0
        )
        for image, sender in enumerate(senders):
            mean = predicted[image][None]
            levels = x0[image][None]
            like = lambda log_scale: (
                -float(  # noqa: E731
                    discretized_gaussian_log_likelihood(
                        levels[..., None, None],
                        mean[..., None, None],
                        torch.full_like(levels, log_scale)[..., None, None],
                    ).sum()
                )
                / math.log(2.0)
            )
            cost = [like(math.log(s)) for s in SCALES]
            which = min(range(len(SCALES)), key=cost.__getitem__)
            shifts = walk.safe_shifts(mean / SCALES[which])
            numbers, rounded = walk.rounded(mean / SCALES[which], shifts)
            flat = pixels[image].permute(2, 0, 1).flatten()
            sender.finish(
                which,
                shifts.tolist(),
                rounded[0] * SCALES[which],
                flat,
                numbers.cpu().numpy().tobytes(),
                like(own_scale),
            )
        return [Coded(sender.data, sender.ledger) for sender in senders]

    def decode(
        self, files: Sequence[bytes], names: Sequence[str] | None = None, *, whole: bool = True
    ) -> list[Decoded]:
        names = names or [f"coded image {i}" for i in range(len(files))]
        headers = [read_header(data, name) for data, name in zip(files, names, strict=True)]
        for (header, _), name in zip(headers, names, strict=True):
            if header.model != self.model or header.shape != self.shape:
                raise InputError(f"{name} was coded with another model: give the one it was made with")
        results: dict[int, Decoded] = {}
        for header in {header for header, _ in headers}:
            chosen = [i for i, (its, _) in enumerate(headers) if its == header]
            found = self._decode(header, [(files[i], headers[i][1], names[i]) for i in chosen], whole)
            results.update(zip(chosen, found, strict=True))
        return [results[i] for i in range(len(files))]

    def _decode(self, header: Header, files: list[tuple[bytes, int, str]], whole: bool) -> list[Decoded]:
        walk = _Walk(self, header)
        receivers = [_Receiver(data, start, name, walk) for data, start, name in files]
        x = walk.prior.expand(len(files), -1).clone()
        for i in reversed(range(1, walk.steps)):
            live = [r for r in receivers if r.live]
            rows = torch.tensor([j for j, r in enumerate(receivers) if r.live], device=self.device)
            if not live:
                break
            predicted = walk.predict(x[rows], i)
            scale, shrink, sigma = walk.coefficients(i)
            for receiver, each in zip(live, predicted, strict=True):
                receiver.frame(walk.chain.timesteps[i], each)
            parsed = [receiver.step(i) for receiver in live]
            shifts = torch.tensor([s for each in parsed for s in each[0]], device=self.device)
            paths = [p for each in parsed for p in each[1]]
            numbers, mean = walk.rounded(predicted * scale, shifts)
            noise = torch.empty_like(walk.blocks(mean))
            trellis = walk.trellis(i)
            lengths = torch.tensor([len(p) for p in paths])
            for length in lengths.unique().tolist():
                chosen = (lengths == length).nonzero()[:, 0]
                path = torch.tensor([paths[j] for j in chosen], dtype=torch.int64, device=self.device).reshape(
                    -1, length
                )
                chosen = chosen.to(self.device)
                noise[chosen] = trellis.noise(path, chosen % walk.block_count)
            x[rows] = shrink * x[rows] + sigma * (mean + walk.unblocks(noise))
            array = numbers.cpu().numpy()
            for receiver, its in zip(live, array, strict=True):
                receiver.verify(i, its.tobytes())
        live_rows = [j for j, r in enumerate(receivers) if r.live]
        if live_rows:
            predicted = walk.predict(x[torch.tensor(live_rows, device=self.device)], 0)
            for row, each in zip(live_rows, predicted, strict=True):
                receivers[row].frame(walk.chain.timesteps[0], each)
                receivers[row].finish(each)
        out = []
        for receiver in receivers:
            if receiver.pixels is None and whole:
                raise InputError(
                    f"{receiver.name} ends after {len(receiver.data)} bytes, before the image is whole: get the rest, or ask for what is there"
                )
            pixels = receiver.frames[-1].pixels if receiver.pixels is None else receiver.pixels
            out.append(Decoded(pixels, receiver.pixels is not None, receiver.frames))
        return out


class _Walk:
    """What both ends compute alike."""

    def __init__(self, codec: Codec, header: Header) -> None:
        self.codec, self.header = codec, header
        self.device = codec.device
        try:
            self.chain = codec.diffusion.strided(spread_timesteps(codec.diffusion, header.steps))
        except ValueError as error:
            raise InputError(str(error)) from error
        self.steps = self.chain.num_timesteps
        self.size = math.prod(codec.shape)
        self.block_count = -(-self.size // BLOCK)
        self.cells = -(-self.size // (self.block_count * CELL))
        self.order = rng.permutation(header.seed, "codec order", 0, self.size).to(self.device)
        self.inverse = torch.argsort(self.order)
        self.prior = exact_normal(header.seed, "codec prior", 0, self.size).to(self.device)[None]
        self.ladder = rate_ladder(self.cells * MOST_BITS)
        self.ladder_tensor = torch.tensor(self.ladder, dtype=torch.float64)
        abar = self.chain.alphas_cumprod.cpu()
        self.capacity = (-torch.log1p(-abar)).tolist()
        # the chance that no value of a block lies within the tolerance of an edge
        near = 2.0 * TOLERANCE / GRID * self.cells * CELL
        self.accept = max(1, round(math.exp(-near) * 65536 * 0.9999))

    def trellis(self, i: int) -> Trellis:
        return Trellis(self.header.seed, i, self.block_count, self.cells, self.device)

    def coefficients(self, i: int) -> tuple[float, float, float]:
        sigma = math.sqrt(float(self.chain.posterior_variance[i]))
        return float(self.chain.posterior_mean_coef1[i]) / sigma, float(self.chain.posterior_mean_coef2[i]), sigma

    @torch.no_grad()
    def predict(self, x: Tensor, i: int) -> Tensor:
        t = torch.full((len(x),), i, device=self.device)
        shaped = x.reshape(-1, *self.codec.shape)
        return self.chain.p_mean_variance(self.codec.denoise_fn, shaped, t).pred_xstart.flatten(1)

    def blocks(self, values: Tensor) -> Tensor:
        """[B, D] -> [B * blocks, n], in the shared order, zeros at the end."""
        n = self.cells * CELL * self.block_count
        return torch.nn.functional.pad(values[:, self.order], (0, n - self.size)).reshape(-1, self.cells * CELL)

    def unblocks(self, blocks: Tensor) -> Tensor:
        return blocks.reshape(-1, self.block_count * self.cells * CELL)[:, : self.size][:, self.inverse]

    def rounded(self, values: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        offset = _offset(shifts)[:, None]
        numbers = torch.floor(self.blocks(values) / GRID + offset + 0.5)
        back = (numbers - offset) * GRID
        return self.unblocks(numbers).long(), self.unblocks(back)

    def safe_shifts(self, values: Tensor) -> Tensor:
        cells = self.blocks(values) / GRID
        shifts = torch.zeros(len(cells), dtype=torch.int64, device=self.device)
        margin = TOLERANCE / GRID
        for _ in range(TRIES - 1):
            fraction = torch.remainder(cells + _offset(shifts)[:, None] + 0.5, 1.0)
            near = torch.minimum(fraction, 1.0 - fraction).amin(1) < margin
            if not bool(near.any()):
                break
            shifts += near
        return shifts


def _offset(shifts: Tensor) -> Tensor:
    return torch.remainder(shifts * 0.6180339887498949, 1.0)


class _Sender:
    def __init__(self, header: bytes, walk: _Walk) -> None:
        self.header, self.walk = header, walk
        self.coder = RangeEncoder()
        self.hash = hashlib.sha256(header)
        self.pace = _Pace(walk)
        self.ledger = Ledger(header=8 * len(header))
        self.data = b""

    def step(
        self, i: int, shifts: list[int], classes: list[int], paths: list[list[int]], numbers: bytes, kl: float
    ) -> None:
        ledger, coder = self.ledger, self.coder
        ledger.t.append(int(self.walk.chain.timesteps[i]))
        ledger.kl.append(kl)
        start = coder.bits
        for shift in shifts:
            encode_count(coder, shift, self.walk.accept)
        middle = coder.bits
        ledger.grid.append(middle - start)
        for block, which in enumerate(classes):
            difference = which - self.pace.expected(i, block)
            encode_flag(coder, difference == 0, ZERO)
            if difference:
                encode_flag(coder, difference > 0, 32768)
                encode_count(coder, abs(difference) - 1, MORE)
        ledger.rate.append(coder.bits - middle)
        for path in paths:
            coder.uniform(_number(path), len(path))
        ledger.path.append(sum(map(len, paths)))
        self.hash.update(bytes(bit for path in paths for bit in path) + numbers)
        ledger.check.append(0)
        if self.pace.step(i, classes):
            coder.uniform(_check(self.hash, CHECK_BITS), CHECK_BITS)
            ledger.check[-1] = CHECK_BITS

    def finish(
        self, which: int, shifts: list[int], mean: Tensor, levels: Tensor, numbers: bytes, theory: float
    ) -> None:
        start = self.coder.bits
        self.coder.uniform(which, 6)
        for shift in shifts:
            encode_count(self.coder, shift, self.walk.accept)
        for part, symbols in zip(mean.split(BLOCK), levels.split(BLOCK), strict=True):
            for table, symbol in zip(_tables(part, SCALES[which]).tolist(), symbols.tolist(), strict=True):
                self.coder.encode(table[symbol], table[symbol + 1] - table[symbol], FREQUENCY_BITS)
        self.hash.update(numbers + levels.numpy().tobytes())
        self.coder.uniform(_check(self.hash, LAST_CHECK_BITS), LAST_CHECK_BITS)
        stream = self.coder.finish()
        self.ledger.decoder, self.ledger.decoder_spent = theory, 8 * len(stream) - start
        self.data = self.header + stream


class _Receiver:
    def __init__(self, data: bytes, start: int, name: str, walk: _Walk) -> None:
        self.data, self.start, self.name, self.walk = data, start, name, walk
        self.coder = RangeDecoder(data[start:])
        self.hash = hashlib.sha256(data[:start])
        self.pace = _Pace(walk)
        self.live, self.verified, self.needed = True, True, start
        self.frames: list[Frame] = []
        self.pixels: Tensor | None = None

    def frame(self, t: Tensor, predicted: Tensor) -> None:
        if self.verified:
            pixels = images.to_uint8(predicted.reshape(1, *self.walk.codec.shape))[0].cpu()
            self.frames.append(Frame(self.needed, int(t), pixels))
            self.verified = False

    def step(self, i: int) -> tuple[list[int], list[list[int]]]:
        coder, walk = self.coder, self.walk
        shifts = [decode_count(coder, walk.accept, TRIES) for _ in range(walk.block_count)]
        self.classes = []
        for block in range(walk.block_count):
            which = self.pace.expected(i, block)
            if not decode_flag(coder, ZERO):
                sign = 1 if decode_flag(coder, 32768) else -1
                which += sign * (1 + decode_count(coder, MORE, len(walk.ladder)))
            self.classes.append(min(max(which, 0), len(walk.ladder) - 1))
        paths = []
        for which in self.classes:
            length = walk.ladder[which]
            paths.append(_bits(coder.uniform(length), length))
        self.hash.update(bytes(bit for path in paths for bit in path))
        return shifts, paths

    def verify(self, i: int, numbers: bytes) -> None:
        self.hash.update(numbers)
        if self.pace.step(i, self.classes):
            self.compare(CHECK_BITS)

    def compare(self, bits: int) -> None:
        if self.coder.uniform(bits) == _check(self.hash, bits):
            self.verified, self.needed = True, self.start + self.coder.needed
        elif self.coder.cut:
            self.live = False
        else:
            raise InputError(
                f"{self.name} is damaged, or was coded by other arithmetic, somewhere after byte {self.needed}: get it again"
            )

    def finish(self, predicted: Tensor) -> None:
        coder, walk = self.coder, self.walk
        which = coder.uniform(6)
        shifts = torch.tensor(
            [decode_count(coder, walk.accept, TRIES) for _ in range(walk.block_count)], device=walk.device
        )
        numbers, rounded = walk.rounded(predicted[None] / SCALES[which], shifts)
        symbols: list[int] = []
        for part in (rounded[0] * SCALES[which]).split(BLOCK):
            tables = _tables(part, SCALES[which])
            for table in tables.numpy():
                target = coder.target(FREQUENCY_BITS)
                symbol = int(table.searchsorted(target, side="right")) - 1
                coder.take(int(table[symbol]), int(table[symbol + 1] - table[symbol]), FREQUENCY_BITS)
                symbols.append(symbol)
        levels = torch.tensor(symbols, dtype=torch.uint8)
        self.hash.update(numbers.cpu().numpy().tobytes() + levels.numpy().tobytes())
        self.compare(LAST_CHECK_BITS)
        if self.live:
            if coder.left_over:
                raise InputError(f"{self.name} goes on behind the image's end: get it again")
            c, h, w = walk.codec.shape
            self.pixels = levels.reshape(c, h, w).permute(1, 2, 0).contiguous()


ZERO, MORE = 26000, 36000


class _Pace:
    """What both ends expect of the next rate, and when a check is due."""

    def __init__(self, walk: _Walk) -> None:
        self.walk = walk
        self.last = [walk.cells * CELL / 128.0] * walk.block_count
        self.first = True
        self.paid = self.checked = 0

    def expected(self, i: int, block: int) -> int:
        capacity, ladder = self.walk.capacity, self.walk.ladder
        ratio = 1.0
        if i + 1 < self.walk.steps:
            ratio = (capacity[i - 1] - capacity[i]) / (capacity[i] - capacity[i + 1])
        wanted = self.last[block] * ratio
        return min(range(len(ladder)), key=lambda j: abs(ladder[j] - wanted))

    def step(self, i: int, classes: list[int]) -> bool:
        self.last = [max(1, self.walk.ladder[which]) for which in classes]
        self.paid += sum(self.walk.ladder[which] + 4 for which in classes)
        due = i == 1 or self.paid - self.checked >= max(FIRST_CHECK, self.paid // 3)
        if due:
            self.checked = self.paid
        return due


def _check(digest: "hashlib._Hash", bits: int) -> int:
    return int.from_bytes(digest.digest()[: bits // 8], "little")


def _number(path: list[int]) -> int:
    return sum(bit << place for place, bit in enumerate(path))


def _bits(number: int, length: int) -> list[int]:
    return [number >> place & 1 for place in range(length)]


EDGES = torch.from_numpy(scaled_values()[1:]).to(torch.float64) - 1.0 / 255.0


def _tables(mean: Float64[Tensor, " n"], scale: float) -> Tensor:
    """Cumulative frequencies [n, 257] of the 256 levels under the discretised decoder (Eq. 13)."""
    z = (EDGES - mean.cpu()[:, None]) / scale
    cdf = 0.5 * torch.erfc(-math.sqrt(0.5) * z)
    total = (1 << FREQUENCY_BITS) - 256
    inner = (cdf * total).round().long() + torch.arange(1, 256)
    return torch.cat([inner.new_zeros(len(mean), 1), inner, inner.new_full((len(mean), 1), 1 << FREQUENCY_BITS)], 1)
