"""A device besides the CPU, without a GPU: its tensors have shapes and no values, and refuse to meet those of the CPU.

PyTorch's own device "meta", in the mode that checks devices. Fake CUDA tensors would say the same, but a PyTorch without CUDA
asks the driver when they are indexed or go through a backward pass.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core import precision
from support.gaussian_case import unchecked

OTHER = torch.device("meta")


def module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """module.to(..): PyTorch's own swaps tensors, which fake ones do not allow."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for name, x in table.items():
                if x is None:
                    continue
                options = {} if memory_format is None or x.ndim != 4 else {"memory_format": memory_format}
                new = x.detach().to(device or x.device, dtype or x.dtype, **options)
                if (new.device, new.dtype, new.stride()) != (x.device, x.dtype, x.stride()):
                    table[name] = nn.Parameter(new) if isinstance(x, nn.Parameter) else new
    return module


@contextlib.contextmanager
def other_device() -> Iterator[None]:
    """Inside, tensors are fake, those of OTHER among them. Checks of values pass; nothing checks annotations."""

    def autocast(device: torch.device, wanted: Any) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted == "bfloat16")  # there is none for meta

    with (
        unchecked(),
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(Tensor, "__bool__", return_value=True),
        mock.patch.object(nn.Module, "to", module_to),
        mock.patch.object(precision, "autocast", autocast),
    ):
        yield
