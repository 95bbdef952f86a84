"""Progressive compression down to the last bit: the paper's Algorithm 3 (sending x_0) and Algorithm 4 (receiving) as bytes.

    codec.encode(pixels)      uint8 images -> one file's bytes each
    codec.decode(files)       the images, bit for bit; of a file that was cut, the x_0 predicted (Eq. 15) at its end

At each step of a strided chain both ends predict x_0 from x_t. In units of the step's noise, q(x_{t-1}|x_t,x_0) is then
N(delta, I) around the predicted mean, with a delta that the sender alone knows. The sender states a rate of B bits, and
with it how wide p is: N(0, (1 + r) I) with n/2 log2(1 + r) = B, and r near |delta|^2/n. Then it names, in B bits, the one
of 2^B shared candidates from p that q makes likeliest (ddpm_core.codec.trellis), and that is x_{t-1}. x_0 follows
losslessly under the discretised decoder (Eq. 13), whose scale the sender chooses. What a step leaves unsaid stays in x_0
minus the next prediction and is sent later: no error adds up.

Why so. Against p with q's own variance, as in Eq. 5, a step costs n r/2 nats; against p above, n/2 ln(1 + r): the rate,
which must be sent anyhow, pays for strides ten to a hundred times as long. What a sample of q then costs, over the KL, in
tests/benchmarks/test_codec_alternatives.py: 1.4 times it by the Poisson functional representation in blocks of 8 bits,
which can just be searched; 12, 6 and 4 times by dithered quantisation of 0.01, 0.05 and 0.1 bits a dimension, because a
uniform and a normal differ in every dimension; 1.2 times by a trellis at 20 bits and 1.08 at 400.

The price is a bias: the candidate is the likeliest, not a draw. x_{t-1} has q's variance across delta, but along that one
direction it does not vary, and falls short of delta by some hundredths. Tests measure both.

denoise_fn works in float64 (`network.double()`), so that batch sizes, threads and machines differ by about 1e-13; what
they may differ by is said in ddpm_core.codec.chain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from ddpm_core import images
from ddpm_core.codec.chain import Chain
from ddpm_core.codec.format import Header, read_header
from ddpm_core.codec.stream import SCALES, BitCounts, Receiver, Sender
from ddpm_core.configs import CODEC_STEPS
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.errors import InputError
from ddpm_core.gaussian import discretized_gaussian_log_likelihood

LOG2 = math.log(2.0)


@dataclass(frozen=True)
class Coded:
    """A file's bytes and their account."""

    data: bytes
    ledger: BitCounts


@dataclass(frozen=True)
class Frame:
    """What the first `nbytes` bytes of a file are worth: the x_0 predicted at timestep t, uint8 [H,W,C]."""

    nbytes: int
    t: int
    pixels: Tensor


@dataclass(frozen=True)
class Decoded:
    """An image: uint8 [H,W,C], and whether it is the very one that was coded. frames: how it sharpened, check by check."""

    pixels: Tensor
    whole: bool
    frames: tuple[Frame, ...]


