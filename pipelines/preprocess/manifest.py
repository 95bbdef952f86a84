"""What is written last: the contact sheet, and the manifest, whose presence means that the data set is whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddpm_core import images
from ddpm_core.commit import MANIFEST, sha256_file
from ddpm_core.pixel_range import OFFSET, SCALE
from ddpm_core.protocol import fingerprint
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.sources.items import Source
from pipelines.runtime.locations import Location, commit_json, committed
from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.format import FORMAT, dataset_sha256

CONTACT_SHEET = "contact_sheet.png"
SHOWN = 64  # images on the contact sheet, in rows of 8
LARGEST_TILE = 64  # pixels; larger images are shown smaller there


def write_manifest(
    output: Location,
    config: PreprocessConfig,
    source: Source,
    plan: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """The contact sheet and, last, the manifest."""
    count = sum(record["images"] for record in records)
    pixels = count * config.image_size**2
    mean = np.sum([record["sum"] for record in records], axis=0) / pixels
    square = np.sum([record["sum_of_squares"] for record in records], axis=0) / pixels
    scaled_mean = mean / SCALE + OFFSET
    std = np.sqrt(np.maximum(square - mean**2, 0.0)) / SCALE
    manifest = {
        "format": FORMAT,
        "name": config.name or source.name,
        "images": count,
        "shape": list(config.shape),
        "storage": config.storage,
        "sha256": dataset_sha256([record["content_sha256"] for record in records]),
        "source": plan["source"],
        "source_facts": plan["source_facts"],
        "source_fingerprint": fingerprint({key: plan[key] for key in ("source_facts", "items", "items_sha256")}),
        "source_images": plan["items"],
        "filter": config.filter,
        "mean": scaled_mean.tolist(),
        "std": std.tolist(),
        "second_moment": float(np.mean(std**2 + scaled_mean**2)),
        "skipped": [entry for record in records for entry in record["skipped"]],
        "shards": [{key: record[key] for key in ("file", "images", "content_sha256")} for record in records],
        "files": {record["file"]: {"bytes": record["bytes"], "sha256": record["sha256"]} for record in records},
    }
    with committed(output / CONTACT_SHEET) as temporary:
        picture, manifest["contact_sheet"] = contact_sheet(ShardedDataset(output, manifest))
        temporary.write_bytes(picture)
        manifest["files"][CONTACT_SHEET] = {"bytes": len(picture), "sha256": sha256_file(temporary)}
    commit_json(output / MANIFEST, manifest)


def contact_sheet(dataset: ShardedDataset) -> tuple[bytes, dict[str, Any]]:
    """A PNG with images from all parts of the data set, a row from each of eight shards, and its layout."""
    filled = [shard for shard, facts in enumerate(dataset.manifest["shards"]) if facts["images"]]
    chosen = [filled[i] for i in sorted({round(x) for x in np.linspace(0, len(filled) - 1, 8)})]
    each = -(-SHOWN // len(chosen))
    indices = [index for shard in chosen for index in dataset.shard_range(shard)[:each]][:SHOWN]
    pixels = dataset.pixels(indices)
    side = min(dataset.shape[0], LARGEST_TILE)
    if side < dataset.shape[0]:
        small = [
            np.asarray(Image.fromarray(p.squeeze()).resize((side, side), Image.Resampling.LANCZOS)) for p in pixels
        ]
        pixels = np.stack(small).reshape(len(indices), side, side, -1)
    picture = images.encode_png(images.tile(torch.from_numpy(pixels), 8))
    return picture, {"tile": [side, side], "columns": 8, "count": len(indices)}
