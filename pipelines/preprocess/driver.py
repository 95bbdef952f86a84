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

from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.manifest import write_manifest
from pipelines.preprocess.plan import PLAN, check_same, choose_items, earlier_plan, make_plan
from pipelines.preprocess.sources.items import Item, Source
from pipelines.preprocess.sources.names import BYTE
from pipelines.preprocess.sources.open import describe_others, list_items, open_source, source_facts
from pipelines.preprocess.worker import finished_record, make_shard, record_file, shard_file
from pipelines.runtime.cluster import connect
from pipelines.runtime.progress import Progress, Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import chunk_ranges
from pipelines.storage.lease import sole_writer
from pipelines.storage.locations import STORAGE_ERRORS, Location, commit_json, delete, location, remove_leftovers

EXPECTED_ERRORS: tuple[type[Exception], ...] = (*STORAGE_ERRORS, InputError)  # a full disk, a lost source
FAILURES = ("undecodable", "too small")  # the kinds of skips that --max-skipped limits


def preprocess(config: PreprocessConfig, say: Say = lambda line: None) -> ShardedDataset:
    """Make the data set, or finish it, or open it if it is done. say: gets progress lines.

    Raises InputError for a source without images, an output that holds another data set or cannot be written to, an image
    that a policy refuses, or too many broken ones.
    """
    source_path, output = location(config.source, option="--source"), location(config.output, option="--output")
    # What lies in a source may have any name; but Ray takes no such command, and Arrow writes to no such path.
    for option, path, advice in (
        ("--source", config.source, "rename it, or give a link to it"),
        ("--output", str(output), "give another"),
    ):
        if BYTE.search(path):
            raise InputError(f"{option} is {path!r}, a path that is not UTF-8: {advice}")
    earlier = earlier_plan(output)
    facts = None
    if earlier is not None:
        # Before the source is unpacked and listed, which takes long and is of no use for another data set or a done one.
        facts = source_facts(source_path, config.split)
        check_same(earlier, make_plan(config, facts), output)
        if (output / MANIFEST).is_file():
            return ShardedDataset.open(output)
    with sole_writer(output, "output", say):
        return make_dataset(config, source_path, output, earlier_plan(output), facts, say)


def make_dataset(
    config: PreprocessConfig,
    source_path: Location,
    output: Location,
    earlier: Mapping[str, Any] | None,
    facts: Mapping[str, Any] | None,
    say: Say,
) -> ShardedDataset:
    """Make the data set, or finish it, as the only one who writes to its folder. earlier: the plan that it was begun with. facts:
    the source's, if they are known."""
    scratch = output / "unpacked" if isinstance(output, Path) else None
    try:
        source = open_source(source_path, split=config.split, scratch=scratch, say=say)
        all_items = list_items(source, source_path, config.max_pixels)
        items = choose_items(all_items, config)
        plan = make_plan(config, facts or source.facts(), items)
        if earlier is not None:
            check_same(earlier, plan, output)
    except InputError:
        if scratch is not None:  # a refused source leaves nothing
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    others = source.others()
    if others:
        say(f"preprocess: {len(all_items):,} images in the source, and {describe_others(others)}, which are not read")
    commit_json(output / PLAN, plan)
    remove_temporary_files(output)
    maker = ShardMaker(config, source, items, output)
    try:
        maker.make_missing(say)
        maker.resolve_duplicates(say)
    except InputError:
        if earlier is None and not any(record["images"] for record in maker.finished):
            discard(output, len(maker.ranges))  # with an image in it, another policy goes on from what is made
        raise
    remove_temporary_files(output)
    write_manifest(output, config, source, plan, maker.finished, len(all_items))
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    return ShardedDataset.open(output)


def remove_temporary_files(output: Location) -> None:
    """Remove what killed workers left half-written."""
    for folder in (output, output / "shards", output / "records"):
        remove_leftovers(folder)


def discard(output: Location, shards: int) -> None:
    """Remove all that was made for a source that gave no image."""
    names = [PLAN, *(name(number) for number in range(shards) for name in (shard_file, record_file))]
    for name in names:
        delete(output / name)
    if isinstance(output, Path):
        for folder in ("shards", "records", "unpacked"):
            shutil.rmtree(output / folder, ignore_errors=True)


