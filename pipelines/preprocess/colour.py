"""Colours as sRGB: an image that carries the ICC profile of another space is converted by it."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

UNUSABLE = "a profile that cannot be used"
# What two spaces may differ by, of 255, and be one: profiles of sRGB differ in the rounding of their curves.
SAME = 2


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """(image, name of the profile that it was converted by).

    The image is as it was, and the name empty, if the profile is sRGB's; the name is UNUSABLE if the profile is damaged or
    that of another kind of image, which counts as none. Transparency is kept.
    """
    transparent = image.has_transparency_data
    is_grey = image.mode in ("1", "L", "LA", "La")
    mode = "CMYK" if image.mode == "CMYK" else "L" if is_grey else "RGB"
    name, transform = _conversion(profile, mode)
    if is_grey and name == UNUSABLE:  # grey pixels under the profile of a colour space
        mode = "RGB"
        name, transform = _conversion(profile, mode)
    if transform is None:
        return image, name
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None  # None only if it is done in place
    if transparent:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted, name


@functools.lru_cache(maxsize=64)
def _conversion(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(the profile's name, its transform of images of a mode: L, RGB or CMYK); empty and None if it leaves them as they are."""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(space, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK" and _is_identity(transform, mode):
            return "", None
        description = space.profile.profile_description or ""
    except Exception:  # LittleCMS's own errors, and whatever a damaged profile makes Pillow raise
        return UNUSABLE, None
    return " ".join(description.split())[:100] or "a profile without a name", transform


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform to sRGB leaves all greys, and a grid of colours, as they are."""
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    colours = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), -1).reshape(-1, 3)
    probe = greys if mode == "L" else np.concatenate([greys, colours])
    image = Image.fromarray(probe[None, :, 0] if mode == "L" else probe[None])
    converted = ImageCms.applyTransform(image, transform)
    return int(np.abs(np.asarray(converted, np.int16)[0] - probe).max()) <= SAME
