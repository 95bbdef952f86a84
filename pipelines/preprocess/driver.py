"""Ray Data: a source of images -> shards of [-1, 1] images.

The unit of work is a shard, a fixed range of the source's items, so that its bytes do not depend on how many workers
there are or which of them made it. Each is committed by rename; the manifest comes last. Running it again makes what is
missing.
"""

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray.data

from ddpm_core.commit import MANIFEST, remove_leftovers
from ddpm_core.errors import InputError
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.manifest import write_manifest
from pipelines.preprocess.plan import PLAN, check_same, earlier_plan, make_plan
from pipelines.preprocess.sources.open import Item, Source, list_items, open_source, source_facts
from pipelines.preprocess.worker import finished_record, make_shard, shard_file
from pipelines.runtime.cluster import connect
from pipelines.runtime.locations import STORAGE_ERRORS, Location, commit_json, forget_listings, location
from pipelines.runtime.progress import Progress, Say
from pipelines.shards.dataset import ShardedDataset

EXPECTED: tuple[type[Exception], ...] = (*STORAGE_ERRORS, InputError)  # what a worker tells in a sentence
FAILURES = ("undecodable", "too small")  # the kinds of skips that --max-skipped bounds


def preprocess(config: PreprocessConfig, say: Say = lambda line: None) -> ShardedDataset:
    """Make the data set, or finish it, or find it done. `say` gets progress lines.

    Raises InputError for a source without images, an output that holds another data set or cannot be written to, an image
    that the policy refuses, or too many broken ones.
    """
    place = location(config.source, option="--source")
    output = location(config.output, option="--output")
    earlier = earlier_plan(output)
    facts = None
    if earlier is not None:
        facts = source_facts(place, config.split)
        check_same(earlier, make_plan(config, facts), output)
        if (output / MANIFEST).is_file():
            return ShardedDataset.open(output)
    scratch = output / "unpacked" if isinstance(output, Path) else None
    source = open_source(place, split=config.split, scratch=scratch, say=say)
    items = list_items(source, place)
    plan = make_plan(config, facts or source.facts(), items)
    if earlier is not None:
        check_same(earlier, plan, output)
    commit_json(output / PLAN, plan)
    clear(output)
    maker = ShardMaker(config, source, items, output)
    maker.run(say)
    maker.resolve_duplicates(say)
    clear(output)
    write_manifest(output, config, source, plan, maker.records)
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    return ShardedDataset.open(output)


def clear(output: Location) -> None:
    """Remove what killed workers left half-written; an object store shows nothing of the kind."""
    if isinstance(output, Path):
        for folder in (output, output / "shards", output / "records"):
            remove_leftovers(folder)


class ShardMaker:
    """The shards of one plan: which are there, which are to be made, and what their records say."""

    def __init__(self, config: PreprocessConfig, source: Source, items: Sequence[Item], output: Location) -> None:
        self.config, self.source, self.items, self.output = config, source, items, output
        step = config.images_per_shard
        self.ranges = [range(start, min(start + step, len(items))) for start in range(0, len(items), step)]
        forget_listings(output)
        with ThreadPoolExecutor(16) as pool:  # for an object store, where each answer takes its time
            self.made = list(pool.map(lambda number: finished_record(output, number), range(len(self.ranges))))

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of all shards, once all are made."""
        return [record for record in self.made if record is not None]

    def run(self, say: Say, duplicate_of: Mapping[str, str] | None = None) -> None:
        """Make what is missing and, where duplicates are named, the shards that hold them anew."""
        self.check()
        if duplicate_of is None:
            pending = [number for number, record in enumerate(self.made) if record is None]
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
                    f"{shard_file(row['number'])} of {str(output)!r} could not be made ({row['error']}): fix that and run the "
                    f"same command again, {len(self.records)} of {len(self.ranges)} shards are there"
                )
            self.made[row["number"]] = json.loads(row["record"])
            progress.advance(len(self.ranges[row["number"]]))
            self.check()

    def _task(self, number: int, duplicate_of: Mapping[str, str]) -> dict[str, Any]:
        items = [self.items[index] for index in self.ranges[number]]
        repeated = {item.key: duplicate_of[item.key] for item in items if item.key in duplicate_of}
        return {"number": number, "items": pickle.dumps((items, repeated))}

    def check(self) -> None:
        """Raises InputError as soon as more was skipped than the policies allow."""
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

    def resolve_duplicates(self, say: Say) -> None:
        """Leave out images that came twice, or refuse them, as the policy says."""
        repeated = self.repeated_images()
        if not repeated:
            return
        if self.config.duplicates == "fail":
            key, first = next(iter(repeated.items()))
            raise InputError(
                f"source {self.config.source!r} holds {len(repeated)} images twice, first {key!r}, which has the pixels of "
                f"{first!r}: remove them, or give --duplicates skip or keep"
            )
        self.run(say, repeated)

    def repeated_images(self) -> dict[str, str]:
        """The keys of images whose pixels an image before them has, with that one's key. Empty if they are kept."""
        if self.config.duplicates == "keep":
            return {}
        first: dict[bytes, str] = {}
        repeated = {}
        for record in self.records:
            for key, digest in ShardedDataset.digests(self.output / record["file"]):
                if first.setdefault(digest, key) != key:
                    repeated[key] = first[digest]
        return repeated
