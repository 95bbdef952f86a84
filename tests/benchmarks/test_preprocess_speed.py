"""Preprocessing against a bare multiprocessing loop that makes the same files, and its memory on a large input."""

import io
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import lmdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from support.contest import ROWS, Row, contest, line
from support.processes import ROOT
from support.trees import tree_seconds

from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.driver import preprocess
from pipelines.preprocess.sources.open import open_source
from pipelines.preprocess.worker import make_shard
from pipelines.storage.locations import location

pytestmark = pytest.mark.bench
CORES = 2
SHARD = 512


def wall_seconds(action: Callable[[], None]) -> float:
    """By the wall clock, because other processes do the work."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def write_photos(path: Path, count: int, *, height: int, width: int, kind: str) -> None:
    """An LMDB as LSUN lays it out, with smooth pictures whose files are as large as photographs'."""
    generator = np.random.default_rng(0)
    with lmdb.open(str(path), map_size=8 << 30) as environment, environment.begin(write=True) as transaction:
        for number in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            photo = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
            photo += generator.integers(-8, 9, photo.shape, dtype=np.int16)
            file = io.BytesIO()
            Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(file, format=kind)
            transaction.put(f"{number * 7919 % count:040x}".encode(), file.getvalue())


def bare_shard(task: tuple[str, Sequence[bytes], str, int]) -> None:
    """Decode, crop, resize and write; no hashes, no sums, no policies, nothing that resumes."""
    source, keys, output, size = task
    pixels = []
    with lmdb.open(source, readonly=True, lock=False) as environment, environment.begin() as transaction:
        for key in keys:
            image = Image.open(io.BytesIO(transaction.get(key) or b"")).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
            pixels.append(np.asarray(image).tobytes())
    table = pa.table({"key": [key.decode() for key in keys], "image": pa.array(pixels, pa.binary(size * size * 3))})
    pq.write_table(table, output, compression="none", use_dictionary=False, row_group_size=85)


@pytest.mark.parametrize("size", [64, 256])
def test_images_a_second_against_a_bare_loop(tmp_path: Path, size: int) -> None:
    source, count, pairs = tmp_path / "photos_lmdb", 6144, 3
    write_photos(source, count, height=256, width=341, kind="WEBP")
    with lmdb.open(str(source), readonly=True, lock=False) as environment, environment.begin() as transaction:
        keys = list(transaction.cursor().iternext(values=False))
    turns = iter(range(100))

    def bare() -> None:
        folder = tmp_path / f"bare-{next(turns)}"
        folder.mkdir()
        tasks = [(str(source), keys[i : i + SHARD], str(folder / f"{i}.parquet"), size) for i in range(0, count, SHARD)]
        with multiprocessing.get_context("spawn").Pool(CORES) as pool:
            pool.map(bare_shard, tasks, chunksize=1)

    def ours() -> None:
        output = str(tmp_path / f"ours-{next(turns)}")
        preprocess(PreprocessConfig(source=str(source), output=output, image_size=size, images_per_shard=SHARD))

    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    try:
        bare()  # warm up
        ours()
        ratios = [wall_seconds(bare) / wall_seconds(ours) for _ in range(pairs)]
    finally:
        ray.shutdown()
    print(
        f"\npreprocessing {count:,} WebP photographs to {size}x{size}: {statistics.median(ratios):.2f} x a bare loop's speed"
    )
    assert statistics.median(ratios) >= 0.85


@pytest.mark.parametrize("size", [64, 256])
def test_a_shard_in_this_process_against_a_bare_loop(tmp_path: Path, size: int) -> None:
    """What hashes, sums, policies and the commit cost, without Ray."""
    path = tmp_path / "photos_lmdb"
    write_photos(path, SHARD, height=256, width=341, kind="WEBP")
    output = location(str(tmp_path / "out"), option="--output")
    config = PreprocessConfig(source=str(path), output=str(output), image_size=size, images_per_shard=SHARD)
    source = open_source(location(str(path), option="--source"), split=None, scratch=None, say=print)
    items = source.items()
    keys = [item.key.encode() for item in items]
    row = contest(
        f"a shard of {SHARD} WebP photographs to {size}x{size}, in a process",
        "a bare loop",
        lambda: make_shard(0, items, source, config, output, {}),
        lambda: bare_shard((str(path), keys, str(tmp_path / "bare.parquet"), size)),
    )
    assert row.ratio > 0.65