class Codec:
    """One model's images as bytes.

    denoise_fn: float64 in and out, on the diffusion's device. shape: (C, H, W) of its images. model: 8 bytes that name
    everything the predictions depend on (ddpm_core.codec.format.model_digest).
    """

    def __init__(
        self, diffusion: GaussianDiffusion, denoise_fn: DenoiseFn, shape: tuple[int, int, int], model: bytes
    ) -> None:
        self._diffusion, self._denoise_fn, self._shape, self._model = diffusion, denoise_fn, shape, model
        self.device = diffusion.betas.device

    def encode(self, pixels: UInt8[Tensor, "b h w c"], *, steps: int = CODEC_STEPS, seed: int = 0) -> list[Coded]:
        """A file for each image. The bytes do not depend on which images share the batch. steps: network passes, one more
        with each file. Raises InputError if the model has fewer timesteps or images of another shape."""
        height, width, channels = pixels.shape[1:]
        if (channels, height, width) != self._shape:
            raise InputError(
                f"images are {width}x{height} with {channels} channels, but this model codes {self._shape[2]}x{self._shape[1]} "
                f"with {self._shape[0]}: give images of that size"
            )
        chain = Chain(self._diffusion, self._denoise_fn, self._header(steps, seed))
        senders = [Sender(chain) for _ in pixels]
        x_start = images.to_float(pixels.to(self.device)).to(torch.float64).flatten(1)
        x = chain.x_T.expand(len(pixels), -1)
        for i in range(chain.steps - 1, 0, -1):
            x = self._send_step(chain, i, x_start, x, senders)
        predicted = chain.predict(x, 0)
        levels = pixels.permute(0, 3, 1, 2).flatten(1).cpu()
        return [self._send_levels(chain, *image) for image in zip(x_start, predicted, levels, senders, strict=True)]

    def _header(self, steps: int, seed: int) -> Header:
        return Header(shape=self._shape, steps=steps, model=self._model, seed=seed)

    def _send_step(self, chain: Chain, i: int, x_start: Tensor, x: Tensor, senders: Sequence[Sender]) -> Tensor:
        """x at the timestep before step i's, as the receiver will have it."""
        weight, shrink, sigma = chain.posterior(i)
        predicted = weight * chain.predict(x, i)
        shifts = chain.safe_shifts(predicted)
        numbers, mean = chain.rounded(predicted, shifts)
        # q(x_{t-1}|x_t,x_0) is N(delta, I) around the rounded mean, in units of sigma.
        delta = chain.to_blocks(weight * x_start - mean)
        pace = senders[0].pace
        rungs = [pace.rung(bits) for bits in _rate(delta.square().mean(1), chain.width).tolist()]
        paths, noise = _search(chain, i, delta, torch.tensor([pace.ladder[rung] for rung in rungs], device=x.device))
        error = chain.to_blocks(weight * x_start - predicted).square()
        rates = _rate(error.mean(1), chain.width)
        for sender, rows in zip(senders, torch.arange(len(delta)).split(chain.blocks), strict=True):
            first, end = int(rows[0]), int(rows[-1]) + 1
            sender.step(i, shifts[rows].tolist(), rungs[first:end], paths[first:end], numbers[rows])
            sender.ledger.t.append(int(chain.diffusion.timesteps[i]))
            sender.ledger.kl.append(float(rates[rows].sum()))
            sender.ledger.paper_kl.append(float(error[rows].sum()) / (2.0 * LOG2))
        return shrink * x + sigma * (mean + chain.from_blocks(noise))

    def _send_levels(self, chain: Chain, x_start: Tensor, predicted: Tensor, levels: Tensor, sender: Sender) -> Coded:
        """The whole file: x_0 under the decoder, of the scale that makes it shortest."""
        costs = [_decoder_bits(x_start, predicted, math.log(scale)) for scale in SCALES]
        scale = min(range(len(SCALES)), key=costs.__getitem__)
        shifts = chain.safe_shifts(predicted[None] / SCALES[scale])
        numbers, mean = chain.rounded(predicted[None] / SCALES[scale], shifts)
        data = sender.finish(scale, shifts.tolist(), SCALES[scale] * mean[0], levels, numbers)
        log_variance = float(self._diffusion.posterior_log_variance_clipped[0])
        sender.ledger.paper_decoder = _decoder_bits(x_start, predicted, 0.5 * log_variance)
        return Coded(data, sender.ledger)

    def decode(
        self, files: Sequence[bytes], names: Sequence[str] | None = None, *, whole: bool = True
    ) -> list[Decoded]:
        """The images of files, batched over those with equal headers. names: for what is said of them. whole: refuse a file
        that was cut; otherwise it gives the image predicted at its last check. InputError for a file of another model,
        version or format, and for one that is damaged."""
        names = names or [f"coded image {number}" for number in range(len(files))]
        headers = [read_header(data, name) for data, name in zip(files, names, strict=True)]
        for (header, _), name in zip(headers, names, strict=True):
            if header.model != self._model or header.shape != self._shape:
                raise InputError(
                    f"{name} was coded by another model, of digest {header.model.hex()}, not {self._model.hex()}: decode it with "
                    "the checkpoint that coded it"
                )
        decoded: dict[int, Decoded] = {}
        for shared in dict.fromkeys(header for header, _ in headers):
            chain = Chain(self._diffusion, self._denoise_fn, shared)
            members = [number for number, (header, _) in enumerate(headers) if header == shared]
            receivers = [Receiver(chain, files[number], headers[number][1], names[number]) for number in members]
            decoded.update(zip(members, self._receive(chain, receivers), strict=True))
        for number, image in sorted(decoded.items()):
            if whole and not image.whole:
                raise InputError(
                    f"{names[number]} is cut after {len(files[number])} bytes, before the image's end: get the rest, or ask for "
                    "the prediction that is there"
                )
        return [decoded[number] for number in range(len(files))]

    def _receive(self, chain: Chain, receivers: Sequence[Receiver]) -> list[Decoded]:
        """The images of files with one header, all of them a step at a time."""
        frames: list[list[Frame]] = [[] for _ in receivers]
        exact: dict[int, Tensor] = {}
        x = chain.x_T.repeat(len(receivers), 1)
        for i in range(chain.steps - 1, -1, -1):
            live = [number for number, receiver in enumerate(receivers) if receiver.live]
            if not live:
                break
            predicted = chain.predict(x[live], i)
            shown = self._pixels(images.to_uint8(predicted.reshape(-1, *self._shape)))
            for number, pixels in zip(live, shown, strict=True):
                if receivers[number].checked:
                    frames[number].append(Frame(receivers[number].nbytes, int(chain.diffusion.timesteps[i]), pixels))
            if i > 0:
                x[live] = self._receive_step(chain, i, predicted, x[live], [receivers[number] for number in live])
            else:
                for number, x_0 in zip(live, predicted, strict=True):
                    levels = self._receive_levels(chain, x_0, receivers[number])
                    if receivers[number].live:
                        exact[number] = levels
        return [
            Decoded(exact.get(number, seen[-1].pixels), number in exact, tuple(seen))
            for number, seen in enumerate(frames)
        ]

    def _receive_step(
        self, chain: Chain, i: int, predicted: Tensor, x: Tensor, receivers: Sequence[Receiver]
    ) -> Tensor:
        """x at the timestep before step i's, of images whose x_0 was predicted at step i."""
        weight, shrink, sigma = chain.posterior(i)
        shifts_and_paths = [receiver.step(i) for receiver in receivers]
        shifts = torch.tensor([shift for shifts, _ in shifts_and_paths for shift in shifts], device=x.device)
        numbers, mean = chain.rounded(weight * predicted, shifts)
        paths = [path for _, paths in shifts_and_paths for path in paths]
        lengths = torch.tensor([len(path) for path in paths])
        trellis, noise, block = chain.trellis(i), chain.to_blocks(mean), chain.block_of_rows(len(paths))
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            path = torch.tensor([paths[row] for row in rows], dtype=torch.int64).reshape(len(rows), length)
            noise[rows.to(x.device)] = trellis.noise(path.to(x.device), block[rows.to(x.device)])
        for receiver, own_numbers in zip(receivers, numbers.split(chain.blocks), strict=True):
            receiver.verify(i, own_numbers)
        return shrink * x + sigma * (mean + chain.from_blocks(noise))

    def _receive_levels(self, chain: Chain, predicted: Tensor, receiver: Receiver) -> Tensor:
        scale, shifts = receiver.scale()
        numbers, mean = chain.rounded(predicted[None] / scale, torch.tensor(shifts, device=predicted.device))
        levels = torch.tensor(receiver.finish(scale, scale * mean[0], numbers), dtype=torch.uint8)
        return self._pixels(levels.reshape(1, *self._shape).permute(0, 2, 3, 1))[0]

    @staticmethod
    def _pixels(pixels: Tensor) -> UInt8[Tensor, "b h w c"]:
        return pixels.contiguous().cpu()


