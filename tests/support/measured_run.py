"""A training whose checkpoints have numbers, without a training and without Ray: what its records in MLflow need."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.diffusion import DiffusionConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.evaluation import read_evaluation
from pipelines.evaluate.extractor import describe_extractor
from pipelines.evaluate.records import Records
from pipelines.evaluate.subject import Subject
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import Storage
from pipelines.storage.locations import Location, commit_json
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker
from pipelines.train.config import TrainConfig, config_for
from pipelines.train.worker import initial_state
from support.synthetic_shards import random_pixels, write_dataset
from support.training import NETWORK, OPTIM


def data_set(folder: Path) -> ShardedDataset:
    """Noise of the network's shape."""
    return write_dataset(folder / "shards", random_pixels(20, (8, 8, 1)), [20])


def training_config(shards: Location, storage: Path) -> TrainConfig:
    return config_for(
        "tiny",
        shards=str(shards),
        storage=str(storage),
        unet=NETWORK,
        optim=OPTIM,
        diffusion=DiffusionConfig(num_timesteps=20, beta_end=0.4),
    )


# What a real evaluation has beside the distance, its interval, IS and KID.
FURTHER = (
    "fid_infinity", "fid_infinity_ci_low", "fid_infinity_ci_high", "is_std", "is_ci_low", "is_ci_high", "kid_std",
    "kid_ci_low", "kid_ci_high", "precision", "precision_ci_low", "precision_ci_high", "recall", "recall_ci_low",
    "recall_ci_high", "samples_per_second", "saturation", "saturation_data", "spread"
)  # fmt: skip


def measured_run(
    storage: Path,
    distances: Mapping[int, float],
    *,
    name: str = "tiny-measured",
    width: float = 0.5,
    samples: int = 1000,
    further: Sequence[str] = (),
) -> Subject:
    """A run with a checkpoint and a finished evaluation for each step. further: metrics besides, each 0.5."""
    dataset = ShardedDataset.open(storage / "shards") if (storage / "shards").is_dir() else data_set(storage)
    settings = training_config(dataset.path, storage)
    run = Storage(storage).run(name)
    folder = storage / "train" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    state, checkpoints = initial_state(settings), []
    for step in distances:
        state.step = step
        checkpoints.append(write_checkpoint(folder, snapshot(state), asdict(settings)))
    subject = Subject(
        config=EvaluateConfig(run=name, samples=samples, storage=str(storage)),
        run=run,
        checkpoints=tuple(checkpoints),
        references={"train": dataset},
        extractor=replace(describe_extractor("pixels", dataset), name="inception-2015-12-05"),
        chunks=[range(samples)],
        timesteps=(),
    )
    protocol = subject.protocol("train", "selection")
    for checkpoint in checkpoints:
        distance = distances[checkpoint.step]
        ends = {"fid_ci_low": distance - width, "fid_ci_high": distance + width}
        facts = {
            "step": checkpoint.step,
            "protocol": asdict(protocol),
            "values": {"fid": distance, **ends, "is": 9.0, "kid": 0.01, **dict.fromkeys(further, 0.5)},
            "weights_sha256": checkpoint.weights_sha256("ema"),
            "progress": [],
        }
        commit_json(subject.results(protocol) / checkpoint.path.name / MANIFEST, facts)
    return subject


def record(tracker: Tracker, subject: Subject) -> TrackedRun:
    """Have the numbers recorded as an evaluation does, without pictures. The training's run, made if there is none."""
    training = tracker.run("train", subject.run.name, "f", params={"a": "1"}, tags={})
    records, protocols = Records(subject, lambda: tracker), subject.protocols("selection")
    with records.open(protocols) as runs:
        folder = subject.results(protocols["train"])
        evaluations = [read_evaluation(folder / checkpoint.path.name) for checkpoint in subject.checkpoints]
        for checkpoint, evaluation in zip(subject.checkpoints, evaluations, strict=True):
            records.log(runs["train"], checkpoint, protocols["train"], evaluation.values)
        records.rank(runs["train"], protocols["train"], subject.checkpoints, evaluations)
    return training
