"""Ray Data: a source of images -> shards of [-1, 1] images.

The unit of work is a shard, a fixed range of the source's items, so that its bytes do not depend on how many workers
there are or which of them made it. Each is committed by rename; the manifest comes last. Running it again makes what is
missing.
"""

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from ddpm_core import images
from ddpm_core.commit import MANIFEST, remove_leftovers, sha256_file
from ddpm_core.errors import InputError
from ddpm_core.pixel_range import OFFSET, SCALE
from ddpm_core.protocol import fingerprint
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.sources.open import Item, Source, list_items, open_source, source_facts
from pipelines.preprocess.worker import finished_record, make_shard, shard_file
from pipelines.runtime.cluster import connect
from pipelines.runtime.locations import STORAGE_ERRORS, Location, commit_json, committed, forget_listings, location
from pipelines.runtime.progress import Progress, Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.format import FORMAT, dataset_sha256

__all__ = ["PreprocessConfig", "preprocess"]

CONTACT_SHEET = "contact_sheet.png"
PLAN = "plan.json"
SHOWN = 64  # images on the contact sheet, in rows of 8
LARGEST_TILE = 64  # pixels; larger images are shown smaller there
EXPECTED: tuple[type[Exception], ...] = (*STORAGE_ERRORS, InputError)  # what a worker tells in a sentence
FAILURES = ("undecodable", "too small")  # the kinds of skips that --max-skipped bounds


def preprocess(config: PreprocessConfig, say: Say = lambda line: None) -> ShardedDataset:
    """Make the data set, or finish it, or find it done. `say` gets progress lines.

    InputError for a source without images, an output that holds another data set or cannot be written to, an image that
    the policy refuses, or too many broken ones.
    """
    source_place = location(config.source, option="--source")
    output = location(config.output, option="--output")
    there = earlier_plan(output)
    facts = None
    if there is not None:
        facts = source_facts(source_place, config.split)
        plan = make_plan(config, facts)
        if there["fingerprint"] != plan["fingerprint"]:
            raise InputError(
                f"output {str(output)!r} holds another data set (from {there.get('source')!r}, size {there.get('image_size')}): "
                "give another folder, or delete that one"
            )
        if (output / MANIFEST).is_file():
            return ShardedDataset.open(output)
    scratch = output / "unpacked" if isinstance(output, Path) else None
    source = open_source(source_place, split=config.split, scratch=scratch, say=say)
    items = list_items(source, source_place)
    plan = make_plan(config, facts or source.facts(), items)
    if there is not None and there["items_sha256"] != plan["items_sha256"]:
        raise InputError(
            f"source {config.source!r} has other images than when {str(output)!r} was begun: "
            "give another folder, or delete that one"
        )
    commit_json(output / PLAN, plan)
    clear(output)
    making = Making(config, source, items, output)
    making.run(say)
    repeated = making.repeated_images()
    if repeated:
        if config.duplicates == "fail":
            key, first = next(iter(repeated.items()))
            raise InputError(
                f"source {config.source!r} holds {len(repeated)} images twice, first {key!r}, which has the pixels of "
                f"{first!r}: remove them, or give --duplicates skip or keep"
            )
        making.run(say, repeated)
    clear(output)
    write_manifest(output, config, source, plan, making.records)
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    return ShardedDataset.open(output)


def clear(output: Location) -> None:
    """Remove what killed workers left half-written; an object store shows nothing of the kind."""
    if isinstance(output, Path):
        for folder in (output, output / "shards", output / "records"):
            remove_leftovers(folder)


def earlier_plan(output: Location) -> dict[str, Any] | None:
    """The plan that an output was begun with, None where nothing was begun. InputError where it is another folder."""
    try:
        plan = json.loads((output / PLAN).read_text())
        return {**plan, "fingerprint": plan["fingerprint"], "items_sha256": plan["items_sha256"]}  # KeyError here
    except FileNotFoundError:
        if output.exists() and any(path.name != "unpacked" for path in output.iterdir()):
            raise InputError(
                f"output {str(output)!r} is a folder with other files in it: give a new or empty one"
            ) from None
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"output {str(output)!r} has a {PLAN} that is damaged or of another version ({error!r}): give another folder, or "
            "delete that one"
        ) from error


def make_plan(
    config: PreprocessConfig, facts: Mapping[str, Any], items: Sequence[Item] | None = None
) -> dict[str, Any]:
    """What decides the bytes of the shards, with a fingerprint; an output goes on only under an equal plan. The list of
    items, which takes longer to have, has a hash of its own."""
    decides = {
        "format": FORMAT,
        "source_facts": facts,
        "image_size": config.image_size,
        "channels": config.channels,
        "filter": config.filter,
        "storage": config.storage,
        "images_per_shard": config.images_per_shard,
        "enlarge": config.too_small == "enlarge",
        "skip_duplicates": config.duplicates == "skip",
    }
    listed = hashlib.sha256()
    for item in items or ():
        listed.update(f"{item.key}\t{item.size}\n".encode())
    source = str(location(config.source, option="--source"))
    of_items = {} if items is None else {"items": len(items), "items_sha256": listed.hexdigest()}
    return {**decides, **of_items, "source": source, "fingerprint": fingerprint(decides)}


