"""Images to shards: python jobs/preprocess.py --source church_outdoor_train_lmdb --output /data/church --image-size 256"""

import sys

from jobs.cli import parse, run, say
from pipelines.preprocess import PreprocessConfig, preprocess


def main() -> None:
    config = parse(PreprocessConfig, sys.argv[1:], description="Turn encoded images into shards of [-1, 1] images.")
    dataset = preprocess(config, say)
    skipped = len(dataset.manifest["skipped"])
    say(f"preprocess: {len(dataset):,} images in {dataset.path} ({skipped} skipped), sha256 {dataset.sha256[:12]}")


if __name__ == "__main__":
    run(main)
