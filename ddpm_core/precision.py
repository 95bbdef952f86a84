"""How a network computes: in which floating-point numbers, in which order it adds them up, and compiled. Weights, and
everything outside the network, stay float32."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_core.configs import Precision

# Where an expression grows beyond these, the compiler writes what is there so far to memory. By its own numbers, 30, 4 and 8,
# it cuts a norm with its swish and dropout, and a gradient of theirs. Uncut, these are two kernels: sums, and their use.
UNCUT = {"realize_opcount_threshold": 200, "realize_reads_threshold": 16, "realize_acc_reads_threshold": 32}


def compile_network(network: nn.Module, **options: Any) -> None:
    """torch.compile a network, in place and as one graph. options: of the compiler, beside those that fit networks like ours."""
    network.compile(fullgraph=True, options=UNCUT | options)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Inside, convolutions and products take `precision`: with float32, also within another autocast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def in_precision(network: Callable[..., Tensor], precision: Precision) -> Callable[..., Tensor]:
    """A network of images, and of whatever else it takes, in `precision`; it gives the images' own dtype all the same."""

    def run(x: Tensor, *others: Tensor) -> Tensor:
        with autocast(x.device, precision):
            return network(x, *others).to(x.dtype)

    return run


def in_slices(network: Callable[..., Tensor], images: int) -> Callable[..., Tensor]:
    """A network that sees at most so many images at once."""

    def run(*columns: Tensor) -> Tensor:
        parts = zip(*(column.split(images) for column in columns), strict=True)
        return torch.cat([network(*part) for part in parts])

    return run


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, networks and products are in float32 on every device: no autocast, no TF32 or bfloat16 in their place, whatever
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or torch.set_float32_matmul_precision say, and no cuDNN algorithm that is chosen by
    timing."""
    with autocast(device, "float32"), _as_stored():
        if device.type != "cuda":
            yield
            return
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield


@contextmanager
def _as_stored() -> Iterator[None]:
    """Inside, cuBLAS and oneDNN multiply float32 as float32."""
    onednn: Any = torch.backends.mkldnn
    settings = torch.backends.cuda.matmul, onednn.matmul, onednn.conv
    before = torch.get_float32_matmul_precision(), [each.fp32_precision for each in settings]
    torch.set_float32_matmul_precision("highest")
    onednn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        for each, precision in zip(settings, before[1], strict=True):
            each.fp32_precision = precision


def compute_deterministically() -> None:
    """From now on, this process computes on a GPU by kernels that add up in a fixed order, chosen without timing them. To be
    called before the first product and before anything is compiled. An operator without such a kernel raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # read when the compiler is imported
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads such memory
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