class ShardMaker:
    """Makes the shards of one plan. records: of each shard, None if it is not made yet."""

    def __init__(self, config: PreprocessConfig, source: Source, items: Sequence[Item], output: Location) -> None:
        self.config, self.source, self.items, self.output = config, source, items, output
        self.ranges = chunk_ranges(len(items), config.images_per_shard)
        with ThreadPoolExecutor(16) as pool:  # for an object store, each of whose answers takes long
            self.records = list(
                pool.map(lambda number: finished_record(output, number, config.channels), range(len(self.ranges)))
            )

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The records of the shards that are made, in order."""
        return [record for record in self.records if record is not None]

    def make_missing(self, say: Say) -> None:
        """Make the shards that have no record. Raises InputError if one cannot be made, or a policy refuses an image."""
        self.check_skipped()
        pending = [number for number, record in enumerate(self.records) if record is None]
        done = len(self.items) - self._count_items(pending)
        self._make(pending, {}, Progress("preprocess", len(self.items), "images", say, done=done))

    def resolve_duplicates(self, say: Say) -> None:
        """Leave out or refuse images that repeat another's pixels, as the policy says. Raises InputError if it refuses."""
        duplicate_of = self.find_duplicates()
        if not duplicate_of:
            return
        if self.config.duplicates == "fail":
            key, first = next(iter(duplicate_of.items()))
            raise InputError(
                f"source {self.config.source!r} holds {len(duplicate_of)} images twice, first {key!r}, which has the pixels "
                f"of {first!r}: remove them, or give --duplicates skip or keep"
            )
        shard_of = {item.key: index // self.config.images_per_shard for index, item in enumerate(self.items)}
        pending = sorted({shard_of[key] for key in duplicate_of})
        self._make(pending, duplicate_of, Progress("preprocess", self._count_items(pending), "images", say))

    def find_duplicates(self) -> dict[str, str]:
        """Key -> the key of an earlier image with the same pixels. Empty if the policy keeps duplicates."""
        if self.config.duplicates == "keep":
            return {}
        first: dict[bytes, str] = {}
        duplicate_of = {}
        for record in self.finished:
            for key, digest in ShardedDataset.digests(self.output / record["file"]):
                if first.setdefault(digest, key) != key:
                    duplicate_of[key] = first[digest]
        return duplicate_of

    def check_skipped(self) -> None:
        """Raises InputError if more images are skipped already than the policies allow."""
        config = self.config
        skipped = [entry for record in self.finished for entry in record["skipped"]]
        for kind, policy in (("undecodable", config.undecodable), ("too small", config.too_small)):
            first = next((entry for entry in skipped if entry["kind"] == kind), None)
            if policy == "fail" and first is not None:
                option = kind.replace(" ", "-")
                raise InputError(
                    f"source {config.source!r} holds the image {first['key']!r} ({first['reason']}), and --{option} is 'fail': "
                    f"repair or remove it, or give --{option} skip"
                )
        broken = [entry for entry in skipped if entry["kind"] in FAILURES]
        all_broken = len(broken) == len(self.items)  # --max-skipped 1 allows that, but there is no data set of nothing
        if len(broken) > config.max_skipped * len(self.items) or all_broken:
            raise InputError(
                f"source {config.source!r} has {len(broken):,} broken or too small images among {len(self.items):,}, first "
                f"{broken[0]['key']!r} ({broken[0]['reason']}): more than --max-skipped {config.max_skipped:g} allows; "
                "repair the source, choose another --image-size or raise it"
            )

    def _make(self, pending: Sequence[int], duplicate_of: Mapping[str, str], progress: Progress) -> None:
        """Have Ray Data's workers make shards by number, without the images that `duplicate_of` names."""
        if not pending:
            return
        connect()
        import ray.data  # here: with its pandas it takes longer than a command that has nothing to make

        config, source, output = self.config, self.source, self.output  # the workers get these, not all of `self`

        def make(task: dict[str, Any]) -> dict[str, Any]:
            items, repeated = pickle.loads(task["items"])
            try:
                record = make_shard(task["number"], items, source, config, output, repeated)
            except EXPECTED_ERRORS as error:  # as a value: an exception would come back as a remote traceback
                return {"number": task["number"], "error": f"{type(error).__name__}: {error}", "record": ""}
            return {"number": task["number"], "error": "", "record": json.dumps(record)}

        # One block a shard: Ray Data schedules, retries and spreads blocks. Records come back as they are made.
        # Arrow has no type for items, so they travel as bytes.
        tasks = []
        for number in pending:
            items = [self.items[index] for index in self.ranges[number]]
            repeated = {item.key: duplicate_of[item.key] for item in items if item.key in duplicate_of}
            tasks.append({"number": number, "items": pickle.dumps((items, repeated))})
        for row in ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(make).iter_rows():
            if row["error"]:
                raise InputError(
                    f"{shard_file(row['number'])} of {str(output)!r} could not be made ({row['error']}): fix that and run the "
                    f"same command again, {len(self.finished)} of {len(self.ranges)} shards are there"
                )
            self.records[row["number"]] = json.loads(row["record"])
            progress.advance(len(self.ranges[row["number"]]))
            self.check_skipped()

    def _count_items(self, numbers: Sequence[int]) -> int:
        return sum(len(self.ranges[number]) for number in numbers)
