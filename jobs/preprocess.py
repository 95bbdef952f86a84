#!/usr/bin/env python3
"""Images to shards: python jobs/preprocess.py --source church_outdoor_train_lmdb --output /data/church --image-size 256

python jobs/preprocess.py verify /data/church    reads every byte again and compares it with the manifest
python jobs/preprocess.py stats /data/church     prints the data set's card
"""

import sys
from dataclasses import dataclass
from typing import Annotated

from jobs.cli import Positional, parse, run, say
from pipelines import preprocess, shards
from pipelines.preprocess.config import PreprocessConfig
from pipelines.runtime.progress import Progress
from pipelines.storage.locations import location


@dataclass(frozen=True)
class Existing:
    """A data set that is there."""

    path: Annotated[str, Positional]
    """The folder of shards; a local path or a URL."""


def main() -> None:
    match sys.argv[1:]:
        case ["verify", *rest]:
            dataset = open_existing(rest, "verify", "Read a data set again and compare every byte with its manifest.")
            progress = Progress("verify", len(dataset), "images", say)
            dataset.verify(progress.at)
            say(
                f"verify: {len(dataset):,} images in {dataset.path} are as the manifest says, sha256 {dataset.sha256[:12]}"
            )
        case ["stats", *rest]:
            print(preprocess.describe_dataset(open_existing(rest, "stats", "Print a data set's card.")))
        case arguments:
            about = "Turn images into shards of [-1, 1] images."
            config = parse(PreprocessConfig, arguments, description=about, words=("verify", "stats"))
            dataset = preprocess.preprocess(config, say)
            say(f"preprocess: {dataset.path} is done\n{preprocess.describe_dataset(dataset)}")


def open_existing(arguments: list[str], word: str, description: str) -> "shards.ShardedDataset":
    path = parse(Existing, arguments, description=description, first=word).path
    return shards.ShardedDataset.open(location(path, option="PATH"))


if __name__ == "__main__":
    run(main)