def test_memory_for_an_input_ten_times_the_object_store(tmp_path: Path) -> None:
    source, store = tmp_path / "large_lmdb", 80 << 20
    write_photos(source, 1400, height=512, width=683, kind="PNG")
    size = (source / "data.mdb").stat().st_size
    assert size > 10 * store
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, object_store_memory=store)
    peaks, stop = {"worker": 0, "store": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        memory = process.memory_info()  # without the pages of the LMDB, which the kernel may take back
                        peaks["worker"] = max(peaks["worker"], memory.rss - memory.shared)
                except psutil.Error:
                    continue
            free = ray.available_resources().get("object_store_memory", 0.0)
            peaks["store"] = max(peaks["store"], int(ray.cluster_resources()["object_store_memory"] - free))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        started = time.perf_counter()
        preprocess(
            PreprocessConfig(source=str(source), output=str(tmp_path / "out"), image_size=256, images_per_shard=200)
        )
        print(
            f"\n{size >> 20} MiB of PNGs through an object store of {store >> 20} MiB in {time.perf_counter() - started:.0f} s"
        )
    finally:
        stop.set()
        watcher.join()
        ray.shutdown()
    print(f"largest worker: {peaks['worker'] >> 20} MiB of its own; object store: {peaks['store'] >> 20} MiB")
    assert peaks["worker"] < 500 << 20


DATASETS = """
import io, sys
import lmdb
from datasets import Dataset, Features, Value
from PIL import Image

source, output, size = sys.argv[1], sys.argv[2], int(sys.argv[3])

def items(shards):
    with lmdb.open(source, readonly=True, lock=False) as environment, environment.begin() as transaction:
        for keys in shards:
            for key in keys:
                yield {"key": key, "image": transaction.get(key.encode())}

def resized(item):
    image = Image.open(io.BytesIO(item["image"])).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return {"image": image.tobytes()}

if __name__ == "__main__":
    with lmdb.open(source, readonly=True, lock=False) as environment, environment.begin() as transaction:
        keys = [key.decode() for key in transaction.cursor().iternext(values=False)]
    shards = [keys[i : i + 512] for i in range(0, len(keys), 512)]
    features = Features({"key": Value("string"), "image": Value("binary")})
    cache = output + "-cache"
    made = Dataset.from_generator(items, features, cache_dir=cache, gen_kwargs={"shards": shards}, num_proc=2)
    made.map(resized, num_proc=2).to_parquet(output)
"""


@pytest.mark.parametrize("size", [64, 256])
def test_the_whole_command_against_datasets(size: int, tmp_path: Path) -> None:
    """Hugging Face's datasets: items from the LMDB, map in as many processes, Parquet. CPU seconds of whole trees."""
    peers = os.environ.get("DDPM_PEERS", "")
    if PathFinder.find_spec("datasets", [*sys.path, peers]) is None:
        pytest.skip("datasets is not installed")
    few, many, script = tmp_path / "few_lmdb", tmp_path / "many_lmdb", tmp_path / "with_datasets.py"
    write_photos(few, 16, height=256, width=341, kind="WEBP")
    write_photos(many, 4096, height=256, width=341, kind="WEBP")
    script.write_text(DATASETS)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    turns = iter(range(100))

    def ours(source: Path) -> tuple[float, float]:
        options = ["--source", str(source), "--output", str(tmp_path / f"{next(turns)}"), "--image-size", str(size)]
        command = [sys.executable, str(ROOT / "jobs" / "preprocess.py"), *options, "--images-per-shard", str(SHARD)]
        return tree_seconds(command, {**environment, "PYTHONPATH": str(ROOT)})

    def theirs(source: Path) -> tuple[float, float]:
        command = [sys.executable, str(script), str(source), str(tmp_path / f"{next(turns)}.parquet"), str(size)]
        return tree_seconds(command, {**environment, "PYTHONPATH": peers, "HF_HOME": str(tmp_path / "home")})

    pairs = [(ours(few), theirs(few), ours(many), theirs(many)) for _ in range(3)]
    whole: list[list[float]] = [[], []]  # theirs over ours, of CPU time and of wall time
    further: list[list[float]] = [[], []]
    for our_few, their_few, our_many, their_many in pairs:
        for clock in (0, 1):
            whole[clock].append(their_many[clock] / our_many[clock])
            further[clock].append((their_many[clock] - their_few[clock]) / (our_many[clock] - our_few[clock]))
    unknown = (math.nan, math.nan)
    work = f"4,096 WebP photographs to {size}x{size}, whole command"
    rows = [
        Row(work, "datasets", whole[0], whole[1], unknown),
        Row("the same without what 16 of them take, which starts Ray", "datasets", further[0], further[1], unknown),
    ]
    ROWS.extend(rows)
    print("\n" + "\n".join(map(line, rows)))
    assert rows[0].ratio > 0.4
    assert rows[1].ratio > 0.6
