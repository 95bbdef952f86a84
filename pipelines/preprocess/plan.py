"""The plan of a data set: what decides its bytes, written before its first shard, so that an output is finished as it began."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.errors import InputError
from ddpm_core.protocol import fingerprint
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.sources.items import Item
from pipelines.preprocess.sources.names import key_of
from pipelines.preprocess.transform import MAX_PIXELS
from pipelines.shards.format import FORMAT
from pipelines.storage.lease import FILES
from pipelines.storage.locations import Location, location

PLAN = "plan.json"


class EarlierPlan(TypedDict):
    """What is read of an earlier plan."""

    fingerprint: str
    items_sha256: str
    source: NotRequired[str]
    image_size: NotRequired[int]


def earlier_plan(output: Location) -> dict[str, Any] | None:
    """The plan that an output was begun with, None if nothing was begun. Raises InputError if the folder is another's."""
    try:
        advice = "give another folder, or delete that one"
        return cast(dict[str, Any], typed.read_json(output / PLAN, EarlierPlan, what="plan", advice=advice))
    except (FileNotFoundError, NotADirectoryError):
        if output.is_file():
            raise InputError(f"output {str(output)!r} is a file: give the path of a folder") from None
        if output.exists() and any(path.name not in {"unpacked", *FILES} for path in output.iterdir()):
            raise InputError(
                f"output {str(output)!r} is a folder with other files in it: give a new or empty one"
            ) from None
        return None


def make_plan(
    config: PreprocessConfig, facts: Mapping[str, Any], items: Sequence[Item] | None = None
) -> dict[str, Any]:
    """What decides the bytes of the shards, with a fingerprint; an output is finished only under an equal plan.

    The list of items, which takes longer to have, has a hash of its own. facts: the source's.
    """
    choices = {
        "format": FORMAT,
        "source_facts": facts,
        **{name: getattr(config, name) for name in ("image_size", "channels", "filter", "storage", "images_per_shard")},
        # Of the policies only what changes a shard's bytes; an output may go on under a larger --max-skipped.
        "enlarge": config.too_small == "enlarge",
        "skip_duplicates": config.duplicates == "skip",
    }
    source = str(location(config.source, option="--source"))
    if config.images is not None:
        choices["chosen"] = {"images": config.images, "seed": config.images_seed}
    if config.max_pixels != MAX_PIXELS:  # data sets that were begun before this choice keep their fingerprint
        choices["max_pixels"] = config.max_pixels
    listed = {} if items is None else {"items": len(items), "items_sha256": items_sha256(items)}
    return {**choices, **listed, "source": key_of(source), "fingerprint": fingerprint(choices)}


def choose_items(items: Sequence[Item], config: PreprocessConfig) -> Sequence[Item]:
    """Those of a source's items that --images asks for, in their order. Raises InputError if there are fewer.

    At random, whether an item is chosen depends on the seed and the keys alone, not on their order.
    """
    count, seed = config.images, config.images_seed
    if count is None:
        return items
    if count > len(items):
        raise InputError(f"--images is {count:,}: source {config.source!r} holds {len(items):,}, so give at most that")
    if seed is None:
        return items[:count]
    drawn = [hashlib.sha256(f"{seed}\t{item.key}".encode()).digest() for item in items]
    return [items[i] for i in sorted(sorted(range(len(items)), key=drawn.__getitem__)[:count])]


def items_sha256(items: Sequence[Item]) -> str:
    """The sha256 of the items' keys and sizes, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.key}\t{item.size}\n".encode())
    return digest.hexdigest()


def check_same(earlier: Mapping[str, Any], plan: Mapping[str, Any], output: Location) -> None:
    """Raises InputError if an output was begun with another plan. plan: with or without the items."""
    if earlier["fingerprint"] != plan["fingerprint"]:
        raise InputError(
            f"output {str(output)!r} holds another data set (from {earlier.get('source')!r}, size "
            f"{earlier.get('image_size')}): give another folder, or delete that one"
        )
    if "items_sha256" in plan and earlier["items_sha256"] != plan["items_sha256"]:
        raise InputError(
            f"source {plan['source']!r} has other images than when {str(output)!r} was begun: "
            "give another folder, or delete that one"
        )