def _search(chain: Chain, i: int, delta: Tensor, bits: Tensor) -> tuple[list[list[int]], Tensor]:
    """(path, noise that it names) of each row of `delta`: the likeliest of step i's candidates, `bits` [rows] long."""
    trellis, noise, block = chain.trellis(i), torch.empty_like(delta), chain.block_of_rows(len(delta))
    paths: list[list[int]] = [[]] * len(delta)
    for length in bits.unique().tolist():
        rows = (bits == length).nonzero()[:, 0]
        chosen = trellis.search(delta[rows], block[rows], length)
        noise[rows] = trellis.noise(chosen, block[rows])
        for row, path in zip(rows.tolist(), chosen.tolist(), strict=True):
            paths[row] = path
    return paths, noise


def _rate(excess: Float64[Tensor, " rows"], width: int) -> Float64[Tensor, " rows"]:
    """KL(N(delta, I) || N(0, (1 + r) I)) in bits, where r = `excess` = |delta|^2 / width."""
    # n/2 log2(1 + r)
    return 0.5 * width * torch.log2(1.0 + excess)


def _decoder_bits(x_start: Tensor, mean: Tensor, log_scale: float) -> float:
    """-log2 p(x_0) of an image under the decoder (Eq. 13)."""
    x_start, mean = x_start.reshape(1, 1, 1, -1), mean.reshape(1, 1, 1, -1)
    likelihood = discretized_gaussian_log_likelihood(x_start, mean, torch.full_like(mean, log_scale))
    return -float(likelihood.sum()) / LOG2
