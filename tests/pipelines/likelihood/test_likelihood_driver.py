"""The likelihood: the core's numbers for any number of workers, any chunks and any kill, with a true error."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from support.processes import wait_for, workers_of
from support.short_run import short_run

from ddpm_core import rng
from ddpm_core.checkpoint import open_checkpoint
from ddpm_core.errors import InputError
from ddpm_core.likelihood import Bound, rate_distortion, variational_bound
from ddpm_core.protocol import fingerprint
from ddpm_core.unet import UNet
from jobs.cli import parse
from pipelines.likelihood.bound import merge_chunks
from pipelines.likelihood.config import LikelihoodConfig
from pipelines.likelihood.driver import LikelihoodResult, make_protocol, measure_likelihood
from pipelines.likelihood.result import Likelihood
from pipelines.likelihood.worker import LikelihoodChunk, LikelihoodWorker, choose_images
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.chunks import chunk_ranges, load_chunk
from pipelines.tracking.tracker import Tracker

T, IMAGES, BATCH, CHUNK = 20, 130, 10, 20


@pytest.fixture(scope="module")
def trained(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of a short chain."""
    return short_run(digits, tmp_path_factory.mktemp("tiny-run"), T)


def config(trained: Path, storage: Path, **changes: Any) -> LikelihoodConfig:
    values: dict[str, Any] = {
        "run": str(trained),
        "storage": str(storage),
        "images": IMAGES,
        "batch_size": BATCH,
        "chunk_size": CHUNK,
        "workers": 2,
    }
    return LikelihoodConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of `undisturbed`."""
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def undisturbed(trained: Path, storage: Path) -> LikelihoodResult:
    uri = f"sqlite:///{storage}/mlflow.db"
    Tracker(uri, "ddpm", storage / "mlartifacts" / "ddpm").run(
        "train", trained.name, "", params={}, tags={}
    )  # as train() has it
    return measure_likelihood(config(trained, storage, checkpoints="all"))


def folder_of(storage: Path, step: int) -> Path:
    (folder,) = storage.glob(f"evaluate/*/likelihood-*/step-{step:08d}")
    return folder


def totals(folder: Path, size: int = CHUNK) -> torch.Tensor:
    """Each image's bits/dim, from the chunks' files."""
    parts = []
    for indices in chunk_ranges(IMAGES, size):
        stored, _ = load_chunk(folder, indices)
        assert all(tensor.dtype == torch.float64 and len(tensor) == len(indices) for tensor in stored.values())
        parts.append(stored["total"] if "total" in stored else stored["prior"] + stored["terms"].sum(1))
    return torch.cat(parts)


def test_the_numbers_are_those_of_the_core_called_once(
    undisturbed: LikelihoodResult, storage: Path, trained: Path, digits: ShardedDataset
) -> None:
    checkpoint = open_checkpoint(trained / "step-00000006")
    network = UNet(checkpoint.unet_config())
    network.load_state_dict(load_file(checkpoint.path / "ema.safetensors"))
    diffusion = checkpoint.diffusion_config().build()
    parts = []
    for numbers in choose_images(0, len(digits), IMAGES).split(BATCH):
        noise = rng.SampleNoise(0, numbers, (1, 8, 8), purpose="likelihood")
        parts.append(variational_bound(diffusion, network.eval(), digits.images(numbers.numpy()), noise))
    bound = Bound(*(torch.cat([getattr(part, name) for part in parts]) for name in ("terms", "prior", "mse")))
    assert torch.equal(totals(folder_of(storage, 6)), bound.total)  # every bit, for the batches are the same
    likelihood = undisturbed.likelihoods[-1]
    error = float(bound.total.std()) / IMAGES**0.5
    mean = float(bound.total.mean())
    # 1.9785 is Student's t for 95 % and 129 degrees of freedom, from a table; the code's is good to 3e-3.
    expected = {
        "bpd": mean,
        "bpd_se": error,
        "bpd_ci_low": pytest.approx(mean - 1.9785 * error, abs=3e-3 * 2 * error),
        "bpd_ci_high": pytest.approx(mean + 1.9785 * error, abs=3e-3 * 2 * error),
        # Sums of the same float64 numbers in another order, from here on.
        "rate_bpd": pytest.approx(float((bound.prior + bound.terms[:, 1:].sum(1)).mean()), rel=1e-12),
        "distortion_bpd": pytest.approx(float(bound.terms[:, 0].mean()), rel=1e-12),
        "prior_bpd": pytest.approx(float(bound.prior.mean()), rel=1e-12),
        "rmse": pytest.approx(float(rate_distortion(bound).distortion[0]), rel=1e-12),
    }
    assert likelihood.values == expected
    assert likelihood.curves == {
        "t": list(range(1, T + 1)),
        "terms_bpd": pytest.approx(bound.terms.mean(0).tolist(), rel=1e-12),
        "rate_bpd": pytest.approx(rate_distortion(bound).rate.tolist(), rel=1e-12),
        "rmse": pytest.approx(rate_distortion(bound).distortion.tolist(), rel=1e-12),
        "rmse_mean_of_roots": pytest.approx((127.5 * bound.mse.sqrt().mean(0)).tolist(), rel=1e-12),
    }
    assert undisturbed.likelihoods[0].values["bpd"] != mean  # another step's


@pytest.mark.slow
def test_one_worker_and_other_chunks_give_every_bit_of_the_same_numbers(
    undisturbed: LikelihoodResult, storage: Path, trained: Path, tmp_path: Path
) -> None:
    alone = measure_likelihood(config(trained, tmp_path, workers=1, chunk_size=45))
    assert alone.likelihoods == undisturbed.likelihoods[-1:]  # protocol, values and curves
    assert torch.equal(totals(folder_of(tmp_path, 6), size=50), totals(folder_of(storage, 6)))  # 45, in whole batches


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(
    undisturbed: LikelihoodResult, storage: Path, trained: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(line: str) -> None:
        if not killed and " | " in line:  # a unit is done
            killed.append(wait_for(lambda: workers_of("PoolWorker"))[0])
            os.kill(killed[-1], signal.SIGKILL)

    result = measure_likelihood(config(trained, tmp_path), kill_one)
    assert killed
    assert result.likelihoods == undisturbed.likelihoods[-1:]
    assert torch.equal(totals(folder_of(tmp_path, 6)), totals(folder_of(storage, 6)))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def of_other_weights(path: Path) -> None:
    """The same values under a record that names other weights, and is whole."""
    header = path.read_bytes()
    facts = json.loads(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["ddpm"])
    save_file(load_file(path), path, metadata={"ddpm": json.dumps({**facts, "weights_sha256": "0" * 64})})


def test_only_what_is_missing_damaged_or_of_other_weights_is_made_again(
    undisturbed: LikelihoodResult, storage: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(storage, tmp_path, dirs_exist_ok=True)
    folder = folder_of(tmp_path, 6)
    (folder / "manifest.json").unlink()
    chunks = sorted(folder.glob("chunk-*"))
    damage: dict[int, Callable[[Path], None]] = {1: Path.unlink, 3: flip_a_bit, 4: of_other_weights}
    for number, harm in damage.items():
        harm(chunks[number])
    kept = {path: path.stat().st_mtime_ns for number, path in enumerate(chunks) if number not in damage}
    lines: list[str] = []
    again = measure_likelihood(config(trained, tmp_path, checkpoints="all", workers=1), lines.append)
    assert again.likelihoods == undisturbed.likelihoods
    assert [line for line in lines if "damaged" in line] == [
        f"likelihood: chunk {str(chunks[3])!r} is damaged: it is made again"
    ]
    assert [line.split(" | ")[0] for line in lines if " | " in line][-1] == "likelihood: 60 of 60 images"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_the_same_command_again_does_nothing_but_what_mlflow_lacks(
    undisturbed: LikelihoodResult, storage: Path, trained: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    stamps = {path: path.stat().st_mtime_ns for path in storage.glob("evaluate/*/*/*/*")}
    assert measure_likelihood(config(trained, storage, checkpoints="all"), lines.append) == undisturbed
    (digest,) = {path.parent.parent.name.removeprefix("likelihood-") for path in stamps}
    assert lines == [f"likelihood: {trained.name} is done, 2 checkpoints under protocol {digest}"]
    assert {path: path.stat().st_mtime_ns for path in storage.glob("evaluate/*/*/*/*")} == stamps

    folder = storage / "evaluate" / trained.name / f"likelihood-{digest}"
    again = parse(LikelihoodConfig, ["--config", str(folder / "config.toml")], description="")
    assert again == config(trained, storage, checkpoints="all")

    elsewhere = f"sqlite:///{tmp_path}/other.db"  # a driver killed between manifest and MLflow left it like this
    other = measure_likelihood(config(trained, storage, tracking_uri=elsewhere))
    assert other.likelihoods == undisturbed.likelihoods[-1:]
    history = MlflowClient(elsewhere).get_metric_history(other.run_id, "rmse")
    assert [(m.step, m.value) for m in history] == [(6, undisturbed.likelihoods[-1].values["rmse"])]


def test_mlflow_has_the_numbers_at_their_step_model_and_data(
    undisturbed: LikelihoodResult, storage: Path, trained: Path, digits: ShardedDataset
) -> None:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(undisturbed.run_id)
    digest = folder_of(storage, 6).parent.name.removeprefix("likelihood-")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"{trained.name}-likelihood-{digest[:6]}"
    assert run.data.tags["ddpm.kind"] == "likelihood"
    assert run.data.tags["ddpm.fingerprint"] == digest
    assert run.data.params["images"] == str(IMAGES)
    steps = {likelihood.step: likelihood for likelihood in undisturbed.likelihoods}
    assert list(steps) == [3, 6]
    for step, likelihood in steps.items():
        for name, value in likelihood.values.items():
            history = client.get_metric_history(undisturbed.run_id, name)
            assert {m.step: m.value for m in history}[step] == value
        (artifact,) = storage.glob(f"mlartifacts/*/{run.info.run_id}/artifacts/likelihood/step-{step:08d}.json")
        assert json.loads(artifact.read_text()) == asdict(likelihood)
    parent = run.data.tags["mlflow.parentRunId"]
    assert client.get_run(parent).info.run_name == trained.name
    for model in client.search_logged_models([run.info.experiment_id]):
        assert model.source_run_id == parent  # the training's, where the evaluation finds it too
        metric = next(metric for metric in model.metrics or [] if metric.key == "bpd")
        assert metric.value == steps[int(model.params["step"])].values["bpd"]
        assert (metric.dataset_name, metric.dataset_digest) == (f"{digits.name}-{digest[:6]}", digest)


def test_the_images_are_the_first_of_a_permutation_and_all_by_default() -> None:
    few, more = (choose_images(0, 1797, count).tolist() for count in (30, 90))
    assert len(set(more)) == 90
    assert set(few) < set(more) < set(range(1797))
    assert few == sorted(few)
    assert few != choose_images(1, 1797, 30).tolist()
    assert choose_images(0, 1797, 1797).tolist() == list(range(1797))


@pytest.mark.slow
def test_an_estimate_of_few_terms_covers_the_full_bound(
    undisturbed: LikelihoodResult, storage: Path, trained: Path, tmp_path: Path
) -> None:
    full = undisturbed.likelihoods[-1].values
    (estimate,) = measure_likelihood(config(trained, tmp_path, strata=4, workers=1)).likelihoods
    for exact in ("prior_bpd", "distortion_bpd", "rmse"):  # the same L_0 of the same x_1
        assert estimate.values[exact] == pytest.approx(full[exact], rel=1e-12)
    assert estimate.curves is None
    # Given an image both are unbiased, and images draw independently: the mean difference is within 4 of its standard
    # errors but for 1 seed in 10,000.
    difference = totals(folder_of(tmp_path, 6)) - totals(folder_of(storage, 6))
    assert float(difference.std()) > 0
    assert abs(estimate.values["bpd"] - full["bpd"]) < 4 * float(difference.std()) / IMAGES**0.5
    assert estimate.values["bpd_se"] == pytest.approx(
        float(totals(folder_of(tmp_path, 6)).std()) / IMAGES**0.5, rel=1e-12
    )


def measure_without_ray(trained: Path, digits: ShardedDataset, folder: Path, **changes: Any) -> Likelihood:
    """A measurement of one chunk by the worker itself."""
    checkpoint = open_checkpoint(trained / "step-00000006")
    settings = config(trained, folder, **changes)
    protocol = make_protocol(settings, trained.name, checkpoint, digits)
    images = choose_images(protocol.seed, len(digits), protocol.images)
    whole = range(protocol.images)
    LikelihoodWorker(protocol, digits).run(LikelihoodChunk(whole, images, checkpoint, folder))
    return Likelihood(6, checkpoint.weights_sha256(protocol.weights), T, protocol, *merge_chunks(folder, [whole]))


def test_an_estimate_that_draws_every_term_is_the_full_bound(
    storage: Path, undisturbed: LikelihoodResult, trained: Path, digits: ShardedDataset, tmp_path: Path
) -> None:
    measure_without_ray(trained, digits, tmp_path, strata=T - 1)
    # The same float64 terms, added one by one: T roundings at most.
    expected = totals(folder_of(storage, 6))
    torch.testing.assert_close(totals(tmp_path, size=IMAGES), expected, rtol=T * 2.0**-52, atol=0.0)


def test_what_decides_the_numbers_decides_the_protocol(trained: Path, digits: ShardedDataset, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"images": 30},
        {"weights": "raw"},
        {"cdf": "tanh"},
        {"strata": 3},
        {"var_type": "fixedsmall"},
        {"batch_size": 20},
        {"var_type": "fixedlarge"},  # the run's own
    ]
    likelihoods = [
        measure_without_ray(trained, digits, tmp_path / str(change), **{"images": 20, "batch_size": 10, **change})
        for change in changes
    ]
    assert len({each.values["bpd"] for each in likelihoods[:7]}) == 7
    assert likelihoods[7].values["bpd"] == pytest.approx(
        likelihoods[0].values["bpd"], rel=1e-6
    )  # float32's last digits at most
    assert likelihoods[8] == likelihoods[0]
    assert len({fingerprint(each.protocol) for each in likelihoods}) == 8
    assert likelihoods[6].describe().endswith("sigma^2 fixedsmall")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "nobody"}, "run 'nobody' is not known: give one of those in .*none"),
        ({"checkpoints": "5"}, "has no checkpoint at step 5: it has 3, 6"),
        ({"data": "/nowhere"}, "'/nowhere' does not exist"),
        (
            {"images": 1798},
            r"--images is 1,798: data set '.*' holds 1,797, and an interval needs 5 or more",
        ),
        ({"images": 4}, "--images is 4: data set .* an interval needs 5 or more"),
        ({"images": 0}, "--images is 0: give a positive number"),
        ({"strata": 20}, r"--strata is 20: run '.*' has 19 terms L_1..L_19 to draw from"),
        ({"strata": -1}, "--strata is -1: give a positive number"),
        ({"workers": 99}, "the cluster has 4"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence_and_leaves_nothing_behind(
    trained: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        measure_likelihood(config(trained, tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_images_of_another_size_are_refused_before_an_mlflow_run_is_made(
    trained: Path, tmp_path: Path, digits_lmdb: Path
) -> None:
    from pipelines.preprocess.config import PreprocessConfig
    from pipelines.preprocess.driver import preprocess

    preprocess(PreprocessConfig(source=str(digits_lmdb), output=str(tmp_path / "16"), image_size=16, channels=1))
    with pytest.raises(InputError, match=r"holds images 16x16x1, but run '.*' codes 8x8x1: give images") as caught:
        measure_likelihood(config(trained, tmp_path / "storage", data=str(tmp_path / "16")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "storage").exists()


def test_damaged_weights_are_refused_not_measured(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / trained.name
    shutil.copytree(trained, folder)
    flip_a_bit(folder / "step-00000006" / "ema.safetensors")
    with pytest.raises(InputError, match=r"damaged file 'ema\.safetensors'"):
        measure_likelihood(config(trained, tmp_path / "storage", run=str(folder), workers=1))
    assert not list(tmp_path.glob("storage/evaluate/*/*/*/*"))


@pytest.mark.parametrize(
    ("strata", "how"), [(None, "full bound of 1,000 terms"), (32, "estimate from 33 of 1,000 terms")]
)
def test_a_measurement_is_described_in_words(undisturbed: LikelihoodResult, strata: int | None, how: str) -> None:
    protocol = replace(undisturbed.likelihoods[0].protocol, images=1000, data="cifar10/test", strata=strata)
    values = {"bpd": 3.7512, "bpd_ci_high": 3.7734}
    likelihood = Likelihood(790_000, "", 1000, protocol, values, None)
    assert likelihood.describe() == f"step 790,000: 3.751 +- 0.022 bits/dim on 1,000 images of cifar10/test, {how}"
