"""Evaluation: the same numbers for any number of workers, any order and any kill; every sample exactly once."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.dinov2_weights import take_for_published, write_weights
from support.evaluation import numbers
from support.gaussian_case import normal, statistics_of, unchecked
from support.measured_run import measured_run
from support.places import on_disk
from support.processes import IMPORTED, wait_for, workers_of
from support.synthetic_shards import random_pixels, write_dataset
from support.training import NETWORK, OPTIM

from ddpm_core import images, rng
from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.configs import identity
from ddpm_core.errors import InputError
from ddpm_core.interop import to_diffusers
from ddpm_core.metrics.frechet import FeatureStatistics
from ddpm_core.rng import permutation
from ddpm_core.samplers import sample
from ddpm_core.training import averages_of
from ddpm_core.unet import UNet, UNetConfig
from pipelines.checkpoints.averages import kept_averages
from pipelines.checkpoints.network import NetworkHolder
from pipelines.checkpoints.retention import marked_steps
from pipelines.checkpoints.select import find_checkpoints
from pipelines.evaluate.config import EmaConfig, EvaluateConfig, GridConfig
from pipelines.evaluate.driver import (
    EvaluateResult,
    Evaluator,
    describe_grid,
    describe_lengths,
    evaluate,
    evaluate_grid,
    evaluate_lengths,
)
from pipelines.evaluate.evaluation import Evaluation, compare, read_evaluation
from pipelines.evaluate.extractor import describe_extractor
from pipelines.evaluate.measure import ChainPoint, Samples, chain_values, distance_values, measure, read_samples
from pipelines.evaluate.records import Records
from pipelines.evaluate.reference import (
    ShardFeatures,
    Sums,
    read_reference,
    reference_path,
    reference_statistics,
)
from pipelines.evaluate.subject import choose_subject, open_subject
from pipelines.evaluate.worker import stack_chain
from pipelines.preprocess.config import PreprocessConfig
from pipelines.preprocess.driver import preprocess
from pipelines.runtime.fan_out import Pool
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import chunk_path, chunk_ranges, load_chunk, save_chunk
from pipelines.storage.layout import open_storage
from pipelines.tracking.tracker import open_tracker
from pipelines.train.config import config_for
from pipelines.train.driver import train
from pipelines.train.session import TrainResult
from pipelines.train.worker import initial_state


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
        "run": str(trained.run.folder),
        "storage": str(storage),
        "extractor": "pixels",
        "samples": 130,
        "chunk_size": 20,
        "batch_size": 10,
        "sampler": "ddim",
        "sampler_steps": 3,
        "workers": 2,
        "report": False,
        "pictures": 0,
    }
    return EvaluateConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def undisturbed(trained: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> EvaluateResult:
    return evaluate(config(trained, tmp_path_factory.mktemp("evaluated")))


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
        noise = rng.SampleNoise(0, torch.arange(first, first + 10), (1, 8, 8), purpose="selection")
        with torch.no_grad():
            x = sample(diffusion, network, (10, 1, 8, 8), noise=noise, method="ddim", steps=3)
        pixels.append(images.to_uint8(x))
    ours = torch.cat(pixels).reshape(130, 64).double().numpy() / 255
    real = digits.pixels(range(1797)).reshape(1797, 64) / 255.0
    root = sqrtm(np.cov(ours.T) @ np.cov(real.T)).real
    distance = ((ours.mean(0) - real.mean(0)) ** 2).sum() + np.trace(np.cov(ours.T) + np.cov(real.T) - 2 * root)
    # float32 features on one side, float64 on the other; scipy's root of a nearly singular product is good to 1e-6.
    assert undisturbed.evaluations[-1].values["fd_pixels"] == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize(
    "choice",
    [
        {"sampler": "ddim", "eta": 0.5, "spacing": "logsnr"},
        {"sampler": "ancestral", "var_type": "fixedsmall", "spacing": "leading"},
    ],
)
def test_samples_are_those_of_the_core_by_any_choice(
    trained: TrainResult, tmp_path: Path, choice: dict[str, Any]
) -> None:
    lines: list[str] = []
    options = {"checkpoints": "latest", "samples": 20, "sampler_steps": 3, **choice}
    (evaluation,) = evaluate(config(trained, tmp_path, **options), lines.append).evaluations
    stored, _ = load_chunk(samples_of(evaluation), range(20))
    process = replace(trained.last.diffusion_config(), var_type=choice.get("var_type", "fixedlarge")).build()
    network = trained.last.network().eval()
    drawn = []
    for indices in (torch.arange(10), torch.arange(10, 20)):
        noise = rng.SampleNoise(0, indices, (1, 8, 8), purpose="selection")
        method, eta, spacing = choice["sampler"], choice.get("eta", 0.0), choice["spacing"]
        with torch.no_grad():
            x = sample(process, network, (10, 1, 8, 8), noise=noise, method=method, steps=3, eta=eta, spacing=spacing)
        drawn.append(images.to_uint8(x))
    assert torch.equal(stored["images"], torch.cat(drawn))
    assert not any("leave noise in the samples" in line for line in lines)
    if choice["sampler"] == "ancestral":
        own = evaluate(config(trained, tmp_path, **{**options, "var_type": "fixedlarge"}), lines.append)
        assert own.best.protocol.var_type is None  # it is the run's own
        assert any("3 of 1,000 ancestral steps leave noise in the samples under fixedlarge" in line for line in lines)
        with pytest.raises(InputError, match="--eta is 1 with --sampler ancestral"):
            config(trained, tmp_path, **{**options, "eta": 1.0})


@pytest.mark.slow
def test_a_grid_is_one_evaluation_for_each_of_its_cells(trained: TrainResult, tmp_path: Path) -> None:
    one = config(trained, tmp_path, checkpoints="latest", samples=20)
    grid = evaluate_grid(GridConfig(evaluate=one, steps=(2, 3), etas=(0.0, 1.0)))
    assert list(grid) == [(0.0, 2), (0.0, 3), (1.0, 2), (1.0, 3)]
    alone = evaluate(replace(one, sampler_steps=3, eta=1.0)).best
    assert alone == grid[1.0, 3]
    assert len({evaluation.distance for evaluation in grid.values()}) == 4
    head, *rows = (line.split() for line in describe_grid(grid))
    assert head == ["fd_pixels", "2", "steps", "3", "steps"]
    assert rows == [["eta", eta, *(f"{grid[float(eta), n].distance:.4g}" for n in (2, 3))] for eta in ("0", "1")]
    with pytest.raises(InputError, match="has 2 checkpoints, and a grid is of one"):
        evaluate_grid(GridConfig(evaluate=replace(one, checkpoints="all")))
    with pytest.raises(InputError, match="--sampler-steps is 5000"):
        evaluate_grid(GridConfig(evaluate=one, steps=(2, 5000)))


@pytest.fixture(scope="session")
def averaging(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A training that tracks the averages of post-hoc EMA and keeps one whole checkpoint."""
    settings = config_for(
        "tiny",
        shards=str(digits.path),
        storage=str(tmp_path_factory.mktemp("averaging")),
        unet=replace(NETWORK, dropout=0.0),
        optim=replace(OPTIM, posthoc_ema=True),
        steps=6,
        checkpoint_every=2,
        keep_last=1,
    )
    return train(settings)


