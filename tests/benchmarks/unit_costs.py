"""What one of each thing costs here, for jobs/plan.py: PYTHONPATH=.:tests python tests/benchmarks/unit_costs.py

Writes pipelines/plan/unit_costs.json: medians, with the least and the largest, of CPU seconds, bytes and requests, and the
machine's name. Some minutes on two cores, most of them for the numbers of 50,000 samples. With names, measures those parts
alone, and keeps the others as they were, if they were measured on the same machine.
"""

import functools
import gc
import io
import json
import multiprocessing
import os
import pickle
import platform
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import torch
from PIL import Image
from support.measured_run import FURTHER, measured_run, record
from support.mlflow_server import Server, tracking_server, why_no_postgres
from support.synthetic_shards import random_pixels, write_dataset
from support.timing import seconds
from test_preprocess_speed import write_photos

from ddpm_core import metrics
from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.presets import PRESETS
from ddpm_core.protocol import Protocol
from ddpm_core.training import TrainState
from ddpm_core.unet import UNet
from pipelines.checkpoints.store import commit_snapshot
from pipelines.evaluate.measure import measure, read_samples
from pipelines.evaluate.reference import Reference
from pipelines.plan.unit_costs import FILE, UnitCost
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.plan import make_plan
from pipelines.preprocess.sources.open import list_items, open_source
from pipelines.preprocess.worker import finished_record, make_shard
from pipelines.shards.format import group_sizes
from pipelines.shards.order import epoch_order
from pipelines.storage.chunks import chunk_ranges, load_chunk, save_chunk
from pipelines.storage.locations import location
from pipelines.tracking.tracker import Tracker

FEATURES, LOGITS = 2048, 1008  # of the Inception network
Costs = Iterator[tuple[str, UnitCost]]


def machine() -> str:
    """The processor's name, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def cost(values: list[float], unit: str, what: str) -> UnitCost:
    return UnitCost(value=statistics.median(values), low=min(values), high=max(values), unit=unit, what=what)


def repeated(action: Callable[[], Any], items: int, times: int = 5) -> list[float]:
    """CPU seconds an item, a warm-up apart."""
    action()
    return [seconds(action) / items for _ in range(times)]


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, whose memory is its alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def preprocess_costs(folder: Path) -> Costs:
    for side, width, kind in ((32, 32, "PNG"), (256, 341, "WEBP")):
        photos = folder / f"photos-{side}_lmdb"
        write_photos(photos, 256, height=side, width=width, kind=kind)
        values, peak = in_new_process(shard_cost, str(photos), str(folder / f"out-{side}"), side)
        what = f"decode, crop, resize, hash and write an image, {kind} of {width}x{side} to {side}x{side}"
        yield f"preprocess_image_{side}", cost(values, "CPU s of a worker an image", what)
    yield "preprocess_worker", cost([peak], "bytes", "memory of a worker that makes a shard of 256x256")
    count = 100_000
    source = folder / "listed_lmdb"
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    with lmdb.open(str(source), map_size=1 << 30) as environment, environment.begin(write=True) as transaction:
        for number in range(count):
            transaction.put(f"{number:040x}".encode(), file.getvalue())
    config = PreprocessConfig(source=str(source), output=str(folder / "none"), image_size=256)

    def listed() -> Any:
        opened = open_source(location(str(source), option="--source"), split=None, scratch=None, say=print)
        items = list_items(opened, location(str(source), option="--source"), config.max_pixels)
        make_plan(config, opened.facts(), items)
        return items, [pickle.dumps(items[each.start : each.stop]) for each in chunk_ranges(count, 1024)]

    what = "list an image of an LMDB, and give it out"
    yield "preprocess_listing", cost(repeated(listed, count, 3), "CPU s of the driver an image", what)
    yield "preprocess_driver", cost([memory_of(listed) / count], "bytes of the driver an image", what)


def shard_cost(photos: str, output: str, side: int) -> tuple[list[float], float]:
    place = location(output, option="--output")
    config = PreprocessConfig(source=photos, output=output, image_size=side, too_small="enlarge")
    source = open_source(location(photos, option="--source"), split=None, scratch=None, say=print)
    items = source.items()
    values = repeated(lambda: make_shard(0, items, source, config, place, {}), len(items))
    return values, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def memory_of(make: Callable[[], Any]) -> float:
    """Bytes that are held by what is made."""
    gc.collect()
    tracemalloc.start()
    made = make()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del made
    return float(held)


def train_costs(folder: Path) -> Costs:
    groups = group_sizes([1024] * 977, (256, 256, 3))
    images = int(groups.sum())
    what = "the order of an epoch, for each of its images"
    yield (
        "epoch_order",
        cost(repeated(lambda: epoch_order(groups, 0, 0, None), images, 3), "CPU s of a worker an image", what),
    )
    preset = PRESETS["cifar10"]
    state = TrainState(UNet(preset.unet), preset.optim)
    state.step = 1
    for weights in state.model.parameters():
        weights.grad = torch.zeros_like(weights)
    state.optimizer.step()
    values, sizes = [], []
    for number in range(4):
        state.step = number + 1
        values.append(seconds(lambda: write_checkpoint(folder / "run", snapshot(state), {})))
        sizes.append(sum(path.stat().st_size for path in (folder / "run").glob(f"step-*{number + 1}/*")))
    what = "copy, write and hash a byte of a checkpoint, beside the training"
    yield "checkpoint_byte", cost([v / s for v, s in zip(values, sizes, strict=True)][1:], "CPU s a byte", what)


def chunk_of(indices: range, generator: torch.Generator, mixing: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features like Inception's, which are not negative and go together; logits, and a few images."""
    shown = max(0, min(indices.stop, 64) - indices.start)
    return {
        "features": (torch.randn(len(indices), FEATURES, generator=generator) @ mixing).relu_(),
        "logits": torch.randn(len(indices), LOGITS, generator=generator),
        "images": torch.zeros(shown, 32, 32, 3, dtype=torch.uint8),
    }


