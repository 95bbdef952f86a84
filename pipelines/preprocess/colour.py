"""Colours as sRGB: an image that carries the ICC profile of another space is converted by it."""

import functools
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

UNUSABLE = "a profile that cannot be used"
# What two spaces may differ by, of 255, and be one: profiles of sRGB differ in the rounding of their curves.
SAME = 2


class Conversion(NamedTuple):
    """What a profile does to images of one mode. name: the profile's, empty if it leaves them as they are."""

    name: str
    transform: ImageCms.ImageCmsTransform | None = None


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """(image, name of the profile that it was converted by).

    The image is as it was, and the name empty, if the profile is sRGB's; the name is UNUSABLE if the profile is damaged or
    that of another kind of image, which counts as none. Transparency is kept.
    """
    transparent = image.has_transparency_data
    is_grey = image.mode in ("1", "L", "LA", "La")
    mode = "CMYK" if image.mode == "CMYK" else "L" if is_grey else "RGB"
    conversion = _conversion(profile, mode)
    if is_grey and conversion.name == UNUSABLE:  # grey pixels under the profile of a colour space
        mode, conversion = "RGB", _conversion(profile, "RGB")
    if conversion.transform is None:
        return image, conversion.name
    converted = ImageCms.applyTransform(image.convert(mode), conversion.transform)
    assert converted is not None  # None only if it is done in place
    if transparent:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted, conversion.name


@functools.lru_cache(maxsize=64)
def _conversion(profile: bytes, mode: str) -> Conversion:
    """What a profile does to images of a mode: L, RGB or CMYK."""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(space, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK" and _is_identity(transform, mode):
            return Conversion("")
        description = space.profile.profile_description or ""
    except Exception:  # LittleCMS's own errors, and whatever a damaged profile makes Pillow raise
        return Conversion(UNUSABLE)
    return Conversion(" ".join(description.split())[:100] or "a profile without a name", transform)


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform to sRGB leaves all greys, and a grid of colours, as they are."""
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    colours = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), -1).reshape(-1, 3)
    probe = greys if mode == "L" else np.concatenate([greys, colours])
    image = Image.fromarray(probe[None, :, 0] if mode == "L" else probe[None])
    converted = ImageCms.applyTransform(image, transform)
    return int(np.abs(np.asarray(converted, np.int16)[0] - probe).max()) <= SAME
