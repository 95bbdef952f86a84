"""Chunks: the files that fan-out leaves behind.

A chunk is one safetensors file that says itself which indices it holds and what the sha256 of its content is, so that it
is whole, damaged or absent, whoever wrote it and however often.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from safetensors import SafetensorError
from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.errors import InputError
from ddpm_core.ranges import Count
from pipelines.storage.locations import Location, committed

if TYPE_CHECKING:
    from torch import Tensor


AHEAD = 4  # chunks that are read while another is worked on: each answer of an object store takes long


class ChunkFacts(TypedDict):
    """What every chunk says of itself: its indices first..stop-1 and the sha256 of its content."""

    first: Count[int]
    stop: Count[int]
    sha256: str


def chunk_ranges(total: int, size: int) -> list[range]:
    """The indices of each chunk: exactly 0..total-1, each once."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def chunk_path(folder: Location, indices: range) -> Location:
    return folder / f"chunk-{indices.start:08d}-{indices.stop:08d}.safetensors"


def save_chunk(folder: Location, indices: range, tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any]) -> None:
    """Commit the chunk of `indices`, with facts for JSON. Whoever writes it last, the file is whole."""
    from safetensors.torch import save_file  # here and below: who only looks at chunks does without torch

    content = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    stated = {**facts, "first": indices.start, "stop": indices.stop, "sha256": content_sha256(content)}
    with committed(chunk_path(folder, indices)) as temporary:
        save_file(content, temporary, metadata={"ddpm": json.dumps(stated)})


def load_chunk(folder: Location, indices: range) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """(tensors, facts) of a chunk. Raises what `load_arrays` does."""
    import torch

    arrays, facts = load_arrays(folder, indices)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, facts


def load_arrays(folder: Location, indices: range) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors as NumPy has them, facts) of a chunk. Raises FileNotFoundError if it is absent, InputError if it is damaged."""
    from safetensors.numpy import load

    path = chunk_path(folder, indices)
    try:
        data = typed.read_whole(path)
    except IsADirectoryError as error:
        raise InputError(f"chunk {str(path)!r} is a folder: delete it and run the evaluation again") from error
    try:
        arrays = load(data)
        facts = typed.parse_json(typed.tensors_metadata(data).get("ddpm", "").encode(), ChunkFacts)
        whole = facts["sha256"] == content_sha256(arrays)
        whole = whole and (facts["first"], facts["stop"]) == (indices.start, indices.stop)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"chunk {str(path)!r} is damaged ({error}): run the evaluation again") from error
    if not whole:
        raise InputError(f"chunk {str(path)!r} is damaged (its content has another sha256): run the evaluation again")
    return arrays, cast(dict[str, Any], facts)


def load_chunks(
    folder: Location, chunks: Iterable[range]
) -> Iterator[tuple[range, dict[str, "Tensor"], dict[str, Any]]]:
    """(indices, tensors, facts) of each chunk in order, of which AHEAD are read in advance. Raises what `load_chunk` does."""
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="chunks") as pool:
        waiting: deque[tuple[range, Future[tuple[dict[str, Tensor], dict[str, Any]]]]] = deque()
        for indices in chunks:
            waiting.append((indices, pool.submit(load_chunk, folder, indices)))
            if len(waiting) > AHEAD:
                first, read = waiting.popleft()
                yield first, *read.result()
        for last, read in waiting:
            yield last, *read.result()


def content_sha256(tensors: "Mapping[str, Tensor] | Mapping[str, np.ndarray]") -> str:
    """Of names, types, shapes and values; the same of tensors on the CPU and of their arrays."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = np.asarray(tensor)
        digest.update(f"{name} torch.{array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
