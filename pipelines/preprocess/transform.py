"""One image: encoded bytes or pixels -> uint8 [size, size, channels]. Pillow and numpy only; workers import it quickly."""

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.preprocess.colour import to_srgb
from pipelines.preprocess.metadata import without_metadata

Filter = Literal["lanczos", "bicubic", "box"]
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}
MAX_PIXELS = 178_956_970  # what Pillow takes by default: an RGB image of half a gigabyte
# How the stored picture is turned to be shown, by EXIF's orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Images that Pillow may not read, by how their files begin.
UNREAD_FORMATS = {b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL"}
UNREAD_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF", b"msf1": "HEIF"}
CONVERTED = "converted by profile"  # in Image.info: the name of the profile


class TooSmallError(ValueError):
    """The image's shorter side is below the size asked for."""


class TooLargeError(ValueError):
    """The image has more pixels than are allowed."""


def transform(
    value: bytes | np.ndarray,
    *,
    image_size: int,
    channels: Literal[1, 3],
    filter: Filter,
    enlarge: bool = False,
    max_pixels: int = MAX_PIXELS,
    profiles: Counter[str] | None = None,
) -> np.ndarray:
    """Decode, crop the largest centred square, resize: uint8 [image_size, image_size, channels].

    value: an encoded image, or its uint8 pixels [height, width, 1 or 3]. enlarge: whether the resize may enlarge. profiles:
    where the image is counted under the name of the colour profile that it was converted by. Raises TooSmallError if the
    resize would enlarge and may not; TooLargeError above max_pixels; other errors, Pillow's among them, if the value is no
    image.
    """
    image = decode(value, max_pixels=max_pixels)
    profile = image.info.get(CONVERTED)
    mode = "RGB" if channels == 3 else "L"
    if image.mode != mode:  # otherwise it would be copied
        image = image.convert(mode)
    side = min(image.size)
    if side < image_size and not enlarge:
        raise TooSmallError(f"{image.width}x{image.height} pixels, smaller than {image_size}")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size = (image_size, image_size)
    # Two steps: resize(box=...) would let the filter look at pixels outside the crop.
    with _pillow_without_limit():
        square = image.crop((left, top, left + side, top + side))
    resized = square.resize(size, FILTERS[filter])
    if profiles is not None and profile:
        profiles[profile] += 1
    return np.asarray(resized, np.uint8).reshape(*size, channels)


def decode(value: bytes | np.ndarray, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as a viewer shows it: turned as EXIF says, in sRGB, on white if it is transparent, 8 bits a channel.

    Metadata that cannot be read counts as none.
    """
    if isinstance(value, np.ndarray):
        return Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)
    if not value:
        raise ValueError("0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata that is damaged and of many pixels
        image = _load(value, max_pixels)
        turn = TURNS.get(_orientation(image))
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        # The high byte, which Pillow too keeps of 16-bit RGB; its conversion of 16-bit grey to L clips at 255.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} states no range to scale to 8 bits")
    name = ""
    if isinstance(profile, bytes) and profile:
        image, name = to_srgb(image, profile)
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    if turn is not None:
        image = image.transpose(turn)
    image.info[CONVERTED] = name
    return image


def _load(value: bytes, max_pixels: int) -> Image.Image:
    """The decoded image; if that fails, what is decoded without the metadata. Raises the first error if all fails."""
    try:
        return _load_as_it_is(value, max_pixels)
    except TooLargeError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        for bare in without_metadata(value):
            with contextlib.suppress(Exception):
                return _load_as_it_is(bare, max_pixels)
        if isinstance(error, UnidentifiedImageError):  # its own message holds an address in memory
            raise UnidentifiedImageError(f"cannot identify image file{_format_name(value)}") from error
        raise


def _load_as_it_is(value: bytes, max_pixels: int) -> Image.Image:
    # Pillow tries other formats before WebP, some of which look at more than the first bytes: 5 % of the work of an image.
    formats = ("WEBP",) if value[:4] == b"RIFF" and value[8:12] == b"WEBP" else None
    with _pillow_without_limit():
        image: Image.Image = Image.open(io.BytesIO(value), formats=formats)
        if image.width * image.height > max_pixels:
            raise TooLargeError(f"{image.width}x{image.height} pixels, more than --max-pixels {max_pixels:,} allows")
        image.load()
    return image


@contextlib.contextmanager
def _pillow_without_limit() -> Iterator[None]:
    """Lets images pass whose number of pixels is checked here."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 if there is none or it cannot be read. No other tag is looked at, so none can be in the way."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's reader raises many kinds
        return 1


def _format_name(value: bytes) -> str:
    """Of an image in a format that Pillow does not read, the format's name in a clause; of other bytes nothing."""
    name = next((name for magic, name in UNREAD_FORMATS.items() if value.startswith(magic)), None)
    if value[4:8] == b"ftyp":
        name = UNREAD_BRANDS.get(value[8:12])
    return "" if name is None else f": this Pillow does not read {name}"
