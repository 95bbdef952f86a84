"""What a preprocessing worker does: a range of a source's items -> one shard and its record. Imports no torch."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NotRequired, cast

import numpy as np

from ddpm_core import typed
from ddpm_core.commit import FileFacts, sha256_file
from ddpm_core.errors import InputError
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.sources.items import Item, Source, reason_of
from pipelines.preprocess.transform import TooSmallError, transform
from pipelines.shards.format import ContentHash, ShardWriter, Skipped
from pipelines.storage.locations import Location, commit_json, committed


class ShardRecord(FileFacts):
    """What is recorded of a shard. sum, sum_of_squares: of each channel's pixels. colour_profiles: how many images were converted
    by each; records of earlier versions lack it."""

    file: str
    images: typed.ImageCount
    content_sha256: str
    sum: list[int]
    sum_of_squares: list[int]
    skipped: list[Skipped]
    colour_profiles: NotRequired[dict[str, typed.ImageCount]]


def shard_file(number: int) -> str:
    """The path of shard `number` in a data set's folder."""
    return f"shards/shard-{number:05d}.parquet"


def record_file(number: int) -> str:
    """The path of the record of shard `number` in a data set's folder."""
    return f"records/shard-{number:05d}.json"


def pixel_sums(image: np.ndarray) -> np.ndarray:
    """The sums of pixels, and of their squares, in each channel of an image, uint8 [H,W,C] with at most 66,000 rows: int64
    [2,C], so that no order of adding matters."""
    rows = image.reshape(image.shape[0], -1)
    # Down the columns first, which is ten times faster and stays below 2^32: 255^2 * 66,000 < 2^32.
    columns = [each.sum(0, dtype=np.uint32) for each in (rows, np.square(rows, dtype=np.uint16))]
    return np.stack([each.reshape(-1, image.shape[2]).sum(0, dtype=np.int64) for each in columns])


def make_shard(
    number: int,
    items: Sequence[Item],
    source: Source,
    config: PreprocessConfig,
    output: Location,
    duplicate_of: Mapping[str, str],
) -> dict[str, Any]:
    """Write shard `number` and, after it, its record: counts, hashes, exact pixel sums, skipped keys, converted
    profiles. Returns the record.

    duplicate_of: keys to leave out, with the key of the image that each repeats.
    """
    count, sums, content = 0, np.zeros((2, config.channels), np.int64), ContentHash()
    skipped: list[dict[str, str]] = []
    profiles: Counter[str] = Counter()
    with committed(output / shard_file(number)) as temporary:
        with ShardWriter(temporary, config.shape, config.storage) as writer:
            for key, image in transformed(items, source, config, duplicate_of, skipped, profiles):
                content.update(key, writer.append(key, image))
                sums += pixel_sums(image)
                count += 1
        file_facts = {"bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}
    record = {
        "file": shard_file(number),
        "images": count,
        **file_facts,
        "content_sha256": content.hexdigest(),
        "sum": sums[0].tolist(),
        "sum_of_squares": sums[1].tolist(),
        "skipped": skipped,
        "colour_profiles": dict(profiles),
    }
    commit_json(output / record_file(number), record)
    return record


def transformed(
    items: Sequence[Item],
    source: Source,
    config: PreprocessConfig,
    duplicate_of: Mapping[str, str],
    skipped: list[dict[str, str]],
    profiles: Counter[str],
) -> Iterator[tuple[str, np.ndarray]]:
    """(key, image uint8 [*config.shape]) of the items that the data set takes; the others are added to `skipped`.

    profiles: where images are counted by the colour profile that they were converted by.
    """

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
                max_pixels=config.max_pixels,
                profiles=profiles,
            )
        except TooSmallError as error:
            skip(key, "too small", str(error))
        except Exception as error:  # Pillow's decoders raise many kinds, and any of them is recorded
            skip(key, "undecodable", reason_of(error))
        else:
            yield key, image


def finished_record(output: Location, number: int, channels: int) -> dict[str, Any] | None:
    """The record of a shard; None, so that it is made again, if it is damaged, or unless its file is there with the size that it
    states."""
    try:
        record = typed.read_json(output / record_file(number), ShardRecord, what="record", advice="")
        is_whole = (output / shard_file(number)).stat().st_size == record["bytes"]
    except (OSError, InputError):
        return None
    fits = record["file"] == shard_file(number) and len(record["sum"]) == len(record["sum_of_squares"]) == channels
    return cast(dict[str, Any], record) if is_whole and fits else None
