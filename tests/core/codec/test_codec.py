"""Files of Algorithms 3 and 4: exact whatever is coded, cut, damaged or rounded, and near the rate that theory allows.

The model is the optimal predictor of N(0, s^2) pixels, or a small network with random weights: a bad model codes badly, but
as exactly as a good one.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gaussian_case import GaussianData, unchecked
from torch import Tensor

from ddpm_core import images, rng
from ddpm_core.codec import Codec, Decoded, format
from ddpm_core.codec.chain import TOLERANCE, Chain, spread_timesteps
from ddpm_core.codec.format import Header
from ddpm_core.configs import MeanType, VarType
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.errors import InputError
from ddpm_core.schedules import make_betas
from ddpm_core.unet import UNet, UNetConfig

BETAS = make_betas("linear", num_timesteps=1000)
DATA = GaussianData(BETAS, 0.05)
MODEL = b"a model."
SHAPE = (1, 6, 7)


# Format version 1: arange(196) * 37 % 64 + 96 as one 14x14 image, in 12 steps, of seed 5.
VERSION_1 = bytes.fromhex(
    "78303c2d0105010e0e0c61206d6f64656c2e32d104d5672c51892ca24902b4032f5e8b6db4c62780649882252a036b4eae92e6ae"
    "afd319cce11e88f2b5a48b85c937789b9a1015d2cce2d36c65b4f97baf88fa4820bacd2a35a1770afde1b1af10679492e7fb448c"
    "9d943ffd7209a28613cedaab33311e3c3216dcfd017018d4f7243072936f036b1fb6eca9907b9b3ebd2d727a5e7810c35d938895"
    "36d17297193efac8e84da45fcfb2d5c2022be4a14d961a7f77f8d05f59f24d04ffe24dc1a1806504f7efd4613107a598a4f1"
)


def codec(shape: tuple[int, int, int] = SHAPE, denoise_fn: DenoiseFn | None = None, model: bytes = MODEL) -> Codec:
    return Codec(GaussianDiffusion(BETAS), denoise_fn or DATA.predictor(), shape, model)


def gaussian_pixels(count: int, shape: tuple[int, int, int], s2: float = 0.05) -> Tensor:
    """uint8 [count, H, W, C]."""
    return images.to_uint8(math.sqrt(s2) * rng.normal(0, "pixels", torch.arange(count), 0, shape))


def perturbed(denoise_fn: DenoiseFn, error: Callable[[Tensor], Tensor]) -> DenoiseFn:
    return lambda x, t: denoise_fn(x, t) + error(denoise_fn(x, t))


def random_network(image_size: int = 8) -> UNet:
    """Its last layer is not near 0, as a new network's is: the outputs are of order 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(UNetConfig(image_size=image_size, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1))
        torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    return network.double().eval()


def same(decoded: Decoded, pixels: Tensor) -> bool:
    return decoded.whole and torch.equal(decoded.pixels, pixels)


@settings(max_examples=8, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2**32 - 1),
    st.integers(2, 12),
    st.sampled_from(["uniform", "gaussian", "black", "white", "stripes"]),
)
def test_any_image_comes_back_bit_for_bit(shape: tuple[int, int, int], seed: int, steps: int, kind: str) -> None:
    c, h, w = shape
    pixels = {
        "uniform": (rng.bits(seed, "image", torch.arange(2), 0, c * h * w)[:, : c * h * w] % 256).to(torch.uint8),
        "gaussian": gaussian_pixels(2, shape),
        "black": torch.zeros(2, c * h * w, dtype=torch.uint8),
        "white": torch.full((2, c * h * w), 255, dtype=torch.uint8),
        "stripes": (torch.arange(2 * c * h * w) % 2 * 255).to(torch.uint8),
    }[kind].reshape(2, h, w, c)
    coder = codec(shape)
    decoded = coder.decode([each.data for each in coder.encode(pixels, steps=steps, seed=seed)])
    assert all(same(*pair) for pair in zip(decoded, pixels, strict=True))