@pytest.mark.slow
def test_ema_lengths_are_measured_by_their_own_weights_and_protocol(averaging: TrainResult, tmp_path: Path) -> None:
    assert sorted(kept_averages(averaging.run.folder)) == [2, 4]
    from mlflow import MlflowClient

    one, lines = config(averaging, tmp_path, samples=20), list[str]()
    measured = evaluate_lengths(EmaConfig(evaluate=one, lengths=(0.15, 0.05, 0.1)), lines.append)
    assert list(measured) == [0.05, 0.1, 0.15]
    assert len({each.protocol.fingerprint for each in measured.values()}) == 3
    assert len({each.distance for each in measured.values()}) == 3
    for length, each in measured.items():
        assert f"EMA weights of length {length:g}" in each.protocol.describe()
        assert each.values["ema_error"] == pytest.approx(0.15 if length == 0.15 else 0.0, abs=0.01)
    assert any("has averages of 3 steps to make an EMA of length 0.15 from" in line for line in lines)
    # The samples are those of the tracked average.
    network, diffusion = UNet(averaging.last.unet_config()), averaging.last.diffusion_config().build()
    network.load_state_dict(averages_of(averaging.last.averages(), "0.05"))
    noise = rng.SampleNoise(0, torch.arange(10), (1, 8, 8), purpose="selection")
    with torch.no_grad():
        x = sample(diffusion, network.eval(), (10, 1, 8, 8), noise=noise, method="ddim", steps=3)
    drawn = load_chunk(samples_of(measured[0.05]), range(20))[0]["images"][:10]
    assert torch.equal(drawn, images.to_uint8(x))
    *each_line, last = describe_lengths(measured)
    assert [line.split(" has ")[0] for line in each_line] == [
        f"EMA length {length}" for length in ("0.05", "0.1", "0.15")
    ]
    best = min(measured, key=lambda length: measured[length].distance)
    assert last.startswith(f"the best EMA length is {best:g}")
    assert marked_steps(averaging.run.folder) == set()  # that is of the training's own EMA
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    models = client.search_logged_models([each.experiment_id for each in client.search_experiments()])
    assert {model.name for model in models} == {
        f"{averaging.run.name}-step-6-ema-{length}" for length in ("0-05", "0-1", "0-15")
    }


