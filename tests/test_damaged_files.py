"""Every kind of file that is read, damaged in every way: the reader gives what it says, or one sentence, never another error.

Generated: each field of a JSON file is left out and given values of other types, and every file is cut, emptied, overwritten
and replaced by a folder. A new field is covered the day it is written.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.places import on_disk
from support.synthetic_shards import random_pixels, write_dataset

from ddpm_core.checkpoint import Checkpoint, list_checkpoints, open_checkpoint, snapshot, write_checkpoint
from ddpm_core.commit import write_json
from ddpm_core.configs import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.interop import from_diffusers, to_diffusers
from ddpm_core.protocol import Protocol
from ddpm_core.training import OptimConfig, TrainState
from ddpm_core.unet import UNet, UNetConfig
from pipelines.checkpoints.foreign import scheduler_config, scheduler_of
from pipelines.checkpoints.retention import mark_best, marked_steps
from pipelines.demo.driver import read_finished
from pipelines.evaluate.calibration import check_calibrated, outcome_path
from pipelines.evaluate.evaluation import describe_values, read_evaluation
from pipelines.evaluate.extractor import Extractor
from pipelines.evaluate.reference import Sums, read_reference, reference_path
from pipelines.evaluate.subject import is_finished
from pipelines.likelihood.result import Likelihood, LikelihoodProtocol, read_likelihood
from pipelines.nightly.ledger import Ledger
from pipelines.preprocess.card import describe_dataset
from pipelines.preprocess.plan import earlier_plan
from pipelines.preprocess.worker import finished_record, record_file, shard_file
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import chunk_path, content_sha256, load_chunk, save_chunk
from pipelines.storage.layout import Storage, shards_of
from pipelines.sweep.ranking import Outcome
from pipelines.sweep.result import SweepResult, read_result
from pipelines.sweep.trial import read_outcome

NETWORK = UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
SHA = "0" * 64
PROTOCOL = Protocol(
    num_samples=60,
    seed=0,
    sampler="ddim",
    sampler_steps=5,
    spacing="uniform",
    clip_denoised=True,
    weights="ema",
    batch_size=10,
    precision="float32",
    extractor="pixels",
    extractor_sha256=SHA,
    resize="area-8",
    reference="digits",
    reference_sha256=SHA,
    reference_images=12,
)
PIXELS = Extractor("pixels", SHA, 64, None, "area-8", spec="pixels")
OUTCOME = Outcome("linear", 0, "finished", 4, "run", "evaluation", "fd_pixels", 1.5, 1.0, 2.0)
OTHER_VALUES: tuple[Any, ...] = (
    None,
    True,
    "another",
    -1,
    0,
    2.5,
    10**30,
    10**400,
    float("nan"),
    float("-inf"),
    [],
    [[1]],
    {},
    {"a": {"b": [None]}},
    "\ud800\n" * 20,
)


@dataclass(frozen=True)
class Kind:
    """A kind of file. make: writes a good one below a folder, and returns its path. read: all that reads it, from the folder."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def dataset_in(folder: Path) -> ShardedDataset:
    return write_dataset(folder, random_pixels(12, (8, 8, 1)), [8, 4])


def read_dataset(folder: Path) -> object:
    dataset = ShardedDataset.open(folder)
    dataset.verify()
    return describe_dataset(dataset), dataset.pixels([0, len(dataset) - 1]).tolist(), dataset.keys(0)


