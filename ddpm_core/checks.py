"""What may be passed as images and timesteps. Dtypes and shapes are checked on every device, values on the CPU alone:
reading them from another device would wait for it at every step."""

import torch
from torch import Tensor


def check_images(name: str, x: Tensor, like: Tensor | None = None, *, finite: bool = False) -> None:
    """Raises ValueError unless x is floating-point [B,C,H,W], of the shape of `like`, and, if asked for, finite."""
    if not x.is_floating_point() or x.ndim != 4:
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}: floating-point images [B,C,H,W], nominally in [-1, 1], are wanted; "
            "ddpm_core.images.to_float makes them from 8-bit pixels"
        )
    if like is not None and x.shape != like.shape:
        raise ValueError(
            f"{name} is {list(x.shape)}: the shape of the images it belongs to, {list(like.shape)}, is wanted"
        )
    if finite and x.device.type == "cpu" and not bool(x.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: finite values, nominally in [-1, 1], are wanted")


def check_timesteps(t: Tensor, batch: int, num_timesteps: int | None = None) -> None:
    """Raises ValueError unless t is int64 or int32 [batch] and, if num_timesteps is given, in 0..num_timesteps-1: indexing
    would take -1 for the last timestep, and a byte for a mask."""
    if t.dtype not in (torch.int64, torch.int32) or t.shape != (batch,):
        raise ValueError(f"t is {t.dtype} {list(t.shape)}: one int64 timestep an image, [{batch}], is wanted")
    if num_timesteps is not None and t.device.type == "cpu" and batch:
        low, high = (int(bound) for bound in t.aminmax())
        if low < 0 or high >= num_timesteps:
            raise ValueError(f"t runs from {low} to {high}: it must lie in 0..{num_timesteps - 1}")