class Making:
    """The shards of one plan: which are there, which are to be made, and what their records say."""

    def __init__(self, config: PreprocessConfig, source: Source, items: Sequence[Item], output: Location) -> None:
        self.config, self.source, self.items, self.output = config, source, items, output
        step = config.images_per_shard
        self.ranges = [range(start, min(start + step, len(items))) for start in range(0, len(items), step)]
        forget_listings(output)
        with ThreadPoolExecutor(16) as pool:  # for an object store, where each answer takes its time
            self.found = list(pool.map(lambda number: finished_record(output, number), range(len(self.ranges))))

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of all shards, once all are made."""
        return [record for record in self.found if record is not None]

    def run(self, say: Say, duplicate_of: Mapping[str, str] | None = None) -> None:
        """Make what is missing and, where duplicates are named, the shards that hold them anew."""
        self.check()
        if duplicate_of is None:
            pending = [number for number, record in enumerate(self.found) if record is None]
        else:
            place = {item.key: index // self.config.images_per_shard for index, item in enumerate(self.items)}
            pending = sorted({place[key] for key in duplicate_of})
        if not pending:
            return
        connect()
        config, source, output = self.config, self.source, self.output
        tasks = [self._task(number, duplicate_of or {}) for number in pending]
        done = 0 if duplicate_of else len(self.items) - sum(len(self.ranges[number]) for number in pending)
        total = sum(len(self.ranges[number]) for number in pending) if duplicate_of else len(self.items)
        progress = Progress("preprocess", total, "images", say, done=done)

        def make(task: dict[str, Any]) -> dict[str, Any]:
            items, repeated = pickle.loads(task["items"])
            try:
                record = make_shard(task["number"], items, source, config, output, repeated)
            except EXPECTED as error:  # a full disk, a lost source: a value, not a traceback
                return {"number": task["number"], "error": f"{type(error).__name__}: {error}", "record": ""}
            return {"number": task["number"], "error": "", "record": json.dumps(record)}

        # One block a shard: Ray Data schedules, retries and spreads them; what streams back is a record.
        for row in ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(make).iter_rows():
            if row["error"]:
                raise InputError(
                    f"{shard_file(row['number'])} of {str(output)!r} could not be made ({row['error']}): mend that and run the "
                    f"same command again, {len(self.records)} of {len(self.ranges)} shards are there"
                )
            self.found[row["number"]] = json.loads(row["record"])
            progress.advance(len(self.ranges[row["number"]]))
            self.check()

    def _task(self, number: int, duplicate_of: Mapping[str, str]) -> dict[str, Any]:
        items = [self.items[index] for index in self.ranges[number]]
        repeated = {item.key: duplicate_of[item.key] for item in items if item.key in duplicate_of}
        return {"number": number, "items": pickle.dumps((items, repeated))}

    def check(self) -> None:
        """InputError as soon as what was skipped is more than the policies allow."""
        config = self.config
        skipped = [entry for record in self.records for entry in record["skipped"]]
        for kind, policy in (("undecodable", config.undecodable), ("too small", config.too_small)):
            first = next((entry for entry in skipped if entry["kind"] == kind), None)
            if policy == "fail" and first is not None:
                option = kind.replace(" ", "-")
                raise InputError(
                    f"source {config.source!r} holds the image {first['key']!r} ({first['reason']}), and --{option} is 'fail': "
                    f"repair or remove it, or give --{option} skip"
                )
        broken = [entry for entry in skipped if entry["kind"] in FAILURES]
        everything = len(broken) == len(self.items)
        if len(broken) > config.max_skipped * len(self.items) or everything:
            raise InputError(
                f"source {config.source!r} has {len(broken):,} broken or too small images among {len(self.items):,}, first "
                f"{broken[0]['key']!r} ({broken[0]['reason']}): more than --max-skipped {config.max_skipped:g} allows; "
                "repair the source, choose another --image-size or raise it"
            )

    def repeated_images(self) -> dict[str, str]:
        """The keys of images whose pixels an image before them has, with that one's key. Empty where they are kept."""
        if self.config.duplicates == "keep":
            return {}
        first: dict[bytes, str] = {}
        repeated = {}
        for record in self.records:
            for key, digest in ShardedDataset.digests(self.output / record["file"]):
                if first.setdefault(digest, key) != key:
                    repeated[key] = first[digest]
        return repeated


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