def make_checkpoint(folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    state = TrainState(UNet(NETWORK), OptimConfig())
    config = {
        "preset": "tiny",
        "unet": asdict(NETWORK),
        "diffusion": asdict(DiffusionConfig()),
        "shards": str(folder / "shards"),
        "storage": str(folder),
    }
    return write_checkpoint(folder / "train" / "run", snapshot(state), config, [{"step": 0, "loss": 0.5}])


def read_checkpoint(folder: Path) -> object:
    list_checkpoints(folder / "train" / "run")
    checkpoint = open_checkpoint(folder / "train" / "run" / "step-00000000")
    values = checkpoint.unet_config(), checkpoint.diffusion_config(), checkpoint.history, checkpoint.step
    return *values, shards_of(checkpoint.config, checkpoint.path), checkpoint.weights_sha256("ema")


def load_checkpoint(folder: Path) -> object:
    checkpoint = open_checkpoint(folder / "train" / "run" / "step-00000000")
    checkpoint.restore(TrainState(UNet(NETWORK), OptimConfig()))
    return checkpoint.network().state_dict()["conv_out.bias"].tolist(), checkpoint.history


def make_record(folder: Path) -> Path:
    dataset_in(folder)
    (folder / "shards").mkdir()
    (folder / "shard-00000.parquet").rename(folder / shard_file(0))
    record = {
        "file": shard_file(0),
        "images": 8,
        "bytes": (folder / shard_file(0)).stat().st_size,
        "sha256": SHA,
        "content_sha256": SHA,
        "sum": [9],
        "sum_of_squares": [99],
        "skipped": [{"key": "a", "kind": "duplicate", "reason": "same pixels"}],
        "colour_profiles": {"Display P3": 1},
    }
    return written(folder / record_file(0), record)


def make_evaluation(folder: Path) -> Path:
    values = {"fd_pixels": 1.5, "fd_pixels_ci_low": 1.0, "fd_pixels_ci_high": 2.0, "kid_pixels": 0.1}
    facts = {
        "step": 0,
        "protocol": asdict(PROTOCOL),
        "values": values,
        "weights_sha256": SHA,
        "progress": [{"t": 999, "distance": 2.0, "score": 1.0}],
    }
    make_checkpoint(folder)
    return written(folder / "manifest.json", facts)


def read_both_ways(folder: Path) -> object:
    finished = is_finished(folder, open_checkpoint(folder / "train" / "run" / "step-00000000"), PROTOCOL, (999,))
    evaluation = read_evaluation(folder)
    return finished, evaluation, describe_values(evaluation.values, evaluation.protocol), evaluation.interval


def make_likelihood(folder: Path) -> Path:
    protocol = LikelihoodProtocol(
        images=8, strata=None, seed=0, weights="ema", cdf="exact", batch_size=8, data="digits", data_sha256=SHA
    )
    values = {"bpd": 3.0, "bpd_ci_high": 3.5}
    likelihood = Likelihood(0, SHA, 1000, protocol, values, {"t": [1.0, 2.0]})
    return written(folder / "manifest.json", asdict(likelihood))


def read_measured(folder: Path) -> object:
    likelihood = read_likelihood(folder, SHA)
    return likelihood and (likelihood, likelihood.describe())


def make_sweep(folder: Path) -> Path:
    return written(
        folder / "manifest.json",
        asdict(SweepResult("sweep", "run", "fd_pixels", (OUTCOME,), "linear is best", "http://x")),
    )


def read_sweep(folder: Path) -> object:
    result = read_result(folder)
    return result and (result, result.describe())


def make_attempts(folder: Path) -> Path:
    Ledger(folder).end_attempt("run", "step-00000001", ["a worker died"])
    return folder / "attempts" / "run" / "step-00000001.json"


def make_delivered(folder: Path) -> Path:
    Ledger(folder).set_delivered({"worse run-1": "run-1"})
    return folder / "told.json"


def make_mark(folder: Path) -> Path:
    step = make_checkpoint(folder).step
    mark_best(folder / "train" / "run", step)
    return folder / "train" / "run" / "best.json"


def make_calibration(folder: Path) -> Path:
    return written(
        on_disk(outcome_path(Storage(folder), PIXELS)), {"extractor_sha256": SHA, "passed": True, "checks": []}
    )


def make_finished(folder: Path) -> Path:
    facts = {"identity": "demo", "report": "report.html", "best": "step 1", "files": {}}
    return written(folder / "finished.json", facts)


def make_weights(folder: Path) -> None:
    torch.manual_seed(0)
    to_diffusers(folder / "unet", NETWORK, UNet(NETWORK).state_dict())
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(DiffusionConfig()))