def test_an_image_of_several_blocks_comes_back_and_sharpens() -> None:
    shape = (1, 65, 64)  # 4,160 values
    coder, pixels = codec(shape, GaussianData(BETAS, 0.001).predictor()), gaussian_pixels(1, shape, 0.001)
    for decoded, image in zip(coder.decode([c.data for c in coder.encode(pixels, steps=4)]), pixels, strict=True):
        assert same(decoded, image)
        errors = [float((frame.pixels.float() - image.float()).square().mean()) for frame in decoded.frames]
        assert errors == sorted(errors, reverse=True)
        assert len(errors) > 2


@pytest.mark.parametrize(
    ("mean_type", "var_type", "steps"),
    [("xstart", "fixedsmall", 6), ("v", "fixedlarge", 6), ("eps", "learned_range", 6), ("xprev", "learned", 50)],
)
def test_every_parameterisation_codes(mean_type: MeanType, var_type: VarType, steps: int) -> None:
    betas = make_betas("linear", num_timesteps=50, beta_end=0.2)
    data = GaussianData(betas, 0.05)
    extra = (lambda t: 0.0) if var_type.startswith("learned") else None
    diffusion = GaussianDiffusion(betas, mean_type, var_type, "kl")
    coder = Codec(diffusion, data.predictor(mean_type, extra), SHAPE, MODEL)
    pixels = gaussian_pixels(1, SHAPE)
    (coded,) = coder.encode(pixels, steps=steps)
    assert same(coder.decode([coded.data])[0], pixels[0])


def test_every_cut_is_worth_its_last_check() -> None:
    """All prefixes of a file: the picture is the last frame that the bytes hold, and asked for the whole, they are refused."""
    coder, pixels = codec((3, 7, 7)), gaussian_pixels(1, (3, 7, 7))
    (coded,) = coder.encode(pixels, steps=9)
    frames = coder.decode([coded.data])[0].frames
    assert len(frames) >= 4
    start = frames[0].nbytes
    assert 8 * start == coded.ledger.header
    cuts = range(start, len(coded.data))
    for length, decoded in zip(cuts, coder.decode([coded.data[:n] for n in cuts], whole=False), strict=True):
        held = [frame for frame in frames if frame.nbytes <= length]
        assert not decoded.whole
        assert torch.equal(decoded.pixels, held[-1].pixels)
        assert [frame.t for frame in decoded.frames] == [frame.t for frame in held]
    errors = [float((frame.pixels.float() - pixels[0].float()).square().mean()) for frame in frames]
    assert errors[-1] < errors[0] / 100
    with pytest.raises(InputError, match=rf"'a\.x0' is cut after {len(coded.data) - 1} bytes"):
        coder.decode([coded.data[:-1]], ["file 'a.x0'"])
    for length in range(1, start):
        with pytest.raises(InputError, match=f"ends within its header, after {length} bytes"):
            coder.decode([coded.data[:length]])