def test_a_run_without_averages_or_raw_weights_have_no_other_ema_length(trained: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step-00000003' has no averages to make an EMA of length 0\.1 from"):
        choose_subject(config(trained, tmp_path, ema_length=0.1), open_storage(str(tmp_path)), print)
    with pytest.raises(InputError, match=r"--ema-length is 0\.1 with --weights raw: it belongs to ema"):
        config(trained, tmp_path, ema_length=0.1, weights="raw")
    with pytest.raises(InputError, match=r"--ema-length is 0\.5: give a number from 0\.01 to 0\.28"):
        config(trained, tmp_path, ema_length=0.5)


def samples_of(evaluation: Evaluation) -> Path:
    """The folder of an evaluation's chunks."""
    protocol = evaluation.protocol
    return on_disk(evaluation.folder).parents[1] / f"samples-{protocol.samples_fingerprint}" / evaluation.folder.name


def test_every_sample_is_there_once_and_the_first_ones_are_kept_as_images(undisturbed: EvaluateResult) -> None:
    folder = samples_of(undisturbed.evaluations[0])
    chunks = chunk_ranges(130, 20)
    assert len(list(folder.iterdir())) == len(chunks)
    stored = [load_chunk(folder, indices) for indices in chunks]
    assert [index for _, facts in stored for index in range(facts["first"], facts["stop"])] == list(range(130))
    assert sum(len(tensors["features"]) for tensors, _ in stored) == 130
    assert sum(len(tensors["images"]) for tensors, _ in stored) == 64


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
        if len(killed) < 2 and " | " in line:  # a unit is done
            pid = wait_for(lambda: workers_of("PoolWorker"))[0]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    result = evaluate(config(trained, tmp_path), kill_one)
    assert len(killed) == 2
    assert numbers(result.evaluations) == numbers(undisturbed.evaluations)


@pytest.mark.slow
def test_nobody_waits_for_a_worker_that_is_stopped(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    stopped: list[int] = []

    def stop_one(line: str) -> None:
        if not stopped and " | " in line:  # a unit is done
            stopped.append(wait_for(lambda: workers_of("PoolWorker"))[0])
            os.kill(stopped[0], signal.SIGSTOP)

    result = evaluate(config(trained, tmp_path), stop_one)
    with contextlib.suppress(ProcessLookupError):
        os.kill(stopped[0], signal.SIGCONT)
    assert numbers(result.evaluations) == numbers(undisturbed.evaluations)


def test_only_missing_and_damaged_chunks_are_made_again(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(on_disk(undisturbed.evaluations[0].folder).parents[3], storage)
    (finished,) = storage.glob("evaluate/*/*/step-00000003/manifest.json")
    finished.unlink()
    folder = samples_of(undisturbed.evaluations[0])
    folder = storage / folder.relative_to(on_disk(undisturbed.evaluations[0].folder).parents[3])
    first, second, third, fourth = (chunk_path(folder, range(n, n + 20)) for n in (40, 60, 80, 100))
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(bytes(damaged))
    second.write_bytes(second.read_bytes()[:100])
    third.unlink()
    untouched = fourth.stat().st_mtime_ns
    lines: list[str] = []
    again = evaluate(config(trained, storage), lines.append)
    assert any(line.startswith("evaluate: 60 of 60 samples") for line in lines)
    assert sum("is damaged" in line and line.endswith("it is made again") for line in lines) == 2
    assert fourth.stat().st_mtime_ns == untouched
    assert numbers(again.evaluations) == numbers(undisturbed.evaluations)
    lines.clear()
    assert numbers(evaluate(config(trained, storage), lines.append).evaluations) == numbers(undisturbed.evaluations)
    assert lines == [
        f"evaluate: {trained.run.name} is done, 2 checkpoints under protocol {again.best.protocol.fingerprint}"
    ]


def test_numbers_that_were_not_made_are_made_of_the_chunks_that_are_there_though_a_worker_dies(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(on_disk(undisturbed.evaluations[0].folder).parents[3], storage)
    for finished in storage.glob("evaluate/*/*/step-*/manifest.json"):
        finished.unlink()
    chunks = {path: path.stat().st_mtime_ns for path in storage.rglob("chunk-*.safetensors")}
    killer = threading.Thread(target=lambda: os.kill(wait_for(lambda: workers_of("PoolWorker"))[0], signal.SIGKILL))
    killer.start()
    again = evaluate(config(trained, storage))
    killer.join()
    assert numbers(again.evaluations) == numbers(undisturbed.evaluations)
    assert {path: path.stat().st_mtime_ns for path in storage.rglob("chunk-*.safetensors")} == chunks


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


def test_each_checkpoint_has_a_run_that_ranks_it_under_the_protocol(undisturbed: EvaluateResult) -> None:
    from mlflow import MlflowClient

    storage = undisturbed.evaluations[0].folder.parents[3]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_run(undisturbed.run_id).info.experiment_id
    protocol = undisturbed.best.protocol
    wanted = f"tags.`ddpm.kind` = 'checkpoint' AND tags.`ddpm.protocol` = '{protocol.fingerprint}'"
    ranked = client.search_runs([experiment], wanted, order_by=[f"metrics.`{protocol.distance}` ASC"])
    by_distance = sorted(undisturbed.evaluations, key=lambda evaluation: evaluation.distance)
    assert [run.data.metrics["step"] for run in ranked] == [evaluation.step for evaluation in by_distance]
    for run, evaluation in zip(ranked, by_distance, strict=True):
        assert run.info.run_name.startswith(f"step {evaluation.step} of ")
        assert evaluation.values.items() <= run.data.metrics.items()
        assert run.data.metrics["images_seen"] == evaluation.step * OPTIM.batch_size
        near = evaluation.indistinguishable_from(undisturbed.best)
        standing = "best" if evaluation == undisturbed.best else "not distinguishable" if near else "higher"
        assert run.data.tags["ddpm.standing"] == standing
    view = client.get_experiment(experiment).tags[f"mlflow.sharedViewState.{protocol.fingerprint}"]
    assert json.loads(view)["orderByKey"] == f"metrics.`{protocol.distance}`"
    assert json.loads(view)["searchFilter"] == wanted
    assert undisturbed.link.endswith(f"viewStateShareKey={protocol.fingerprint}")


def test_another_protocol_is_another_evaluation(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(on_disk(undisturbed.evaluations[0].folder).parents[3], storage)
    other = evaluate(config(trained, storage, seed=1, checkpoints="latest"))
    assert other.best.protocol.fingerprint != undisturbed.best.protocol.fingerprint
    assert other.best.distance != undisturbed.evaluations[-1].distance
    assert len(list(storage.glob("evaluate/*/samples-*"))) == 2


def test_reference_statistics_are_kept_with_the_shards_under_both_hashes(digits: ShardedDataset) -> None:
    extractor = describe_extractor("pixels", digits)
    with Pool(None, 0.5, lambda line: None) as pool:
        first = reference_statistics(digits, extractor, pool)
    path = reference_path(digits, extractor)
    assert digits.sha256[:12] in path.name
    assert extractor.sha256[:12] in path.name
    mean, covariance = first.statistics.moments()
    real = digits.pixels(range(1797)).reshape(1797, 64) / 255.0
    assert mean.numpy() == pytest.approx(real.mean(0), abs=1e-6)  # float32 features
    assert covariance.numpy() == pytest.approx(np.cov(real.T), abs=1e-6)
    stamp = path.stat().st_mtime_ns
    with Pool(None, 0.5, lambda line: None) as pool:
        reference_statistics(digits, extractor, pool)
    assert not pool.actors
    assert path.stat().st_mtime_ns == stamp


def test_any_number_of_neighbours_is_kept_in_a_file_of_its_own_and_named_by_the_protocol(tmp_path: Path) -> None:
    subject = measured_run(tmp_path, {1: 9.0})
    dataset, extractor = subject.references["train"], describe_extractor("pixels", subject.references["train"])
    every = ShardFeatures(extractor, dataset, 20).run(range(20))["features"]
    some = ShardFeatures(extractor, dataset, 7).run(range(20))
    place = torch.argsort(permutation(0, "reference", 0, 20))
    assert torch.equal(some["features"], every[place < 7])
    path = reference_path(dataset, extractor, 7)
    assert path != reference_path(dataset, extractor)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(some, path)
    assert torch.equal(read_reference(path, dataset, extractor, 7).features, some["features"])
    with pytest.raises(InputError, match="is of other images"):
        read_reference(path, dataset, extractor, 8)
    other = replace(subject, config=replace(subject.config, neighbours=50_000)).protocol("train", "selection")
    usual = subject.protocol("train", "selection")
    assert (usual.neighbours, other.neighbours) == (10_000, 50_000)
    assert usual.fingerprint != other.fingerprint
    assert usual.samples_fingerprint == other.samples_fingerprint
    assert "neighbours" not in identity(subject.config)


def test_an_evaluation_says_what_its_intervals_cover(tmp_path: Path) -> None:
    subject = measured_run(tmp_path, {1: 9.0, 2: 8.0})
    folder = subject.results(subject.protocol("train", "selection"))
    evaluations = tuple(read_evaluation(folder / checkpoint.path.name) for checkpoint in subject.checkpoints)
    lines = EvaluateResult("", "", evaluations, None, ()).describe()
    assert lines[1] == (
        "95 % intervals are of the mean fid of 1,000 samples over their seeds, of this training and against these reference "
        "images: other trainings have other means"
    )
    without = tuple(replace(each, values={"fid": each.distance}) for each in evaluations)
    assert not any("intervals are of" in line for line in EvaluateResult("", "", without, None, ()).describe())


def test_the_extrapolated_distance_has_an_interval_and_few_samples_have_neither(tmp_path: Path) -> None:
    protocol = measured_run(tmp_path, {1: 9.0}).protocol("train", "selection")
    reference = statistics_of(normal(0, 500, 3))
    every = 1.5 * normal(1, 200, 3)
    values = distance_values(every.split(50), every, reference, protocol)  # in too few chunks for the other interval
    assert values.keys() == {"fid", "fid_infinity", "fid_infinity_ci_low", "fid_infinity_ci_high"}
    assert values["fid_infinity_ci_low"] < values["fid_infinity"] < values["fid_infinity_ci_high"]
    assert distance_values(every[:30].split(15), every[:30], reference, protocol).keys() == {"fid"}


def test_features_of_dinov2_go_through_every_number_but_the_inception_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_for_published(write_weights(tmp_path / "model.safetensors"), monkeypatch)
    run = measured_run(tmp_path, {1: 9.0})
    dataset = run.references["train"]
    asked = replace(run.config, extractor="dinov2", samples=20)
    subject = open_subject(asked, run.run, run.checkpoints, open_storage(str(tmp_path)), print)
    sums, worker = Sums(20, subject.extractor), ShardFeatures(subject.extractor, dataset, 20)
    sums.merge(worker.run(range(20)))
    reference = sums.reference()
    assert reference.score is None
    features = reference.features + 0.01 * torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    samples = Samples([range(10), range(10, 20)], list(features.split(10)), images=torch.zeros(2, 8, 8, 1), seconds=1.0)
    protocol = subject.protocol("train", "selection")
    values = measure(samples, protocol, reference, dataset)
    assert {name for name in values if name.startswith(("fd", "is", "kid", "precision", "recall"))} == {
        *(f"{name}_dinov2-vitl14" for name in ("fd", "kid", "precision", "recall")),
        *(f"{name}_dinov2-vitl14{end}" for name in ("kid", "precision") for end in ("_ci_low", "_ci_high")),
        "kid_dinov2-vitl14_std",
    }
    measured = Evaluation(1, protocol, values, tmp_path)
    said = EvaluateResult("", "", (measured,), None, ()).describe()
    assert said[1] == "there is no Inception score, for dinov2-vitl14 has no classes"
    assert said[-2].startswith("best is step 1 with fd_dinov2-vitl14 ")
    assert chain_values([ChainPoint(3, reference.statistics, None)], reference.statistics)[0].keys() == {
        "t",
        "distance",
    }


def test_a_second_data_sets_reference_is_made_while_the_pool_holds_the_whole_cluster(
    ray_session: None, tmp_path: Path
) -> None:
    """As one worker does that has the only GPU. Workers of another kind would wait for it, and the pool for them."""
    one, other = (write_dataset(tmp_path / name, random_pixels(20, (8, 8, 1)), [20]) for name in ("one", "other"))
    with Pool(1, 4.0, lambda line: None) as pool:
        for dataset in (one, other):
            assert reference_statistics(dataset, describe_extractor("pixels", dataset), pool).statistics.n == 20
        assert len(pool.actors) == 1


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
    shards = tmp_path / "16"
    preprocess(PreprocessConfig(source=str(digits_lmdb), output=str(shards), image_size=16, channels=1))
    with pytest.raises(InputError, match=r"holds images 16x16x1, but run .* makes 8x8x1"):
        evaluate(config(trained, tmp_path / "storage", reference=str(shards)))


def test_damaged_weights_are_refused_not_sampled(trained: TrainResult, tmp_path: Path) -> None:
    folder = tmp_path / trained.run.name
    shutil.copytree(str(trained.run.folder), folder)
    victim = folder / "step-00000006" / "ema.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(InputError, match=r"ema\.safetensors"):
        evaluate(config(trained, tmp_path / "storage", run=str(folder), checkpoints="latest"))


def test_the_unet_of_a_checkpoint_is_the_one_that_was_trained(trained: TrainResult) -> None:
    assert trained.last.unet_config() == UNetConfig(**{**NETWORK.__dict__, "dropout": 0.0})


def test_the_best_is_measured_again_on_samples_it_was_not_chosen_by(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(on_disk(undisturbed.evaluations[0].folder).parents[3], storage)
    result = evaluate(config(trained, storage, report=True))
    assert numbers(result.evaluations) == numbers(undisturbed.evaluations)
    assert result.reported is not None
    assert result.reported.step == result.best.step
    assert (result.best.protocol.purpose, result.reported.protocol.purpose) == ("selection", "report")
    assert result.reported.distance != result.best.distance
    chosen, reported = result.best.interval, result.reported.interval
    assert chosen is not None
    assert reported is not None
    assert max(chosen[0], reported[0]) < min(chosen[1], reported[1])  # two draws from one checkpoint
    with pytest.raises(InputError, match=r"protocols .* differ"):
        result.reported.indistinguishable_from(result.best)


@pytest.mark.slow
def test_two_references_measure_the_same_samples(
    undisturbed: EvaluateResult, trained: TrainResult, digits: ShardedDataset, digits_lmdb: Path, tmp_path: Path
) -> None:
    storage, other = tmp_path / "storage", tmp_path / "test"
    shutil.copytree(on_disk(undisturbed.evaluations[0].folder).parents[3], storage)
    making = PreprocessConfig(source=str(digits_lmdb), output=str(other), image_size=8, channels=1, name="digits-test")
    preprocess(making)
    lines: list[str] = []
    both = evaluate(config(trained, storage, test_reference=str(other)), lines.append)
    assert not any("samples/s" in line for line in lines)  # none was drawn again
    assert numbers(both.evaluations) == numbers(undisturbed.evaluations)
    for against_train, against_test in zip(both.evaluations, both.test, strict=True):
        assert against_test.protocol.distance == "fd_pixels_test"
        # The same images in other shards: the sums' order differs, in float64.
        assert against_test.distance == pytest.approx(against_train.distance, rel=1e-9)
    making = replace(making, output=str(tmp_path / "box"), filter="box")
    preprocess(making)
    with pytest.raises(InputError, match=r"resized by filter 'box', but run .* resized by 'lanczos': preprocess"):
        evaluate(config(trained, storage, test_reference=making.output))


def test_kid_and_precision_are_the_librarys_on_the_stored_features(
    undisturbed: EvaluateResult, digits: ShardedDataset
) -> None:
    evaluation = undisturbed.evaluations[-1]
    chunks = [load_chunk(samples_of(evaluation), indices)[0]["features"] for indices in chunk_ranges(130, 20)]
    samples = torch.cat(chunks).double()
    real = torch.from_numpy(digits.pixels(range(1797)).reshape(1797, 64) / 255.0)
    near = torch.cdist(real, real).kthvalue(4, dim=1).values  # the third besides itself
    precision = (torch.cdist(samples, real) <= near).any(1).double().mean()
    assert evaluation.values["precision_pixels"] == pytest.approx(float(precision), abs=1e-12)
    # Unbiased on 100 subsets of 130 among 1,797: near the distance on everything, by its own spread over 10.
    whole = polynomial_mmd(samples.numpy(), real.numpy())
    spread = evaluation.values["kid_pixels_std"]
    assert abs(evaluation.values["kid_pixels"] - whole) < 5 * spread / 10


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    xx, yy = (kernel(a, a) for a in (x, y))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * kernel(x, y).mean())


def test_the_chains_predictions_are_measured_and_the_last_is_the_sample(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(on_disk(undisturbed.evaluations[0].folder).parents[3], storage)
    result = evaluate(config(trained, storage, checkpoints="latest", progress=3))
    assert numbers(result.evaluations) == numbers(undisturbed.evaluations[-1:])
    (evaluation,) = result.evaluations
    assert [point["t"] for point in evaluation.progress] == [999, 500, 0]
    # DDIM without noise ends at the x_0 that it predicted last.
    assert evaluation.progress[-1]["distance"] == evaluation.distance
    assert evaluation.progress[0]["distance"] != evaluation.distance
    lines: list[str] = []
    assert evaluate(config(trained, storage, checkpoints="latest"), lines.append) == result
    assert "is done, 1 checkpoint" in lines[-1]


def test_scores_along_the_chain_are_those_of_the_predictions_logits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    chunks, points, classes = [range(7), range(7, 12)], 2, 4
    logits = 3 * torch.randn(points, 12, classes, generator=generator)
    features = torch.randn(points, 12, 3, generator=generator)
    for indices in chunks:
        part = slice(indices.start, indices.stop)
        batches = [  # of 3 images
            [(features[p, part][i : i + 3], logits[p, part][i : i + 3]) for p in range(points)]
            for i in range(0, len(indices), 3)
        ]
        others = {"features": torch.zeros(len(indices), 3), "images": torch.zeros(len(indices), 1, 1, 1)}
        save_chunk(tmp_path, indices, {**stack_chain(batches), **others}, {"seconds": 1.0})
    reference = FeatureStatistics(3)
    reference.update(torch.randn(50, 3, generator=generator))
    found = chain_values(read_samples(tmp_path, chunks, (9, 0)).chain, reference)
    for point, these in zip(found, logits.double().softmax(-1).numpy(), strict=True):
        splits = np.split(these, [12 * split // 10 for split in range(1, 10)])
        scores = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in splits]
        assert point["score"] == pytest.approx(np.mean(scores), rel=1e-12)
    assert [point["t"] for point in found] == [9, 0]


@pytest.mark.slow
def test_a_checkpoint_that_the_training_removes_meanwhile_is_left_out(trained: TrainResult, tmp_path: Path) -> None:
    run = tmp_path / trained.run.name
    shutil.copytree(str(trained.run.folder), run)
    lines: list[str] = []

    def remove_the_last(line: str) -> None:
        lines.append(line)
        if " samples |" in line and (run / "step-00000006").exists():
            shutil.rmtree(run / "step-00000006")

    # One worker comes to step 6 after all chunks of step 3.
    result = evaluate(config(trained, tmp_path / "storage", run=str(run), workers=1), remove_the_last)
    assert [evaluation.step for evaluation in result.evaluations] == [3]
    assert sum("step 6 is skipped: the training removed it" in line for line in lines) == 1
    with Pool(1, 0.9, print) as pool:
        asked = config(trained, tmp_path / "storage", run=str(run), seed=1)
        storage = open_storage(asked.storage)
        subject = choose_subject(asked, storage, print)
        evaluator = Evaluator(subject, Records(subject, partial(open_tracker, asked, storage)), pool)
        shutil.rmtree(run)
        with pytest.raises(InputError, match="has lost every checkpoint that was to be evaluated"):
            evaluator.evaluate(subject.checkpoints, "selection")


@pytest.mark.slow
def test_bfloat16_is_another_protocol_near_float32(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    half = evaluate(config(trained, tmp_path, checkpoints="latest", precision="bfloat16")).best
    assert half.protocol == replace(undisturbed.evaluations[-1].protocol, precision="bfloat16")
    whole = undisturbed.evaluations[-1]
    assert half.distance != whole.distance
    # Of a bfloat16 product 8 bits are right, and three steps of DDIM average over many: 2 % of the distance.
    assert half.distance == pytest.approx(whole.distance, rel=0.02)


@pytest.mark.slow  # for the compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_a_compiled_network_is_the_same(trained: TrainResult) -> None:
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 10, 500, 999])
    with torch.no_grad(), unchecked():
        (_, eager), (_, compiled) = (
            NetworkHolder("ema", compile=compile).of(trained.last) for compile in (False, True)
        )
        # Rounding to float32, whose order of sums a compiler may choose, over some thirty layers of unit scale.
        torch.testing.assert_close(compiled(x, t), eager(x, t), rtol=0, atol=1e-5)


def test_a_run_that_was_trained_anew_is_evaluated_anew(
    undisturbed: EvaluateResult, trained: TrainResult, tmp_path: Path
) -> None:
    storage, run = tmp_path / "storage", tmp_path / trained.run.name
    shutil.copytree(on_disk(undisturbed.evaluations[0].folder).parents[3], storage)
    state = initial_state(config_for("tiny", shards="unused", unet=trained.last.unet_config(), optim=OPTIM, seed=1))
    state.load_state_dict({**state.state_dict(), "step": 6})
    write_checkpoint(run, snapshot(state), trained.last.config)
    other = evaluate(config(trained, storage, run=str(run / "step-00000006")))
    assert other.best.folder.parts[-3:] == undisturbed.evaluations[-1].folder.parts[-3:]
    assert other.best.distance != undisturbed.evaluations[-1].distance


def test_weights_in_the_diffusers_layout_are_evaluated_without_training(
    trained: TrainResult, digits: ShardedDataset, undisturbed: EvaluateResult, tmp_path: Path
) -> None:
    folder = tmp_path / "from-elsewhere"
    checkpoint = trained.last
    to_diffusers(folder, checkpoint.unet_config(), checkpoint.weights("ema"))
    scheduler = {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000, "variance_type": "fixed_large"}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    arguments: dict[str, Any] = {"run": None, "weights": str(folder), "reference": str(digits.path)}
    foreign = evaluate(config(trained, tmp_path, **arguments))
    (ours,) = numbers(foreign.evaluations)
    assert ours == numbers(undisturbed.evaluations)[-1]
    assert evaluate(config(trained, tmp_path, **arguments)) == foreign
    (folder / "scheduler_config.json").write_text(json.dumps({**scheduler, "beta_schedule": "sigmoid"}))
    with pytest.raises(InputError, match="'sigmoid', which has no counterpart here"):
        evaluate(config(trained, tmp_path, **arguments))


def test_a_checkpoint_is_found_by_its_model_in_mlflow(trained: TrainResult, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{trained.storage.root}/mlflow.db"
    client = MlflowClient(uri)
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "ddpm"]
    models = client.search_logged_models([experiment])
    wanted = next(model for model in models if model.params["step"] == "3")
    run, (checkpoint,) = find_checkpoints(wanted.model_id, "all", open_storage(str(tmp_path)), uri)
    assert (run.name, checkpoint.step) == (trained.run.name, 3)
    with pytest.raises(InputError, match="run 'm-unknown' is not known"):
        find_checkpoints("m-unknown", "all", open_storage(str(tmp_path)), uri)


def test_results_of_different_protocols_are_compared_only_on_request(undisturbed: EvaluateResult) -> None:
    one, other = undisturbed.evaluations
    assert re.search("overlap: indistinguishable$|is better$", compare(one, other))
    far = replace(
        other, values={**other.values, "fd_pixels": 99.0, "fd_pixels_ci_low": 98.0, "fd_pixels_ci_high": 100.0}
    )
    assert compare(one, far).endswith(f"do not overlap: {one.folder} is better")
    changed = replace(other, protocol=replace(other.protocol, sampler_steps=4))
    with pytest.raises(InputError, match=r"different protocols \(sampler_steps 3 and 4\)"):
        compare(one, changed)
    assert "DIFFERENT PROTOCOLS (sampler_steps 3 and 4)" in compare(one, changed, across_protocols=True)


SCRIPT = """
import json, sys
import conftest
from jobs.cli import run, say
from pipelines.evaluate.config import EvaluateConfig, GridConfig
from pipelines.evaluate.driver import evaluate
if __name__ == "__main__":
    run(lambda: evaluate(EvaluateConfig(**json.loads(sys.argv[1])), say))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group", "code"),
    [(signal.SIGKILL, True, -signal.SIGKILL), (signal.SIGTERM, False, 130)],
    ids=["killed with its cluster", "stopped as ray job stop does"],
)
def test_an_evaluation_goes_on_where_its_driver_ended(
    trained: TrainResult, tmp_path: Path, number: int, group: bool, code: int
) -> None:
    slow: dict[str, Any] = {"checkpoints": "latest", "sampler_steps": 100, "tracking_uri": None}
    whole = evaluate(config(trained, tmp_path / "whole", **slow))
    settings = config(trained, tmp_path / "ended", **slow)
    folder = tmp_path / "ended" / samples_of(whole.best).relative_to(tmp_path / "whole")
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(asdict(settings))],
        env={**os.environ, "PYTHONPATH": IMPORTED},
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(list(folder.glob("chunk-*"))) >= 2)
    finally:
        (os.killpg if group else os.kill)(driver.pid, number)
    assert driver.wait() == code
    there = sorted(folder.glob("chunk-*"))
    stamps = [path.stat().st_mtime_ns for path in there]
    assert 2 <= len(there) < 7
    again = evaluate(settings)
    assert [path.stat().st_mtime_ns for path in there] == stamps
    assert numbers(again.evaluations) == numbers(whole.evaluations)