def made(make: Callable[[Path], object], name: str) -> Callable[[Path], Path]:
    """Makes what `make` makes; the file of it that is damaged."""

    def path_of(folder: Path) -> Path:
        make(folder)
        return folder / name

    return path_of


def make_reference(folder: Path) -> Path:
    dataset = dataset_in(folder)
    sums = Sums(len(dataset), PIXELS)
    features = torch.rand(12, 64, generator=torch.Generator().manual_seed(0))
    sums.halves[0].update(features[:6])
    sums.halves[1].update(features[6:])
    sums.features.append(features)
    path = reference_path(dataset, PIXELS)
    assert isinstance(path, Path)
    path.parent.mkdir()
    save_file(sums.state(), path, metadata={"sha256": content_sha256(sums.state())})
    return path


def read_statistics(folder: Path) -> object:
    dataset = ShardedDataset.open(folder)
    return read_reference(reference_path(dataset, PIXELS), dataset, PIXELS).statistics.moments()[0].tolist()


def make_chunk(folder: Path) -> Path:
    save_chunk(folder, range(4), {"features": torch.ones(4, 2)}, {"weights_sha256": SHA, "seconds": 1.0})
    return on_disk(chunk_path(folder, range(4)))


def written(path: Path, value: Any) -> Path:
    write_json(path, value)
    return path


STEP = "train/run/step-00000000"
JSON_KINDS: dict[str, Kind] = {
    "manifest of a data set": Kind(made(dataset_in, "manifest.json"), read_dataset),
    "plan of a data set": Kind(
        lambda folder: written(folder / "plan.json", {"fingerprint": "a", "items_sha256": SHA, "source": "x"}),
        earlier_plan,
    ),
    "record of a shard": Kind(make_record, lambda folder: finished_record(folder, 0, 1)),
    "manifest of a checkpoint": Kind(made(make_checkpoint, f"{STEP}/manifest.json"), read_checkpoint),
    "manifest of an evaluation": Kind(make_evaluation, read_both_ways),
    "manifest of a likelihood": Kind(make_likelihood, read_measured),
    "result of a sweep": Kind(make_sweep, read_sweep),
    "outcome of a trial": Kind(
        lambda folder: written(folder / "0.json", asdict(OUTCOME)), lambda folder: read_outcome(folder / "0.json")
    ),
    "attempts of a night": Kind(make_attempts, lambda folder: Ledger(folder).begin_attempt("run", "step-00000001")),
    "alarms of a night": Kind(make_delivered, lambda folder: Ledger(folder).new_alarms([], {"run-1"})),
    "mark of a checkpoint": Kind(make_mark, lambda folder: marked_steps(folder / "train" / "run")),
    "calibration": Kind(make_calibration, lambda folder: check_calibrated(PIXELS, Storage(folder))),
    "record of the demo": Kind(make_finished, lambda folder: read_finished(folder / "finished.json", "demo")),
    "network in diffusers' layout": Kind(
        made(make_weights, "unet/config.json"), lambda folder: from_diffusers(folder / "unet")[0]
    ),
    "scheduler in diffusers' layout": Kind(
        made(make_weights, "scheduler/scheduler_config.json"), lambda folder: scheduler_of(folder / "unet")
    ),
}
BINARY_KINDS: dict[str, Kind] = {
    "shard": Kind(made(dataset_in, "shard-00000.parquet"), lambda folder: (digests(folder), read_dataset(folder))),
    "weights of a checkpoint": Kind(made(make_checkpoint, f"{STEP}/ema.safetensors"), load_checkpoint),
    "optimizer of a checkpoint": Kind(made(make_checkpoint, f"{STEP}/optimizer.pt"), load_checkpoint),
    "history of a checkpoint": Kind(made(make_checkpoint, f"{STEP}/history.jsonl"), load_checkpoint),
    "weights in diffusers' layout": Kind(
        made(make_weights, "unet/diffusion_pytorch_model.safetensors"),
        lambda folder: from_diffusers(folder / "unet")[1]["conv_out.bias"].tolist(),
    ),
    "reference statistics": Kind(make_reference, read_statistics),
    "chunk": Kind(make_chunk, lambda folder: load_chunk(folder, range(4))[0]["features"].tolist()),
}


