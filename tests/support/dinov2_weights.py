"""A small DINOv2 with random weights, in the layout of facebook/dinov2-large's file."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddpm_core import dinov2
from ddpm_core.dinov2 import WEIGHTS_VARIABLE, Size

SMALL = Size(width=128, depth=3, grid=20)


def published_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """The names and shapes of facebook/dinov2-large's file, at another size."""
    w, shapes = size.width, dict[str, tuple[int, ...]]()
    shapes["embeddings.cls_token"] = (1, 1, w)
    shapes["embeddings.mask_token"] = (1, w)
    shapes["embeddings.position_embeddings"] = (1, 1 + size.grid**2, w)
    shapes["embeddings.patch_embeddings.projection.weight"] = (w, 3, 14, 14)
    shapes["embeddings.patch_embeddings.projection.bias"] = (w,)
    for layer in (f"encoder.layer.{number}" for number in range(size.depth)):
        dense = [
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
        ]
        shapes |= {f"{layer}.{name}.weight": (w, w) for name in dense}
        shapes |= {f"{layer}.{name}.bias": (w,) for name in dense}
        shapes |= {f"{layer}.{norm}.{part}": (w,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        shapes |= {f"{layer}.layer_scale{number}.lambda1": (w,) for number in (1, 2)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4 * w, w), f"{layer}.mlp.fc1.bias": (4 * w,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (w, 4 * w), f"{layer}.mlp.fc2.bias": (w,)}
    return shapes | {"layernorm.weight": (w,), "layernorm.bias": (w,)}


def write_weights(path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    scales = {"norm": 0.2, "lambda": 0.5, "position": 0.5}
    tensors = {
        name: torch.randn(shape, generator=g) * next((s for part, s in scales.items() if part in name), 0.1)
        for name, shape in published_shapes(SMALL).items()
    }
    save_file(tensors, path)
    return path


def take_for_published(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the extractor take such a file for the published one."""
    monkeypatch.setattr(dinov2, "WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(dinov2, "VITL14", SMALL)
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(path))
