"""Evaluation: the same numbers for any number of workers, any order and any kill; every sample exactly once."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import NETWORK, OPTIM, wait_for, workers_of

from ddpm_core import images, rng
from ddpm_core.errors import InputError
from ddpm_core.samplers import sample
from ddpm_core.unet import UNet, UNetConfig
from pipelines.evaluate import EvaluateConfig, EvaluateResult, chunk_ranges, evaluate
from pipelines.reference import extractor_for, reference_path, reference_statistics
from pipelines.results import Evaluation
from pipelines.shards import ShardedDataset
from pipelines.train import TrainResult, train
from pipelines.training_config import config_for


@pytest.fixture(scope="session")
def trained(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    storage = tmp_path_factory.mktemp("trained")
    config = config_for(
        "tiny",
        shards=str(digits.path),
        storage=str(storage),
        unet=replace(NETWORK, dropout=0.0),
        optim=OPTIM,
        steps=6,
        checkpoint_every=3,
        log_every=3,
    )
    return train(config)


def config(trained: TrainResult, storage: Path, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "run": str(trained.folder),
        "storage": str(storage),
        "extractor": "pixels",
        "samples": 130,
        "chunk_size": 20,
        "batch_size": 10,
        "sampler": "ddim",
        "sampler_steps": 3,
        "workers": 2,
    }
    return EvaluateConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def undisturbed(trained: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> EvaluateResult:
    return evaluate(config(trained, tmp_path_factory.mktemp("evaluated")))


def numbers(evaluations: tuple[Evaluation, ...]) -> list[dict[str, float]]:
    """What must be equal to the last bit: every value but the speed."""
    return [
        {key: value for key, value in evaluation.values.items() if key != "samples_per_second"}
        for evaluation in evaluations
    ]


def test_the_distance_is_that_of_a_second_implementation(
    undisturbed: EvaluateResult, trained: TrainResult, digits: ShardedDataset
) -> None:
    from scipy.linalg import sqrtm

    checkpoint = trained.last
    network = UNet(checkpoint.unet_config())
    network.load_state_dict(load_file(checkpoint.path / "ema.safetensors"))
    network.eval()
    diffusion = checkpoint.diffusion_config().build()
    pixels = []
    for first in range(0, 130, 10):
        noise = rng.SampleNoise(0, torch.arange(first, first + 10), (1, 8, 8))
        with torch.no_grad():
            x = sample(diffusion, network, (10, 1, 8, 8), noise=noise, method="ddim", steps=3)
        pixels.append(images.to_uint8(x))
    ours = torch.cat(pixels).reshape(130, 64).double().numpy() / 255
    real = digits.pixels(range(1797)).reshape(1797, 64) / 255.0
    root = sqrtm(np.cov(ours.T) @ np.cov(real.T)).real
    distance = ((ours.mean(0) - real.mean(0)) ** 2).sum() + np.trace(np.cov(ours.T) + np.cov(real.T) - 2 * root)
    # float32 features on one side, float64 on the other; scipy's root of a nearly singular product is good to 1e-6.
    assert undisturbed.evaluations[-1].values["fd_pixels"] == pytest.approx(distance, rel=1e-5)


def test_every_sample_is_there_once_and_the_first_ones_are_kept_as_images(undisturbed: EvaluateResult) -> None:
    folder = undisturbed.evaluations[0].folder
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("chunk-*.json"))]
    indices = [index for record in records for index in range(record["first"], record["stop"])]
    assert indices == list(range(130))
    stored = [load_file(path) for path in sorted(folder.glob("chunk-*.safetensors"))]
    assert sum(len(chunk["features"]) for chunk in stored) == 130
    assert sum(len(chunk.get("images", ())) for chunk in stored) == 64


def test_chunks_cover_exactly_what_was_asked_for() -> None:
    for samples, size in [(50_000, 500), (50_000, 333), (7, 100), (1, 1)]:
        ranges = chunk_ranges(samples, size)
        assert [index for chunk in ranges for index in chunk] == list(range(samples))


def test_one_worker_gives_the_same_numbers_as_two(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    alone = evaluate(config(trained, tmp_path, workers=1))
    assert numbers(alone.evaluations) == numbers(undisturbed.evaluations)


def test_killed_workers_change_nothing(undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one(line: str) -> None:
        if len(killed) < 2:
            pid = wait_for(lambda: workers_of("ChunkWorker"))[0]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    result = evaluate(config(trained, tmp_path), kill_one)
    assert len(killed) == 2
    assert numbers(result.evaluations) == numbers(undisturbed.evaluations)


def test_only_missing_and_damaged_chunks_are_made_again(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(undisturbed.evaluations[0].folder.parents[3], storage)
    (folder,) = storage.glob("evaluate/*/*/step-00000003")
    (folder / "manifest.json").unlink()
    (folder / "chunk-00004.safetensors").unlink()
    damaged = bytearray((folder / "chunk-00002.safetensors").read_bytes())
    damaged[-1] ^= 1
    (folder / "chunk-00002.safetensors").write_bytes(damaged)
    untouched = (folder / "chunk-00003.safetensors").stat().st_mtime_ns
    lines: list[str] = []
    again = evaluate(config(trained, storage), lines.append)
    assert any(line.startswith("evaluate: 40 of 40 samples") for line in lines)
    assert (folder / "chunk-00003.safetensors").stat().st_mtime_ns == untouched
    assert numbers(again.evaluations) == numbers(undisturbed.evaluations)
    lines.clear()
    assert numbers(evaluate(config(trained, storage), lines.append).evaluations) == numbers(undisturbed.evaluations)
    assert lines == [
        f"evaluate: {trained.name} is done, 2 checkpoints under protocol {again.best.protocol.fingerprint}"
    ]


def test_numbers_reach_mlflow_with_their_step_model_and_protocol(undisturbed: EvaluateResult) -> None:
    from mlflow import MlflowClient

    storage = undisturbed.evaluations[0].folder.parents[3]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    history = client.get_metric_history(undisturbed.run_id, "fd_pixels")
    assert {m.step: m.value for m in history} == {e.step: e.distance for e in undisturbed.evaluations}
    run = client.get_run(undisturbed.run_id)
    assert run.data.tags["ddpm.fingerprint"] == undisturbed.best.protocol.fingerprint
    order = [{"field_name": "metrics.fd_pixels", "ascending": True}]
    models = client.search_logged_models([run.info.experiment_id], order_by=order)
    assert models[0].params["step"] == str(undisturbed.best.step)


def test_another_protocol_is_another_evaluation(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(undisturbed.evaluations[0].folder.parents[3], storage)
    other = evaluate(config(trained, storage, seed=1, checkpoints="latest"))
    assert other.best.protocol.fingerprint != undisturbed.best.protocol.fingerprint
    assert other.best.distance != undisturbed.evaluations[-1].distance
    assert len(list(storage.glob("evaluate/*/*"))) == 2


def test_reference_statistics_are_kept_with_the_shards_under_both_hashes(digits: ShardedDataset) -> None:
    extractor = extractor_for("pixels", digits)
    first = reference_statistics(digits, "pixels", 0.5, lambda line: None)
    path = reference_path(digits, extractor)
    assert digits.sha256[:12] in path.name
    assert extractor.sha256[:12] in path.name
    mean, covariance = first.moments()
    real = digits.pixels(range(1797)).reshape(1797, 64) / 255.0
    assert mean.numpy() == pytest.approx(real.mean(0), abs=1e-6)  # float32 features
    assert covariance.numpy() == pytest.approx(np.cov(real.T), abs=1e-6)
    stamp = path.stat().st_mtime_ns
    reference_statistics(digits, "pixels", 0.5, lambda line: None)
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": "nobody"}, "run 'nobody' is not known: give one of those in .*none"),
        ({"checkpoints": "5"}, "has no checkpoint at step 5: it has 3, 6"),
        ({"checkpoints": "newest"}, "give all, latest, or steps"),
        ({"reference": "/nowhere"}, "'/nowhere' does not exist"),
        ({"extractor": "vgg"}, "unknown feature extractor 'vgg'"),
        ({"extractor": "/nowhere/net.pt"}, "/nowhere/net.pt"),
        ({"sampler_steps": 2000}, "has 1000 timesteps"),
        ({"workers": 99}, "the cluster has 4"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence_before_a_worker_starts(
    trained: TrainResult, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        evaluate(config(trained, tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("evaluate/*/*/*/chunk-*"))
    if "run" in changes:
        assert not list(tmp_path.iterdir())


def test_a_reference_of_another_size_is_refused(trained: TrainResult, tmp_path: Path, digits_lmdb: Path) -> None:
    from pipelines.preprocess import PreprocessConfig, preprocess

    shards = tmp_path / "16"
    preprocess(PreprocessConfig(source=str(digits_lmdb), output=str(shards), image_size=16, channels=1))
    with pytest.raises(InputError, match=r"holds images 16x16x1, but run .* makes 8x8x1"):
        evaluate(config(trained, tmp_path / "storage", reference=str(shards)))


def test_damaged_weights_are_refused_not_sampled(trained: TrainResult, tmp_path: Path) -> None:
    folder = tmp_path / trained.name
    shutil.copytree(str(trained.folder), folder)
    victim = folder / "step-00000006" / "ema.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(InputError, match=r"ema\.safetensors"):
        evaluate(config(trained, tmp_path / "storage", run=str(folder), checkpoints="latest"))


def test_the_unet_of_a_checkpoint_is_the_one_that_was_trained(trained: TrainResult) -> None:
    assert trained.last.unet_config() == UNetConfig(**{**NETWORK.__dict__, "dropout": 0.0})