def test_no_damage_passes_for_the_image() -> None:
    """One bit flipped behind the header: refused, or told as cut where the damage lies at the end; frames that are
    shown are true ones."""
    coder, pixels = codec(), gaussian_pixels(1, SHAPE)
    (coded,) = coder.encode(pixels, steps=6)
    frames = coder.decode([coded.data])[0].frames
    assert sum(coded.ledger.shifts) < 0.5  # five steps whose 42 values lie near an edge once in 200 times
    refused = 0
    places = range(8 * frames[0].nbytes, 8 * len(coded.data), 11)
    for place in places:
        damaged = bytearray(coded.data)
        damaged[place // 8] ^= 1 << place % 8
        try:
            decoded = coder.decode([bytes(damaged)], whole=False)[0]
        except InputError:
            refused += 1
            continue
        assert not decoded.whole or torch.equal(decoded.pixels, pixels[0])
        for frame, true in zip(decoded.frames, frames, strict=False):
            assert torch.equal(frame.pixels, true.pixels)
    assert refused > 0.5 * len(places)


def test_a_file_of_an_earlier_release_is_decoded() -> None:
    """Everything but the header is what both ends compute alike: another constant anywhere reads another image, or none."""
    (decoded,) = codec((1, 14, 14)).decode([VERSION_1])
    assert same(decoded, (96 + torch.arange(196) * 37 % 64).to(torch.uint8).reshape(14, 14, 1))
    assert [frame.nbytes for frame in decoded.frames] == [20, 43, 79, 114, 139]


def test_what_is_wrong_with_a_file_is_told_apart() -> None:
    coder, pixels = codec(), gaussian_pixels(1, SHAPE)
    data = coder.encode(pixels, steps=4)[0].data
    wrong = {
        b"\x89PNG" + data: "is not a coded image",
        b"": "is not a coded image",
        data[:4] + b"\x63" + data[5:]: "is of version 99 of the format, not 1",
        data[:5] + b"\x07" + data[6:]: "is damaged in its header",
        data + b"more than": "goes on after the image's end",
        data[:22] + bytes([data[22] ^ 64]) + data[23:]: "is damaged somewhere after byte",
    }
    for content, sentence in wrong.items():
        with pytest.raises(InputError, match=sentence):
            coder.decode([content])
    with pytest.raises(InputError, match="was coded by another model"):
        codec(model=b"another.").decode([data])
    with pytest.raises(InputError, match="was coded by another model"):
        codec((1, 7, 6)).decode([data])
    with unchecked(), pytest.raises(InputError, match="images are 6x7 with 1 channels, but this model codes 7x6"):
        coder.encode(pixels.transpose(1, 2))
    for steps in (1, 1001):
        with pytest.raises(InputError, match=rf"steps is {steps}: it must lie in 2\.\.1000"):
            coder.encode(pixels, steps=steps)


def test_predictions_may_differ_by_float32_rounding() -> None:
    """A receiver whose network says each value rounded to float32, and one ulp beside it, up or down at random."""
    network, pixels = random_network(), gaussian_pixels(3, (1, 8, 8))
    files = [each.data for each in codec((1, 8, 8), network).encode(pixels, steps=12)]

    def ulps(output: Tensor) -> Tensor:
        single = output.float()
        away = torch.where(rng.bits(0, "ulps", torch.arange(output.numel()), 0, 1)[:, 0] % 2 == 0, 9.0, -9.0)
        return torch.nextafter(single, away.reshape(output.shape).float()).double() - output

    decoded = codec((1, 8, 8), perturbed(network, ulps)).decode(files)
    assert all(same(*pair) for pair in zip(decoded, pixels, strict=True))


def test_predictions_that_differ_by_more_are_refused() -> None:
    network, pixels = random_network(), gaussian_pixels(1, (1, 8, 8))
    files = [each.data for each in codec((1, 8, 8), network).encode(pixels, steps=12)]
    other = codec((1, 8, 8), perturbed(network, lambda output: torch.full_like(output, 0.01)))
    with pytest.raises(InputError, match="arithmetic differs by more than the format allows"):
        other.decode(files)


def test_a_shifted_grid_keeps_every_value_from_its_edges() -> None:
    """Values on edges of the first grid get another; then anything nearer than the tolerance rounds alike."""
    diffusion = GaussianDiffusion(BETAS)
    chain = Chain(diffusion, DATA.predictor(), Header(shape=(1, 50, 100), steps=4, model=MODEL, seed=0))
    values = 3.0 * rng.normal(0, "values", torch.arange(2), 0, (5000,)).to(torch.float64)
    values[0, ::100] = (torch.arange(50) + 0.5) / 16
    shifts = chain.safe_shifts(values)
    assert shifts.shape == (4,)  # two blocks of 2,500 an image
    assert bool((shifts[:2] > 0).any())
    numbers, points = chain.rounded(values, shifts)
    for sign in (-1.0, 1.0):
        again, same_points = chain.rounded(values + 0.999 * sign * TOLERANCE, shifts)
        assert torch.equal(again, numbers)
        assert torch.equal(same_points, points)
    assert float((points - values).abs().max()) <= 1 / 32 + 1e-12


def test_bytes_depend_neither_on_the_batch_nor_on_threads() -> None:
    network, pixels = random_network(), gaussian_pixels(3, (1, 8, 8))
    coder = codec((1, 8, 8), network)
    together = [each.data for each in coder.encode(pixels, steps=8)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone = [coder.encode(image[None], steps=8)[0].data for image in pixels]
        assert all(same(coder.decode([data])[0], image) for data, image in zip(together, pixels, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert alone == together
    mixed = [together[0], coder.encode(pixels[1:2], steps=5, seed=9)[0].data, together[2][:40]]
    decoded = coder.decode(mixed, whole=False)
    assert [same(*pair) for pair in zip(decoded, pixels[:3], strict=True)] == [True, True, False]


@pytest.mark.parametrize("s2", [0.001, 0.05])
def test_gaussian_images_cost_what_their_mutual_information_says(s2: float) -> None:
    """Pixels of N(0, s^2) and their optimal predictor: x_1 tells I(x_0; x_1) = log2(1 + s^2 SNR_1) / 2 bits a value, however
    few the steps, for p's variance goes with the stride; the bound of many steps under fixedsmall is more. The overhead: see
    test_codec_trellis for the paths; rates, shifts and checks are the rest. All is counted but the header."""
    shape, steps = (3, 20, 20), 10
    size = math.prod(shape)
    coder = codec(shape, GaussianData(BETAS, s2).predictor())
    (coded,) = coder.encode(gaussian_pixels(1, shape, s2), steps=steps)
    abar = DATA.abar
    information = 0.5 * size * math.log2(1 + s2 * abar[0] / (1 - abar[0]))
    times = spread_timesteps(GaussianDiffusion(BETAS), steps)
    snr = [abar[t] / (1 - abar[t]) for t in times]
    papers = sum(
        0.5 * size * s2 / (1 + s2 * low) * (high - low) / math.log(2.0) for high, low in itertools.pairwise(snr)
    )
    ledger = coded.ledger
    assert ledger.lossy < papers
    # One image of 1,200 values: its energy, and with it the rate, varies by 1/sqrt(600) of a nat's share.
    assert ledger.lossy == pytest.approx(information, rel=0.10)
    assert sum(ledger.paths) == pytest.approx(sum(ledger.kl), rel=0.05)
    # x_0 given x_1 under the decoder: the entropy of N(0, D) at levels 2/255 apart, D the error of the best prediction.
    # What the paths fell short of, the decoder makes up for.
    rest = s2 / (1 + s2 * snr[0])
    floor = size * (0.5 * math.log2(2 * math.pi * math.e * rest) + math.log2(255 / 2))
    assert ledger.lossy + ledger.decoder < 1.09 * (information + floor)
    spent = ledger.header + ledger.lossy + ledger.decoder
    assert 8 * len(coded.data) == pytest.approx(spent, abs=8)


def test_steps_cost_no_more_than_one_pass_each() -> None:
    """Network passes: one a step, for sending as for receiving, of all images at once."""
    passes = []
    predictor = DATA.predictor()

    def counting(x: Tensor, t: Tensor) -> Tensor:
        passes.append(len(x))
        return predictor(x, t)

    coder = codec(denoise_fn=counting)
    files = [each.data for each in coder.encode(gaussian_pixels(3, SHAPE), steps=7)]
    assert passes == [3] * 7
    coder.decode(files)
    assert passes == [3] * 14


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 5000)] * 3),
    st.integers(2, 1000),
    st.binary(min_size=8, max_size=8),
)
def test_a_header_comes_back(seed: int, shape: tuple[int, int, int], steps: int, model: bytes) -> None:
    header = Header(shape=shape, steps=steps, model=model, seed=seed)
    packed = header.pack()
    assert format.read_header(packed + b"stream", "file") == (header, len(packed))
    with pytest.raises(InputError, match="damaged in its header"):  # no field is 2^32
        format.read_header(replace(header, seed=2**32).pack(), "file")
