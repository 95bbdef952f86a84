"""Ray Data: a source of encoded images -> shards of [-1, 1] images.

The unit of work is a shard, a fixed range of the source's keys, so that its bytes do not depend on how many workers
there are or which of them made it. Each is committed by rename; the manifest comes last. Running it again makes what is
missing.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from PIL import Image

from ddpm_core import images
from ddpm_core.commit import MANIFEST, committed_file, remove_leftovers, sha256_file, write_json
from ddpm_core.errors import InputError
from ddpm_core.protocol import fingerprint
from pipelines.cluster import connect
from pipelines.locations import absolute
from pipelines.progress import Progress
from pipelines.shards import FORMAT, ShardedDataset, write_shard
from pipelines.sources import Source, list_keys, open_source

Filter = Literal["lanczos", "bicubic", "box"]
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}
CONTACT_SHEET = "contact_sheet.png"


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Which images to read, what to make of them, and where to put them."""

    source: str
    """An LMDB folder as LSUN publishes it, or a folder of images."""
    output: str
    """The folder of shards to make."""
    image_size: int
    """Height and width after the centre crop and the resize."""
    channels: Literal[1, 3] = 3
    """3 for RGB, 1 for grey."""
    filter: Filter = "lanczos"
    """The resize's filter; Lanczos is that of StyleGAN's LSUN recipe."""
    name: str | None = None
    """What the data set is called; the source's name by default."""
    images_per_shard: int = 1024
    """How many of the source's keys a file covers."""
    max_skipped: float = 0.01
    """Stop when more than this share of the images cannot be decoded."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise InputError(f"--image-size is {self.image_size}: give a positive number of pixels")
        if self.images_per_shard < 1:
            raise InputError(f"--images-per-shard is {self.images_per_shard}: give a positive number")
        if not 0.0 <= self.max_skipped <= 1.0:
            raise InputError(f"--max-skipped is {self.max_skipped}: give a share from 0 to 1")


def transform(encoded: bytes, config: PreprocessConfig) -> np.ndarray:
    """Decode, crop the largest centred square, resize: uint8 [size, size, channels]."""
    with Image.open(io.BytesIO(encoded)) as image:
        decoded = image.convert("RGB" if config.channels == 3 else "L")
    side = min(decoded.size)
    left, top = (decoded.width - side) // 2, (decoded.height - side) // 2
    size = (config.image_size, config.image_size)
    # Two steps: resize(box=...) would let the filter look at pixels outside the crop.
    resized = decoded.crop((left, top, left + side, top + side)).resize(size, FILTERS[config.filter])
    return np.asarray(resized, np.uint8).reshape(*size, config.channels)


def make_shard(number: int, keys: Sequence[str], source: Source, config: PreprocessConfig, output: Path) -> None:
    """Write shard `number` and, after it, its record: counts, hashes, exact pixel sums, skipped keys."""
    kept: list[str] = []
    pixels: list[np.ndarray] = []
    skipped: list[dict[str, str]] = []
    for key, encoded in source.read(keys):
        try:
            pixels.append(transform(encoded, config))
            kept.append(key)
        except Exception as error:  # Pillow's decoders raise many kinds; whichever it is, it is recorded
            skipped.append({"key": key, "reason": f"{type(error).__name__}: {error}"})
    shape = (config.image_size, config.image_size, config.channels)
    stacked = np.stack(pixels) if pixels else np.empty((0, *shape), np.uint8)
    path = output / shard_file(number)
    with committed_file(path) as temporary:
        write_shard(temporary, kept, stacked, shape)
    content = hashlib.sha256("\n".join(kept).encode())
    content.update(stacked.tobytes())
    wide = stacked.astype(np.int64)
    record = {
        "file": path.name,
        "images": len(kept),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "content_sha256": content.hexdigest(),
        "sum": wide.sum((0, 1, 2)).tolist(),
        "sum_of_squares": (wide**2).sum((0, 1, 2)).tolist(),
        "skipped": skipped,
    }
    write_json(output / record_file(number), record)


def shard_file(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def record_file(number: int) -> str:
    return f"shard-{number:05d}.json"


def finished_record(output: Path, number: int) -> dict[str, Any] | None:
    """The record of a shard whose file is there with the size it should have."""
    try:
        record = json.loads((output / record_file(number)).read_text())
        whole = (output / record["file"]).stat().st_size == record["bytes"]
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None


def preprocess(config: PreprocessConfig, say: Callable[[str], None] = lambda line: None) -> ShardedDataset:
    """Make the data set, or finish it, or find it done. `say` gets progress lines.

    InputError for a source without images, an output that holds another data set, or too many broken images.
    """
    source_path = absolute(config.source, option="--source")
    output = absolute(config.output, option="--output")
    source = open_source(source_path)
    keys = list_keys(source, source_path)
    plan = {
        "format": FORMAT,
        "source": str(source_path),
        "keys_sha256": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        "keys": len(keys),
        "image_size": config.image_size,
        "channels": config.channels,
        "filter": config.filter,
        "images_per_shard": config.images_per_shard,
    }
    plan["fingerprint"] = fingerprint({key: plan[key] for key in plan if key != "source"})
    plan_path = output / "plan.json"
    if plan_path.is_file():
        there = json.loads(plan_path.read_text())
        if there.get("fingerprint") != plan["fingerprint"]:
            raise InputError(
                f"output {str(output)!r} holds another data set (from {there.get('source')!r}, size {there.get('image_size')}): "
                "give another folder, or delete that one"
            )
        if (output / MANIFEST).is_file():
            return ShardedDataset.open(output)
    elif output.exists() and any(output.iterdir()):
        raise InputError(f"output {str(output)!r} is a folder with other files in it: give a new or empty one")
    write_json(plan_path, plan)
    remove_leftovers(output)

    ranges = [keys[i : i + config.images_per_shard] for i in range(0, len(keys), config.images_per_shard)]
    pending = [number for number in range(len(ranges)) if finished_record(output, number) is None]
    if pending:
        connect()
        progress = Progress("preprocess", sum(len(ranges[number]) for number in pending), "images", say)
        tasks = [{"number": number, "keys": ranges[number]} for number in pending]

        def run(task: dict[str, Any]) -> dict[str, int]:
            make_shard(task["number"], list(task["keys"]), source, config, output)
            return {"images": len(task["keys"])}

        # One block a shard: Ray Data schedules, retries and spreads them; the result streams back as a count.
        for row in ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(run).iter_rows():
            progress.advance(row["images"])

    records = [finished_record(output, number) for number in range(len(ranges))]
    write_manifest(output, config, source, plan, [record for record in records if record is not None])
    return ShardedDataset.open(output)


def write_manifest(
    output: Path,
    config: PreprocessConfig,
    source: Source,
    plan: dict[str, Any],
    records: Sequence[dict[str, Any]],
) -> None:
    """The contact sheet and, last, the manifest. InputError where too many images were skipped."""
    skipped = [entry for record in records for entry in record["skipped"]]
    count = sum(record["images"] for record in records)
    if len(skipped) > config.max_skipped * plan["keys"] or count == 0:
        raise InputError(
            f"source {plan['source']!r} has {len(skipped)} broken images among {plan['keys']}, first "
            f"{skipped[0]['key']!r} ({skipped[0]['reason']}): more than --max-skipped {config.max_skipped:g} allows; "
            "repair the source or raise it"
        )
    pixels = count * config.image_size**2
    mean = np.sum([record["sum"] for record in records], axis=0) / pixels
    square = np.sum([record["sum_of_squares"] for record in records], axis=0) / pixels
    scaled_mean = mean / images.SCALE + images.OFFSET
    std = np.sqrt(np.maximum(square - mean**2, 0.0)) / images.SCALE
    shards = [
        {"file": record["file"], "images": record["images"], "content_sha256": record["content_sha256"]}
        for record in records
    ]
    manifest = {
        "format": FORMAT,
        "name": config.name or source.name,
        "images": count,
        "shape": [config.image_size, config.image_size, config.channels],
        "sha256": hashlib.sha256("".join(shard["content_sha256"] for shard in shards).encode()).hexdigest(),
        "source": plan["source"],
        "source_keys_sha256": plan["keys_sha256"],
        "filter": config.filter,
        "mean": scaled_mean.tolist(),
        "std": std.tolist(),
        "second_moment": float(np.mean(std**2 + scaled_mean**2)),
        "skipped": skipped,
        "shards": shards,
        "files": {record["file"]: {"bytes": record["bytes"], "sha256": record["sha256"]} for record in records},
    }
    shown, columns = min(64, count), 8
    manifest["contact_sheet"] = {"tile": [config.image_size] * 2, "columns": columns, "count": shown}
    dataset = ShardedDataset(output, manifest)
    first = torch.from_numpy(dataset.pixels(range(shown)))
    with committed_file(output / CONTACT_SHEET) as temporary:
        temporary.write_bytes(images.encode_png(images.tile(first, columns)))
    manifest["files"][CONTACT_SHEET] = {
        "bytes": (output / CONTACT_SHEET).stat().st_size,
        "sha256": sha256_file(output / CONTACT_SHEET),
    }
    write_json(output / MANIFEST, manifest)
