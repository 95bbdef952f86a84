"""Pixels to [-1, 1] and back, exactly; tiles and PNG files."""

import io
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.gaussian_case import unchecked
from torch import Tensor

from ddpm_core import images, png
from ddpm_core.pixel_range import OFFSET, SCALE, scaled_values

LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_256_levels_come_back_exactly(dtype: torch.dtype) -> None:
    assert torch.equal(images.to_uint8(images.to_float(LEVELS).to(dtype)), LEVELS)


def test_levels_are_the_papers_numbers() -> None:
    x = images.to_float(LEVELS).flatten()
    assert x.dtype == torch.float32
    expected = {0: -1.0, 127: -0.00392156862745098, 128: 0.00392156862745098, 255: 1.0}
    # One rounding of a number near 1 to float32.
    assert {level: float(x[level]) for level in expected} == pytest.approx(expected, abs=6e-8)
    assert (float(x[0]), float(x[255])) == (-1.0, 1.0)
    assert x.double().diff().tolist() == pytest.approx([2 / 255] * 255, abs=1.2e-7)


def test_levels_are_the_tables_bits_however_a_device_divides() -> None:
    """A GPU makes a division by a number a product with its reciprocal: in float32 111 of the 256 values are others then."""
    table = torch.from_numpy(scaled_values())
    assert torch.equal(images.to_float(LEVELS).flatten(), table)
    levels = torch.arange(256)
    product = (levels.double() * (1 / SCALE)).float() + OFFSET
    assert torch.equal(product, table)
    in_float32 = levels.float() * torch.tensor(1 / SCALE, dtype=torch.float32) + OFFSET
    assert int((in_float32 != table).sum()) == 111


@given(st.floats(-1.5, 1.5, width=32))
@settings(max_examples=300, deadline=None)
def test_rounding_is_half_up_after_the_clip(value: float) -> None:
    exact = (Fraction(value) + 1) * Fraction(255, 2)  # in pixels, without rounding
    got = int(images.to_uint8(torch.full((1, 1, 1, 1), value)))
    # float32 near 256 has steps of 3e-5: nearer than that to a half, either neighbour is right.
    allowed = {
        min(max(math.floor(exact + Fraction(1, 2) + d), 0), 255) for d in (Fraction(-1, 30_000), Fraction(1, 30_000))
    }
    assert got in allowed


def test_the_half_between_127_and_128_goes_up() -> None:
    assert int(images.to_uint8(torch.zeros(1, 1, 1, 1))) == 128
    assert int(images.to_uint8(torch.full((1, 1, 1, 1), -1e-6))) == 127


@pytest.mark.parametrize(("value", "level"), [(math.inf, 255), (-math.inf, 0), (7.0, 255), (-7.0, 0), (1.0, 255)])
def test_what_lies_outside_is_clipped(value: float, level: int) -> None:
    assert int(images.to_uint8(torch.full((1, 1, 1, 1), value))) == level


def test_nan_has_no_pixel() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 3, 0] = math.nan
    with pytest.raises(ValueError, match="images hold NaN"):
        images.to_uint8(x)


@unchecked()
def test_the_wrong_side_of_the_conversion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^images is torch.uint8 \[1, 16, 16, 1\]"):
        images.to_uint8(LEVELS)
    with pytest.raises(ValueError, match=r"^pixels are torch.float32 \[1, 3, 4, 4\]: uint8 \[B,H,W,C\]"):
        images.to_float(torch.zeros(1, 3, 4, 4))


def test_channels_move_between_last_and_first_place() -> None:
    pixels = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).reshape(2, 3, 4, 3)
    x = images.to_float(pixels)
    assert x.shape == (2, 3, 3, 4)
    for index in [(0, 0, 0, 0), (1, 2, 3, 2), (1, 0, 2, 1)]:
        n, h, w, c = index
        assert float(x[n, c, h, w]) == pytest.approx(int(pixels[index]) / 127.5 - 1, abs=6e-8)
    back = images.to_uint8(x)
    assert torch.equal(back, pixels)
    assert back.is_contiguous()


@given(
    n=st.integers(1, 12), columns=st.integers(1, 6), h=st.integers(1, 3), w=st.integers(1, 3), c=st.sampled_from([1, 3])
)
@settings(max_examples=60, deadline=None)
def test_tiles_lie_row_by_row_without_gaps_on_black(n: int, columns: int, h: int, w: int, c: int) -> None:
    pixels = torch.randint(1, 256, (n, h, w, c), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    grid = torch.from_numpy(png.tile(pixels.numpy(), columns))
    rows = math.ceil(n / columns)
    assert grid.shape == (rows * h, columns * w, c)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        cell = grid[row * h : (row + 1) * h, column * w : (column + 1) * w]
        assert torch.equal(cell, pixels[place] if place < n else torch.zeros(h, w, c, dtype=torch.uint8))


@pytest.mark.parametrize("c", [1, 3])
def test_a_png_holds_the_pixels(c: int) -> None:
    pixels: Tensor = torch.arange(5 * 4 * c, dtype=torch.uint8).reshape(5, 4, c)
    decoded = np.asarray(Image.open(io.BytesIO(png.encode_png(pixels.numpy())))).reshape(5, 4, c)
    assert np.array_equal(decoded, pixels.numpy())
