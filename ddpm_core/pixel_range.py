"""The affine map between 8-bit pixels and [-1, 1] (paper, section 3.3), as numbers that need no torch to read."""

import numpy as np

SCALE = 127.5  # x = pixel / SCALE + OFFSET
OFFSET = -1.0


def scaled_values() -> np.ndarray:
    """float32 [256]: the value in [-1, 1] of each pixel; ddpm_core.images.to_float gives the same, bit for bit."""
    return np.arange(256, dtype=np.float32) / np.float32(SCALE) + np.float32(OFFSET)
