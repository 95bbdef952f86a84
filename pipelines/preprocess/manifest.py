"""What is written last: the contact sheet, and the manifest, whose presence means that the data set is whole."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ddpm_core.commit import MANIFEST, sha256_file
from ddpm_core.pixel_range import OFFSET, SCALE
from ddpm_core.protocol import fingerprint
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.sources.items import Source
from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.format import FORMAT, dataset_sha256
from pipelines.storage.locations import Location, commit_json, committed

CONTACT_SHEET = "contact_sheet.png"
SHEET_ROWS = SHEET_COLUMNS = 8
LARGEST_TILE = 64  # pixels; larger images are shown smaller on the sheet


def write_manifest(
    output: Location,
    config: PreprocessConfig,
    source: Source,
    plan: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    source_images: int,
) -> None:
    """Write the contact sheet and, last, the manifest. records: of all shards, in order. source_images: how many the source
    holds, of which --images may have chosen some."""
    profiles: Counter[str] = Counter()
    for record in records:
        profiles.update(record.get("colour_profiles", {}))  # a record of an earlier version has none
    manifest = {
        "format": FORMAT,
        "name": config.name or source.name,
        "images": sum(record["images"] for record in records),
        "shape": list(config.shape),
        "storage": config.storage,
        "sha256": dataset_sha256([record["content_sha256"] for record in records]),
        "source": plan["source"],
        "source_facts": plan["source_facts"],
        "source_fingerprint": fingerprint({key: plan[key] for key in ("source_facts", "items", "items_sha256")}),
        "source_images": source_images,
        **({"chosen": plan["chosen"]} if "chosen" in plan else {}),
        "source_others": source.others(),
        "filter": config.filter,
        **moments(records, config.image_size**2),
        "skipped": [entry for record in records for entry in record["skipped"]],
        "colour_profiles": dict(sorted(profiles.items())),  # how many images were converted to sRGB by each
        "shards": [{key: record[key] for key in ("file", "images", "content_sha256")} for record in records],
        "files": {record["file"]: {"bytes": record["bytes"], "sha256": record["sha256"]} for record in records},
    }
    with committed(output / CONTACT_SHEET) as temporary:
        picture, manifest["contact_sheet"] = contact_sheet(ShardedDataset(output, manifest))
        temporary.write_bytes(picture)
        manifest["files"][CONTACT_SHEET] = {"bytes": len(picture), "sha256": sha256_file(temporary)}
    commit_json(output / MANIFEST, manifest)


def moments(records: Sequence[Mapping[str, Any]], pixels_per_image: int) -> dict[str, Any]:
    """Mean and standard deviation of each channel, and E[x_0^2] over all values, of the images in [-1, 1].

    The last is what L_T depends on (paper, Eq. 5).
    """
    pixels = sum(record["images"] for record in records) * pixels_per_image
    # in pixels of 0..255, per channel; the map to [-1, 1] is x / SCALE + OFFSET
    mean = np.sum([record["sum"] for record in records], axis=0) / pixels
    square = np.sum([record["sum_of_squares"] for record in records], axis=0) / pixels
    scaled_mean = mean / SCALE + OFFSET
    std = np.sqrt(np.maximum(square - mean**2, 0.0)) / SCALE
    return {
        "mean": scaled_mean.tolist(),
        "std": std.tolist(),
        "second_moment": float(np.mean(std**2 + scaled_mean**2)),  # E[x^2] = Var x + (E x)^2
    }


def contact_sheet(dataset: ShardedDataset) -> tuple[bytes, dict[str, Any]]:
    """(PNG, layout) of images from all parts of the data set: a row from each of eight shards, more of fewer shards."""
    nonempty = [shard for shard, facts in enumerate(dataset.manifest["shards"]) if facts["images"]]
    chosen = [nonempty[i] for i in sorted({round(x) for x in np.linspace(0, len(nonempty) - 1, SHEET_ROWS)})]
    places = SHEET_ROWS * SHEET_COLUMNS
    per_shard = -(-places // len(chosen))
    indices = [index for shard in chosen for index in dataset.shard_range(shard)[:per_shard]][:places]
    pixels = dataset.pixels(indices)
    side = min(dataset.shape[0], LARGEST_TILE)
    if side < dataset.shape[0]:
        tiles = [
            np.asarray(Image.fromarray(image.squeeze()).resize((side, side), Image.Resampling.LANCZOS))
            for image in pixels
        ]
        pixels = np.stack(tiles).reshape(len(indices), side, side, -1)
    from ddpm_core.png import encode_png, tile  # here: a command that makes nothing does without

    picture = encode_png(tile(pixels, SHEET_COLUMNS))
    return picture, {"tile": [side, side], "columns": SHEET_COLUMNS, "count": len(indices)}
