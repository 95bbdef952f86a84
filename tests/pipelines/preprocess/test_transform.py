"""One image through the transform: every kind of file a data set holds, against pixels known beforehand."""

import numpy as np
import pytest
from PIL import Image
from support.source_images import encoded

from pipelines.preprocess.transform import FILTERS, Filter, TooSmallError, decode, transform

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def rgb(value: bytes | np.ndarray, size: int = 4, filter: Filter = "lanczos") -> np.ndarray:
    return transform(value, image_size=size, channels=3, filter=filter)


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "box"])
@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40), (41, 64), (40, 40), (8, 100)])
def test_the_centre_is_cropped_before_the_resize(name: Filter, height: int, width: int) -> None:
    pixels = noise(height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = Image.fromarray(pixels[top : top + side, left : left + side])
    expected = np.asarray(cropped.resize((8, 8), FILTERS[name]))
    assert (rgb(encoded(pixels), 8, name) == expected).all()
    assert (rgb(pixels, 8, name) == expected).all()  # pixels that need no decoding take the same way
    surroundings = noise(height, width) if side == max(height, width) else np.full_like(pixels, 255)
    surroundings[top : top + side, left : left + side] = pixels[top : top + side, left : left + side]
    assert (rgb(surroundings, 8, name) == expected).all()  # nothing outside the crop is seen by the filter


def test_the_box_filter_is_the_mean_of_each_square() -> None:
    pixels = noise(32, 32)
    means = pixels.reshape(4, 8, 4, 8, 3).astype(np.float64).mean((1, 3))
    # Pillow rounds to a byte after each of its two passes: half a step each.
    assert np.abs(rgb(pixels, 4, "box") - means).max() <= 1.0


def test_an_image_of_the_right_size_is_left_alone() -> None:
    pixels = noise(32, 32)
    for name in FILTERS:
        assert (transform(pixels, image_size=32, channels=3, filter=name) == pixels).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    """The stored picture is turned so that a viewer that obeys the tag shows `expected`, by the tag's definition: the row
    and column of the stored picture's first pixel."""
    expected = np.zeros((32, 32, 3), np.uint8)
    expected[:16, :16], expected[:16, 16:], expected[16:, :16], expected[16:, 16:] = RED, GREEN, BLUE, WHITE
    turned = {
        1: expected,
        2: expected[:, ::-1],
        3: expected[::-1, ::-1],
        4: expected[::-1],
        5: expected.transpose(1, 0, 2),
        6: np.rot90(expected),
        7: expected[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(expected, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    value = encoded(np.ascontiguousarray(turned), kind, exif=exif, **options)
    corners = rgb(value, 32)[[4, 4, -4, -4], [4, -4, 4, -4]].astype(int)
    assert np.abs(corners - [RED, GREEN, BLUE, WHITE]).max() < 12  # JPEG's own loss


@pytest.mark.parametrize(
    ("image", "kind", "pixel"),
    [
        pytest.param(Image.new("L", (4, 4), 77), "PNG", (77, 77, 77), id="grey"),
        pytest.param(Image.new("1", (4, 4), 1), "PNG", WHITE, id="bilevel"),
        pytest.param(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", RED, id="CMYK"),
        pytest.param(Image.new("RGBA", (4, 4), (255, 0, 0, 255)), "PNG", RED, id="opaque alpha"),
        pytest.param(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", WHITE, id="transparent: on white"),
        pytest.param(Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG", (204, 204, 204), id="a fifth of black on white"),
        pytest.param(Image.new("LA", (4, 4), (0, 51)), "PNG", (204, 204, 204), id="grey with alpha"),
        pytest.param(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "WEBP", WHITE, id="transparent WebP"),
    ],
)
def test_every_mode_becomes_the_rgb_that_a_person_sees(
    image: Image.Image, kind: str, pixel: tuple[int, int, int]
) -> None:
    assert (rgb(encoded(image, kind)) == pixel).all()


def test_a_cmyk_jpeg_comes_out_in_its_colours() -> None:
    assert np.abs(rgb(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).astype(int) - RED).max() <= 2


def test_a_palette_with_a_transparent_entry_lies_on_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (0, 0, 2, 4))
    shown = rgb(encoded(image, transparency=1))
    assert (shown[:, :2] == WHITE).all()
    assert (shown[:, 2:] == RED).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_high_byte_and_are_not_clipped(kind: str) -> None:
    values = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    image = decode(encoded(values, kind))
    assert (np.asarray(image) == values >> 8).all()
    grey = transform(encoded(values, kind), image_size=64, channels=1, filter="lanczos")
    assert (grey[..., 0] == values >> 8).all()


def test_one_channel_is_the_luma_of_rgb() -> None:
    pixels = noise(8, 8)
    grey = transform(pixels, image_size=8, channels=1, filter="box")
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2, to the integer
    assert grey.shape == (8, 8, 1)
    assert np.abs(grey[..., 0] - luma).max() <= 1.0
    assert (rgb(noise(8, 8, 1), 8) == noise(8, 8, 1)).all()  # and grey pixels are spread over three


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "0 bytes"),
        (b"no image at all", "cannot identify image file"),
        (encoded(noise(64, 64), "JPEG")[:900], "truncated"),
        (encoded(noise(64, 64), "PNG")[:-2000], "truncated"),
        (encoded(noise(64, 64), "WEBP")[:900], "(?i)decode|truncated|cannot identify"),
        (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "mode 'F' states no range"),
    ],
)
def test_a_value_that_does_not_decode_says_why(value: bytes, message: str) -> None:
    with pytest.raises(Exception, match=message):
        rgb(value)


def test_a_flipped_bit_in_a_png_is_not_taken_for_an_image() -> None:
    value = bytearray(encoded(noise(64, 64)))
    value[len(value) // 2] ^= 1
    with pytest.raises(Exception, match=r"(?i)crc|checksum|broken|data stream|truncated"):
        rgb(bytes(value))


def test_an_image_below_the_size_is_enlarged_only_when_asked() -> None:
    pixels = noise(31, 200)
    with pytest.raises(TooSmallError, match=r"^200x31 pixels, smaller than 32$"):
        rgb(pixels, 32)
    assert transform(pixels, image_size=32, channels=3, filter="lanczos", enlarge=True).shape == (32, 32, 3)
