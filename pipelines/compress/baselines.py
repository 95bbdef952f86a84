"""What PNG, JPEG and WebP make of the same images, and the two measures that all files are compared by."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

QUALITIES = (5, 10, 20, 35, 50, 70, 85, 95)  # of JPEG and WebP; Pillow advises against JPEG's above 95


def bits_per_dim(sizes: Sequence[int], pixels: Tensor) -> float:
    """The rate of files of so many bytes that hold `pixels`, uint8 [n,H,W,C]."""
    return 8.0 * sum(sizes) / pixels.numel()


def rmse(decoded: Tensor, pixels: Tensor) -> float:
    """The root of the mean squared error over all images, on 0..255."""
    return math.sqrt(float((decoded.double() - pixels.double()).square().mean()))


def lossless_rates(pixels: Tensor) -> dict[str, float]:
    """Bits/dim of PNG and lossless WebP, each at its best effort."""
    return {
        "png": bits_per_dim([len(encode(image, "PNG", optimize=True)) for image in pixels], pixels),
        "webp": bits_per_dim([len(encode(image, "WEBP", lossless=True, quality=100)) for image in pixels], pixels),
    }


def lossy_points(pixels: Tensor, form: str) -> list[dict[str, float]]:
    """Rate and RMSE of JPEG or WebP at each quality."""
    points = []
    for quality in QUALITIES:
        files = [encode(image, form, quality=quality) for image in pixels]
        decoded = torch.stack([decode(file, image) for file, image in zip(files, pixels, strict=True)])
        rate = bits_per_dim([len(file) for file in files], pixels)
        points.append({"quality": quality, "rate": rate, "rmse": rmse(decoded, pixels)})
    return points


def encode(image: Tensor, form: str, **options: Any) -> bytes:
    """An image, uint8 [H,W,1 or 3], as a file of one of Pillow's formats."""
    array, file = image.numpy(), io.BytesIO()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    picture.save(file, format=form, **options)
    return file.getvalue()


def decode(file: bytes, like: Tensor) -> Tensor:
    """The image of a file, uint8 of the shape of `like`."""
    with Image.open(io.BytesIO(file)) as picture:
        # WebP has no grey: it gives three equal channels back.
        array = np.asarray(picture.convert("L" if like.shape[-1] == 1 else "RGB"))
    return torch.from_numpy(array.copy()).reshape(like.shape)
