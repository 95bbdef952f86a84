"""Chunks: the same whether tensors or arrays are asked for, and known again by later versions."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.storage.chunks import content_sha256, load_arrays, load_chunk, save_chunk

TENSORS: dict[str, Tensor] = {
    "images": torch.empty(0, 2, 2, 1, dtype=torch.uint8),
    "features": torch.arange(6.0).reshape(2, 3).T,
    "numbers": torch.tensor([3, -1]),
    "scalar": torch.tensor(0.1, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
}


def test_a_chunk_read_as_arrays_holds_its_tensors(tmp_path: Path) -> None:
    save_chunk(tmp_path, range(2), TENSORS, {"seconds": 1.5})
    tensors, facts = load_chunk(tmp_path, range(2))
    arrays, same_facts = load_arrays(tmp_path, range(2))
    assert facts == same_facts
    assert tensors.keys() == arrays.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
        assert np.array_equal(arrays[name], tensor.numpy())


def test_the_sha256_of_a_content_is_that_of_its_tensors_as_torch_names_them() -> None:
    """Which files of earlier versions state."""
    digest = hashlib.sha256()
    for name in sorted(TENSORS):
        tensor = TENSORS[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert content_sha256(TENSORS) == digest.hexdigest()
    assert content_sha256({name: tensor.numpy() for name, tensor in TENSORS.items()}) == digest.hexdigest()
