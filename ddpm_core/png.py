"""Images as a person sees them: laid out in a grid, and as a PNG file."""

import io

import numpy as np
from jaxtyping import UInt8


def tile(pixels: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "height width c"]:
    """Lay images out in a grid, row by row without gaps; missing places of the last row are black."""
    n, h, w, c = pixels.shape
    rows = -(-n // columns)
    grid = np.zeros((rows * columns, h, w, c), dtype=np.uint8)
    grid[:n] = pixels
    return grid.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def encode_png(pixels: UInt8[np.ndarray, "h w c"]) -> bytes:
    """An image of 1 or 3 channels as a PNG file."""
    from PIL import Image  # for pictures alone: who only computes need not have it

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")
    return file.getvalue()
