"""CUDA tensors without a GPU: they have shapes and a device and no values, and refuse to meet a tensor of another device."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)


class ByOperators(TorchFunctionMode):
    """Python's x[..] and x.to(..) by operators: PyTorch without CUDA asks the driver for them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__:
            return getitem(*args)
        if func is Tensor.__setitem__:
            x, index, value = args
            return getitem(x, index).copy_(value) if isinstance(value, Tensor) else getitem(x, index).fill_(value)
        if func is Tensor.to:
            return converted(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def converted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x.to(..)."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or x.device, dtype or x.dtype
    ordered = memory_format in (None, torch.preserve_format) or x.is_contiguous(memory_format=memory_format)
    if ordered and not copy and (device.type, dtype) == (x.device.type, x.dtype):
        return x
    options = {} if memory_format is None else {"memory_format": memory_format}
    return torch.ops.aten._to_copy(x, dtype=dtype, device=device, **options)


def getitem(x: Tensor, index: Any) -> Tensor:
    """x[index] for numbers, slices, None, ... and tensors."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        named = sum(part is not None for part in parts) - 1
        parts[place : place + 1] = [slice(None)] * (x.ndim - named)
    dim = 0
    tensors: list[Tensor | None] = [None] * x.ndim
    for part in parts:
        if part is None:
            x = x.unsqueeze(dim)
            dim += 1
        elif isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
            dim += 1
        elif isinstance(part, Tensor):
            tensors[dim] = part
            dim += 1
        else:
            x = x.select(dim, part)
    return torch.ops.aten.index.Tensor(x, tensors) if any(t is not None for t in tensors) else x


def module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """module.to(..): PyTorch's own swaps tensors, which fake ones do not allow."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for name, x in table.items():
                if x is None:
                    continue
                ordered = memory_format if x.ndim == 4 else None
                new = converted(x.detach(), device or x.device, dtype or x.dtype, memory_format=ordered)
                if new.device != x.device or new.dtype != x.dtype or new.stride() != x.stride():
                    table[name] = nn.Parameter(new) if isinstance(x, nn.Parameter) else new
    return module


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake, and such of a CUDA device can be made."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        ByOperators(),
        mock.patch.object(nn.Module, "to", module_to),
    ):
        yield mode
