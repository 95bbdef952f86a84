"""What a preprocessing worker does: a range of a source's items -> one shard and its record. Imports no torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_core.commit import sha256_file
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.sources.open import Item, Source
from pipelines.preprocess.transform import TooSmallError, transform
from pipelines.runtime.locations import Location, commit_json, committed
from pipelines.shards.format import ContentHash, ShardWriter


def shard_file(number: int) -> str:
    return f"shards/shard-{number:05d}.parquet"


def record_file(number: int) -> str:
    return f"records/shard-{number:05d}.json"


def make_shard(
    number: int,
    items: Sequence[Item],
    source: Source,
    config: PreprocessConfig,
    output: Location,
    duplicate_of: Mapping[str, str],
) -> dict[str, Any]:
    """Write shard `number` and, after it, its record: counts, hashes, exact pixel sums, skipped keys. Returns the record.

    `duplicate_of`: keys to leave out, with the key of the image that each repeats.
    """
    kept = 0
    sums, squares = np.zeros((2, config.channels), np.int64)
    content = ContentHash()
    skipped: list[dict[str, str]] = []
    path = output / shard_file(number)
    with committed(path) as temporary:
        with ShardWriter(temporary, config.shape, config.storage) as writer:
            for key, image in decoded(items, source, config, duplicate_of, skipped):
                content.update(key, writer.append(key, image))
                # Integers all the way, so that no order of adding matters; down the columns first, which is ten times faster
                # and stays below 2^32 up to 66,000 rows.
                rows = image.reshape(config.image_size, -1)
                sums += rows.sum(0, dtype=np.uint32).reshape(-1, config.channels).sum(0, dtype=np.int64)
                columns = np.square(rows, dtype=np.uint16).sum(0, dtype=np.uint32)
                squares += columns.reshape(-1, config.channels).sum(0, dtype=np.int64)
                kept += 1
        facts = {"bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}
    record = {
        "file": shard_file(number),
        "images": kept,
        **facts,
        "content_sha256": content.hexdigest(),
        "sum": sums.tolist(),
        "sum_of_squares": squares.tolist(),
        "skipped": skipped,
    }
    commit_json(output / record_file(number), record)
    return record


def decoded(
    items: Sequence[Item],
    source: Source,
    config: PreprocessConfig,
    duplicate_of: Mapping[str, str],
    skipped: list[dict[str, str]],
) -> Iterator[tuple[str, np.ndarray]]:
    """The images that the data set takes, as uint8 [*config.shape]; the others are added to `skipped`."""

    def skip(key: str, kind: str, reason: str) -> None:
        skipped.append({"key": key, "kind": kind, "reason": reason})

    for key, value in source.read(items):
        if key in duplicate_of:
            skip(key, "duplicate", f"same pixels as {duplicate_of[key]!r}")
            continue
        try:
            if isinstance(value, Exception):
                raise value
            image = transform(
                value,
                image_size=config.image_size,
                channels=config.channels,
                filter=config.filter,
                enlarge=config.too_small == "enlarge",
            )
        except TooSmallError as error:
            skip(key, "too small", str(error))
        except Exception as error:  # Pillow's decoders raise many kinds; whichever it is, it is recorded
            skip(key, "undecodable", f"{type(error).__name__}: {error}")
        else:
            yield key, image


def finished_record(output: Location, number: int) -> dict[str, Any] | None:
    """The record of a shard whose file is there with the size it should have."""
    try:
        record = json.loads((output / record_file(number)).read_text())
        whole = (output / record["file"]).stat().st_size == record["bytes"]
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None