def digests(folder: Path) -> list[tuple[str, bytes]]:
    return ShardedDataset.digests(folder / "shard-00000.parquet")


def damaged_values(value: Any) -> Iterator[Any]:
    """A JSON value with one part of it left out, or another in its place; then the same within its parts."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield {other: kept for other, kept in value.items() if other != key}
            yield from ({**value, key: other} for other in others(part))
        yield {**value, "of a later version": 1}
    elif isinstance(value, list) and value:
        yield value[1:]
        yield from ([other, *value[1:]] for other in others(value[0]))


def others(value: Any) -> Iterator[Any]:
    """What stands in the place of a value. A whole number is a number too, which only the tests' own checks tell from a float."""
    as_good = (int,) if isinstance(value, float) else ()
    yield from (other for other in OTHER_VALUES if type(other) not in as_good or abs(other) > 10**300)
    yield from damaged_values(value)


def damaged_texts(data: bytes) -> Iterator[bytes]:
    """A file that is cut, empty, of no text, of another value, or nested without end."""
    yield from (data[: len(data) * part // 9] for part in range(9))
    yield from (b"\0" * len(data), b"\xff" + data, b"\xef\xbb\xbf" + data, data + b"}", b"[" * 100_000)
    yield from (b"null", b"[]", b"[1]", b"3", b'"text"', b"{}", b"NaN", b"1" * 5000)


def outcome_of(read: Callable[[Path], object], folder: Path) -> object:
    """What a reader gives, or the error that says what is wrong."""
    try:
        return read(folder)
    except InputError as error:
        sentence = error
    assert "\n" not in str(sentence)
    assert 20 < len(str(sentence)) < 2000
    return sentence


@pytest.mark.parametrize("name", JSON_KINDS)
def test_a_damaged_json_file_is_a_sentence(tmp_path: Path, name: str) -> None:
    kind, folder = JSON_KINDS[name], tmp_path / "folder"
    folder.mkdir()
    path = kind.make(folder)
    good, data = kind.read(folder), path.read_bytes()
    path.write_bytes(data)  # the attempts of a night are counted when they are read
    for value in damaged_values(json.loads(data)):
        path.write_text(json.dumps(value, ensure_ascii=True), encoding="utf-8")
        outcome_of(kind.read, folder)
    for text in damaged_texts(data):
        path.write_bytes(text)
        outcome = outcome_of(kind.read, folder)
        assert outcome != good or outcome is None, text[:100]
    path.unlink()
    path.mkdir()
    outcome = outcome_of(kind.read, folder)
    assert outcome != good or outcome is None


@pytest.mark.parametrize("name", BINARY_KINDS)
def test_a_damaged_file_of_tensors_or_images_is_a_sentence(tmp_path: Path, name: str) -> None:
    kind, folder, order = BINARY_KINDS[name], tmp_path / "folder", random.Random(0)
    folder.mkdir()
    path = kind.make(folder)
    kind.read(folder)  # which raises nothing yet
    data = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1}
    damaged = [data[:length] for length in sorted(lengths)] + [
        data[:length] + bytes(len(data) - length) for length in lengths
    ]
    for _ in range(40):
        near = min(len(data), 400)  # the ends, where headers and footers are
        place = order.choice([order.randrange(len(data)), order.randrange(near), -1 - order.randrange(near)])
        changed = bytearray(data)
        changed[place] ^= order.randrange(1, 256)
        damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        outcome_of(kind.read, folder)
    path.unlink()
    path.mkdir()
    assert isinstance(outcome_of(kind.read, folder), InputError)
