"""A data set of given pixels without the pipeline that makes real ones: the manifest follows the format's description,
not the code."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ddpm_core.commit import sha256_file
from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.format import PixelStorage, ShardWriter
from pipelines.storage.locations import Location, commit_json, committed


def random_pixels(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_dataset(
    folder: Location, pixels: np.ndarray, per_shard: Sequence[int], storage: PixelStorage = "uint8"
) -> ShardedDataset:
    """Image i gets key i with ten digits; `per_shard` counts add up to all of them."""
    shards, files = [], {}
    first = 0
    for number, count in enumerate(per_shard):
        name = f"shard-{number:05d}.parquet"
        content = hashlib.sha256()
        with committed(folder / name) as temporary:
            with ShardWriter(temporary, pixels.shape[1:], storage) as writer:
                for index in range(first, first + count):
                    key = f"{index:010d}"
                    writer.append(key, pixels[index])
                    content.update(key.encode() + b"\0" + hashlib.sha256(pixels[index].tobytes()).digest())
            files[name] = {"bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}
        shards.append({"file": name, "images": count, "content_sha256": content.hexdigest()})
        first += count
    assert first == len(pixels)
    manifest = {
        "format": 2,
        "name": "synthetic",
        "images": len(pixels),
        "shape": list(pixels.shape[1:]),
        "storage": storage,
        "sha256": hashlib.sha256("".join(str(shard["content_sha256"]) for shard in shards).encode()).hexdigest(),
        "source": "synthetic",
        "source_fingerprint": "",
        "source_images": len(pixels),
        "filter": "lanczos",
        "mean": [0.0] * pixels.shape[-1],
        "std": [1.0] * pixels.shape[-1],
        "second_moment": 1.0,
        "skipped": [],
        "contact_sheet": {"tile": [8, 8], "columns": 8, "count": 0},
        "shards": shards,
        "files": files,
    }
    with committed(folder / "contact_sheet.png") as temporary:
        temporary.write_bytes(b"")
    commit_json(folder / "manifest.json", manifest)
    return ShardedDataset.open(folder)
