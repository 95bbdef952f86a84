"""In which floating-point numbers a network computes. Weights, and everything outside the network, stay float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ddpm_core.configs import Precision


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Inside, convolutions and products take `precision`: with float32, also within another autocast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def in_precision(network: Callable[..., Tensor], precision: Precision) -> Callable[..., Tensor]:
    """A network of images, and of whatever else it takes, in `precision`; it gives the images' own dtype all the same."""

    def run(x: Tensor, *others: Tensor) -> Tensor:
        with autocast(x.device, precision):
            return network(x, *others).to(x.dtype)

    return run


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, networks compute in float32 on every device: no autocast, no TF32 in convolutions or products, whatever
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says, and no cuDNN algorithm that is chosen by timing."""
    with autocast(device, "float32"):
        if device.type != "cuda":
            yield
            return
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False), _products_in_float32():
            yield


@contextmanager
def _products_in_float32() -> Iterator[None]:
    """Inside, cuBLAS multiplies float32 without TF32."""
    products = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), products.fp32_precision
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        products.fp32_precision = before[1]
