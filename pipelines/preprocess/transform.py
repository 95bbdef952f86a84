"""One image: encoded bytes or pixels -> uint8 [size, size, channels]. Pillow and numpy only; workers import it quickly."""

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Filter = Literal["lanczos", "bicubic", "box"]
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}


class TooSmallError(ValueError):
    """The image's shorter side is below the size asked for."""


def transform(
    value: bytes | np.ndarray, *, image_size: int, channels: Literal[1, 3], filter: Filter, enlarge: bool = False
) -> np.ndarray:
    """Decode, crop the largest centred square, resize: uint8 [image_size, image_size, channels].

    value: an encoded image, or its uint8 pixels [height, width, 1 or 3]. enlarge: whether the resize may enlarge. Raises
    TooSmallError if it would and may not; other errors, Pillow's among them, if the value is no image.
    """
    image = decode(value).convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    if side < image_size and not enlarge:
        raise TooSmallError(f"{image.width}x{image.height} pixels, smaller than {image_size}")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size = (image_size, image_size)
    # Two steps: resize(box=...) would let the filter look at pixels outside the crop.
    resized = image.crop((left, top, left + side, top + side)).resize(size, FILTERS[filter])
    return np.asarray(resized, np.uint8).reshape(*size, channels)


def decode(value: bytes | np.ndarray) -> Image.Image:
    """The image as a viewer shows it: turned as EXIF says, on white if it is transparent, 8 bits a channel."""
    if isinstance(value, np.ndarray):
        return Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)
    if not value:
        raise ValueError("0 bytes")
    image: Image.Image = Image.open(io.BytesIO(value))  # reads the header alone
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        # The high byte, which Pillow too keeps of 16-bit RGB; its conversion of 16-bit grey to L clips at 255.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} states no range to scale to 8 bits")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    return image
