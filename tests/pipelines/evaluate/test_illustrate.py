"""Pictures and neighbours of a checkpoint: what they say they are, made once, and the same after any loss."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from support.evaluation import numbers
from support.imports import loaded_by_job
from support.short_run import short_run

from ddpm_core import images, rng
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.latents import encode
from ddpm_core.protocol import Protocol
from ddpm_core.samplers import sample_steps, select_timesteps
from pipelines.checkpoints.network import NetworkHolder
from pipelines.checkpoints.store import saved_checkpoints
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.driver import EvaluateResult, evaluate
from pipelines.evaluate.extractor import describe_extractor, load_for
from pipelines.evaluate.illustrate.neighbours import SPACES, find_neighbours
from pipelines.evaluate.illustrate.painter import Painter
from pipelines.evaluate.illustrate.pictures import PictureProtocol
from pipelines.runtime.fan_out import Pool
from pipelines.shards.dataset import ShardedDataset

ROWS, STEPS, T = 2, 5, 20
PROTOCOL = Protocol(
    num_samples=6,
    seed=3,
    sampler="ddim",
    sampler_steps=3,
    spacing="uniform",
    clip_denoised=True,
    weights="ema",
    batch_size=6,
    precision="float32",
    extractor="pixels",
    extractor_sha256="0",
    resize="none",
    reference="digits",
    reference_sha256="0",
    reference_images=1797,
)


@pytest.fixture(scope="module")
def trained(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved_checkpoints(short_run(digits, tmp_path_factory.mktemp("run"), T))[-1]


def illustrated_config(trained: Checkpoint, storage: Path, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "run": str(trained.path),
        "storage": str(storage),
        "extractor": "pixels",
        "samples": 40,
        "chunk_size": 20,
        "batch_size": 10,
        "sampler": "ancestral",
        "sampler_steps": STEPS,
        "workers": 2,
        "pictures": ROWS,
        "nearest": 12,
    }
    return EvaluateConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def illustrated(trained: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluateResult, Path]:
    storage = tmp_path_factory.mktemp("illustrated")
    return evaluate(illustrated_config(trained, storage)), storage


def artifact(storage: Path, run_id: str, name: str) -> bytes:
    uri = f"sqlite:///{storage}/mlflow.db"
    return Path(MlflowClient(tracking_uri=uri).download_artifacts(run_id, name)).read_bytes()


def picture(illustrated: tuple[EvaluateResult, Path], kind: str) -> tuple[np.ndarray, dict[str, Any]]:
    """(tiles [rows, columns, h, w], what stands beside them)."""
    result, storage = illustrated
    folder = f"pictures/{result.best.folder.name}"
    every = json.loads(artifact(storage, result.run_id, f"{folder}/pictures.json"))
    facts = next(each for each in every if each["kind"] == kind)
    grid = np.array(Image.open(io.BytesIO(artifact(storage, result.run_id, f"{folder}/{facts['file']}"))))
    (height, width), rows, columns = facts["tile"], facts["rows"], facts["columns"]
    assert (len(facts["row_labels"]), len(facts["column_labels"])) == (rows, columns)
    return grid.reshape(rows, height, columns, width).transpose(0, 2, 1, 3), facts


def test_progressive_rows_are_predictions_of_chains_with_addressed_noise(
    illustrated: tuple[EvaluateResult, Path], trained: Checkpoint
) -> None:
    tiles, facts = picture(illustrated, "progressive")
    diffusion, network = NetworkHolder("ema").of(trained)
    noise = rng.SampleNoise(0, torch.arange(ROWS), (1, 8, 8), purpose="pictures-progressive")
    with torch.no_grad():
        chain = list(sample_steps(diffusion, network, (ROWS, 1, 8, 8), noise=noise, steps=STEPS))
    assert facts["column_labels"] == [f"t = {step.t + 1:,}" for step in chain]
    for column, step in enumerate(chain):
        assert np.array_equal(tiles[:, column], images.to_uint8(step.pred_xstart)[..., 0].numpy())


def test_shared_tiles_show_the_latent_of_the_chain_at_the_bottom_right(
    illustrated: tuple[EvaluateResult, Path], trained: Checkpoint
) -> None:
    tiles, facts = picture(illustrated, "shared")
    diffusion, network = NetworkHolder("ema").of(trained)
    noise = rng.SampleNoise(0, torch.arange(ROWS), (1, 8, 8), purpose="pictures-latents")
    with torch.no_grad():
        chain = list(sample_steps(diffusion, network, (ROWS, 1, 8, 8), noise=noise, steps=STEPS))
    stops = select_timesteps(T, STEPS)[:-1]
    latents = {T: noise(T)} | {t + 1: step.x for t, step in zip(reversed(stops), chain, strict=False)}
    depths = [int(label.removeprefix("share x_")) for label in facts["column_labels"]]
    assert depths[0] == T
    assert len(depths) == 4
    for column, depth in enumerate(depths):
        assert np.array_equal(tiles[:, column, 8:, 8:], images.to_uint8(latents[depth])[..., 0].numpy())
        samples = [tiles[:, column, :8, :8], tiles[:, column, :8, 8:], tiles[:, column, 8:, :8]]
        assert not np.array_equal(samples[0], samples[1])
        assert not np.array_equal(samples[1], samples[2])


def test_samples_of_a_latent_differ_with_a_deterministic_sampler_too(
    trained: Checkpoint, digits: ShardedDataset
) -> None:
    protocol = PictureProtocol(
        rows=1,
        seed=0,
        sampler="ddim",
        sampler_steps=STEPS,
        spacing="uniform",
        weights="ema",
        precision="float32",
        data=digits.name,
        data_sha256=digits.sha256,
    )
    diffusion, network = NetworkHolder("ema").of(trained)
    (tile,) = (
        Painter(protocol, digits)
        ._shared(diffusion, network, protocol.depths("shared", trained.diffusion_config())[1])[0, :, ..., 0]
        .numpy()
    )
    first, second, third = tile[:8, :8], tile[:8, 8:], tile[8:, :8]
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_interpolations_run_from_one_real_image_to_another(
    illustrated: tuple[EvaluateResult, Path], trained: Checkpoint, digits: ShardedDataset
) -> None:
    tiles, _ = picture(illustrated, "interpolation")
    fine, facts = picture(illustrated, "coarse_to_fine")
    order = rng.permutation(0, "pictures-sources", 0, len(digits))[: 2 * ROWS].numpy()
    sources = digits.pixels(order)[..., 0]
    assert np.array_equal(tiles[:, 0], sources[0::2])
    assert np.array_equal(tiles[:, -1], sources[1::2])
    assert facts["row_labels"][0] == f"{T} steps"
    assert facts["row_labels"][-1] == "0 steps"
    # After 0 steps the mix is of pixels: the reconstruction is the source itself, the middle their mean.
    assert np.array_equal(fine[-1, 1], sources[0])
    mean = images.to_uint8(images.to_float(torch.from_numpy(digits.pixels(order[:2]))).mean(0, keepdim=True))
    assert np.array_equal(fine[-1, 6], mean[0, ..., 0].numpy())


def test_interpolated_latents_are_eq_4_with_one_noise_for_all_weights(
    illustrated: tuple[EvaluateResult, Path], trained: Checkpoint, digits: ShardedDataset
) -> None:
    tiles, _ = picture(illustrated, "interpolation")
    diffusion, network = NetworkHolder("ema").of(trained)
    half = T // 2
    order = rng.permutation(0, "pictures-sources", 0, len(digits))[:2].numpy()
    ends = digits.images(order)
    noise = rng.normal(0, "pictures-encoder", torch.arange(2), 0, (1, 8, 8))
    middle = encode(diffusion, ends, half, noise).mean(0, keepdim=True)
    later = rng.SampleNoise(0, torch.arange(1), (1, 8, 8), purpose="pictures-between")
    with torch.no_grad():
        chain = sample_steps(diffusion, network, (1, 1, 8, 8), noise=later, steps=STEPS, start=(middle, half - 1))
        *_, last = chain
    # One image, not one of eleven: the last bits of float32 differ, and with them now and then a rounding.
    difference = tiles[0, 6].astype(int) - images.to_uint8(last.x)[0, ..., 0].numpy().astype(int)
    assert np.abs(difference).max() <= 1


def test_lost_or_damaged_parts_of_pictures_are_made_again_alike(
    illustrated: tuple[EvaluateResult, Path], trained: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, storage = illustrated
    parts = sorted((storage / "evaluate").rglob("pictures-*/*/*/chunk-*"))
    neighbours = sorted((storage / "evaluate").rglob("neighbours-*/chunk-*"))
    before = {path: path.read_bytes() for path in [*parts, *neighbours]}
    stamps = {path: path.stat().st_mtime_ns for path in before}
    written: list[str] = []
    monkeypatch.setattr("pipelines.tracking.run.TrackedRun.log_bytes", lambda self, name, data: written.append(name))
    evaluate(illustrated_config(trained, storage))
    assert {path: path.stat().st_mtime_ns for path in before} == stamps
    parts[0].unlink()
    neighbours[0].unlink()
    parts[1].write_bytes(before[parts[1]][:-1] + b"x")
    lines: list[str] = []
    evaluate(illustrated_config(trained, storage), lines.append)
    assert {path: path.read_bytes() for path in before} == before
    assert any(str(parts[1]) in line and "damaged" in line for line in lines)
    assert written == []


def test_an_evaluation_with_pictures_is_found_done_without_torch_and_ray(
    illustrated: tuple[EvaluateResult, Path], trained: Checkpoint
) -> None:
    _, storage = illustrated
    config = illustrated_config(trained, storage)
    names = (
        "run",
        "storage",
        "extractor",
        "samples",
        "chunk_size",
        "batch_size",
        "sampler",
        "sampler_steps",
        "pictures",
    )
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    modules = loaded_by_job("evaluate.py", "--mode", "exact", *options)
    assert "mlflow" in modules
    assert not modules & {"torch", "ray", "torchmetrics"}


@pytest.mark.slow
def test_looking_up_more_samples_later_leaves_the_numbers_alone(trained: Checkpoint, tmp_path: Path) -> None:
    few = evaluate(illustrated_config(trained, tmp_path, samples=90, pictures=0, nearest=0))
    lines: list[str] = []
    more = evaluate(illustrated_config(trained, tmp_path, samples=90, pictures=0, nearest=75), lines.append)
    assert numbers(more.evaluations) == numbers(few.evaluations)
    assert any("of 75 samples memorized" in line for line in lines)
    facts = json.loads(artifact(tmp_path, more.run_id, f"neighbours/{more.best.folder.name}.json"))
    assert facts["samples"] == len(facts["pixels"]["distance"]) == 75


def test_neighbours_are_those_of_brute_force_over_the_training_set(
    ray_session: None, digits: ShardedDataset, tmp_path: Path
) -> None:
    everything = digits.pixels(range(len(digits)))
    copies = torch.from_numpy(everything[[5, 600, 1790]])
    strange = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8))
    samples = torch.cat([copies, strange])
    with Pool(2, 1.0, print) as pool:
        found = find_neighbours(
            samples,
            digits,
            digits,
            describe_extractor("pixels", digits),
            tmp_path,
            seed=3,
            pool=pool,
        )
    held = rng.permutation(3, "held-out", 0, len(digits))[:6].sort().values.numpy()
    queries = np.concatenate([samples.numpy(), everything[held]])
    extractor = load_for("pixels", digits)
    for space in SPACES:
        a, b = (
            (
                x.reshape(len(x), -1).astype(np.float64)
                if space == "pixels"
                else extractor(torch.from_numpy(x).permute(0, 3, 1, 2))[0].double().numpy()
            )
            for x in (queries, everything)
        )
        distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
        wanted = np.sort(distances, axis=1)[:, :50]
        # Between float32 features, |a|^2 + |b|^2 - 2ab in float64 loses 1e-16 of squares up to 1e6.
        np.testing.assert_allclose(found.neighbours[space].distances.numpy(), wanted, atol=1e-4)
        picked = np.take_along_axis(distances, found.neighbours[space].numbers.numpy(), 1)
        np.testing.assert_allclose(picked, wanted, atol=1e-4)
    values = found.values(PROTOCOL)
    assert values["memorized"] == 0.5
    assert values["memorized_held_out"] == values["memorized_features_pixels_held_out"] == 1.0