def chunk_costs(folder: Path) -> Costs:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator) / FEATURES**0.5
    made = chunk_of(range(500), generator, mixing)
    for number in range(10):
        save_chunk(folder, range(500 * number, 500 * number + 500), made, {})
    size = sum(path.stat().st_size for path in folder.iterdir()) / 10
    yield "chunk_sample", cost([size / 500], "bytes a sample", "features and logits of Inception in a chunk")
    read = repeated(lambda: [load_chunk(folder, range(500 * n, 500 * n + 500)) for n in range(10)], 5000)
    yield "chunk_read", cost(read, "CPU s of the driver a sample", "read and check a chunk that is there")


def number_costs(folder: Path) -> Costs:
    for samples in (10_000, 50_000):
        values, peak = in_new_process(numbers, str(folder / str(samples)), samples)
        what = f"all numbers of a checkpoint's {samples:,} samples"
        yield f"numbers_{samples}", cost([values], "CPU s of a worker a checkpoint", what)
        yield f"numbers_bytes_{samples}", cost([peak], "bytes", f"memory of a worker at {what}")


def numbers(folder: str, samples: int) -> tuple[float, float]:
    """(CPU seconds, peak memory) of all numbers of a checkpoint, in one thread: several also count the time they wait."""
    torch.set_num_threads(1)
    place, generator = Path(folder), torch.Generator().manual_seed(0)
    dataset = write_dataset(place / "shards", random_pixels(64, (32, 32, 3)), [64])
    mixing = torch.randn(FEATURES, FEATURES, generator=generator) / FEATURES**0.5
    chunks = chunk_ranges(samples, 500)
    for indices in chunks:
        save_chunk(place, indices, chunk_of(indices, generator, mixing), {"seconds": 1.0})
    halves = metrics.FeatureStatistics(FEATURES), metrics.FeatureStatistics(FEATURES)
    features = [chunk_of(range(500), generator, mixing)["features"] for _ in range(20)]
    for number, each in enumerate(features):
        halves[number % 2].update(each)
    protocol = Protocol(
        num_samples=samples,
        seed=0,
        sampler="ddim",
        sampler_steps=50,
        spacing="uniform",
        clip_denoised=True,
        weights="ema",
        batch_size=250,
        precision="float32",
        extractor="inception-2015-12-05",
        extractor_sha256="",
        resize="",
        reference="",
        reference_sha256="",
        reference_images=0,
    )
    reference = Reference(halves, torch.cat(features), None)
    taken = seconds(lambda: measure(read_samples(place, chunks, ()), protocol, reference, dataset))
    return taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def tracking_costs(folder: Path) -> Costs:
    """Requests that MLflow's client makes of a server, and how long one takes."""
    import requests

    made: list[float] = []
    real = requests.Session.request

    def request(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return real(*arguments, **options)
        finally:
            made.append(time.perf_counter() - started)

    def calls(action: Callable[[], Any]) -> int:
        made.clear()
        action()
        return len(made)

    def measured(server: Server) -> Costs:
        tracker = Tracker(server.uri, "calls", folder)
        counts, times = {}, []
        for number in (1, 5):
            distances = {10 * step: 9.0 - step for step in range(1, number + 1)}
            subject = measured_run(folder / str(number), distances, name=f"tiny-{number}", further=FURTHER)
            counts[number] = calls(functools.partial(record, tracker, subject))
            times += made
        run = tracker.run("train", "tiny-records", "f", params={"a": "1"}, tags={})
        log = calls(lambda: run.log_records([{"step": 1, "loss": 1.0, "lr": 1e-4}]))
        times += made
        model = calls(lambda: run.checkpoint_model("tiny-records-step-1", 1, "/nowhere/1", "0"))
        yield "mlflow_call", cost(times, "s", "a request of MLflow's client to a server with PostgreSQL on one machine")
        each = (counts[5] - counts[1]) / 4
        yield (
            "mlflow_evaluation",
            cost([counts[1] - each], "requests", "what an evaluation records, but for checkpoints"),
        )
        yield "mlflow_checkpoint", cost([each], "requests", "what an evaluation records of a checkpoint")
        yield "mlflow_record", cost([float(log)], "requests", "a log record of a training")
        yield "mlflow_model", cost([float(model)], "requests", "a checkpoint that a training made")

    reason = why_no_postgres()
    if reason is not None:
        raise SystemExit(f"MLflow's part needs PostgreSQL: {reason}")
    requests.Session.request = request  # type: ignore[method-assign]
    try:
        with tracking_server(folder / "artifacts") as (server, _):
            yield from measured(server)
    finally:
        requests.Session.request = real  # type: ignore[method-assign]


def ray_costs(folder: Path) -> Costs:
    """Calls that the driver of a fan-out makes: of an actor that answers at once, beside many that do not answer."""
    import logging

    import ray

    class Answering:
        def run(self, *arguments: Any) -> bool:
            return True

        def wait(self) -> None:
            time.sleep(3600)

    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    try:
        actors = [ray.remote(Answering).options(num_cpus=0.5).remote() for _ in range(2)]
        ray.get([actor.run.remote() for actor in actors])
        answering, waiting = actors
        recipe, unit = [ray.put(("worker", "arguments"))], (range(500), "/shared/runs/evaluate" * 10)
        ready: list[Any] = []

        def submit() -> None:
            ready[:] = [answering.run.remote(1, recipe, unit) for _ in range(500)]

        values = []
        for _ in range(4):
            values.append(seconds(submit) / 500)
            ray.wait(ready, num_returns=500)
        yield "ray_submit", cost(values[1:], "CPU s of the driver a chunk", "give a chunk to an actor")
        values = repeated(lambda: ray.get(ready), 500)
        yield "ray_result", cost(values, "CPU s of the driver a chunk", "take what an actor answered")

        def wait_beside(others: list[Any]) -> None:
            for answer in ready[:20]:
                ray.wait([*others, answer], num_returns=1)

        pending = [waiting.wait.remote() for _ in range(4096)]
        times = {}
        for number in (8, 4096):
            times[number] = repeated(functools.partial(wait_beside, pending[:number]), 20)
        each_wait = [(many - few) / 4088 for many, few in zip(times[4096], times[8], strict=True)]
        yield "ray_wait", cost(times[8], "CPU s of the driver a chunk", "wait for one of 8 actors")
        yield "ray_wait_each", cost(each_wait, "CPU s of the driver a chunk and worker", "wait for one of more actors")
    finally:
        ray.shutdown()


def store_costs(folder: Path) -> Costs:
    """Requests that reach an object store, counted where s3fs sends them."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none", AWS_DEFAULT_REGION="us-east-1")
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
    s3fs.S3FileSystem().mkdir("costs")
    sent: list[str] = []
    real = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        sent.append(method)
        return await real(self, method, *arguments, **options)

    def requests_of(action: Callable[[], Any]) -> float:
        sent.clear()
        action()
        return float(len(sent))

    s3fs.S3FileSystem._call_s3 = call
    try:
        photos = folder / "photos_lmdb"
        write_photos(photos, 16, height=32, width=32, kind="PNG")
        output = location("s3://costs/shards", option="--output")
        config = PreprocessConfig(source=str(photos), output=str(output), image_size=32)
        source = open_source(location(str(photos), option="--source"), split=None, scratch=None, say=print)
        items = source.items()
        asked = requests_of(lambda: finished_record(output, 0, 3))
        made = requests_of(lambda: make_shard(0, items, source, config, output, {}))
        yield "store_shard", cost([asked + made], "requests", "look for a shard, make it and its record")
        preset = PRESETS["tiny"]
        state = TrainState(UNet(preset.unet), preset.optim)
        run = location("s3://costs/runs/train/tiny", option="--storage")
        made = requests_of(lambda: commit_snapshot(run, snapshot(state), {}, []))
        yield "store_checkpoint", cost([made], "requests", "write a checkpoint whose files are single parts")
    finally:
        s3fs.S3FileSystem._call_s3 = real
        server.stop()


PARTS: dict[str, Callable[[Path], Costs]] = {
    "preprocess": preprocess_costs,
    "train": train_costs,
    "chunk": chunk_costs,
    "tracking": tracking_costs,
    "store": store_costs,
    "ray": ray_costs,
    "numbers": number_costs,
}


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    torch.set_num_threads(os.cpu_count() or 1)
    earlier = json.loads(FILE.read_text()) if FILE.is_file() and sys.argv[1:] else {}
    costs = earlier.get("costs", {}) if earlier.get("machine") == machine() else {}
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="unit-costs-") as folder:
            for key, each in PARTS[name](Path(folder)):
                costs[key] = each
                print(
                    f"{key}: {each['value']:.4g} ({each['low']:.4g} to {each['high']:.4g}) {each['unit']}", flush=True
                )
                content = {"machine": machine(), "costs": dict(sorted(costs.items()))}
                FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
