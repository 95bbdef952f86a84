"""jobs/compress.py: files that another process decodes bit for bit, wrong ones in a sentence, and the curve's numbers."""

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from support.commands import run_job
from support.processes import ROOT
from support.synthetic_shards import write_dataset

from ddpm_core import images, rng
from ddpm_core.checkpoint import write_checkpoint
from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.unet import UNet, UNetConfig

SIZE = 8

DECODE = """
import hashlib, sys
from pathlib import Path
import torch
from ddpm_core.checkpoint import open_checkpoint
from ddpm_core.codec import Codec
from ddpm_core.codec.format import read_header
from ddpm_core.unet import UNet
checkpoint = open_checkpoint(Path(sys.argv[1]))
network = UNet(checkpoint.unet_config())
network.load_state_dict(checkpoint.weights())
files = [path.read_bytes() for path in sorted(Path("coded").glob("*.x0"))]
header, _ = read_header(files[0], "file")
process = checkpoint.diffusion_config().build()
decoded = Codec(process, network.double().eval(), header.shape, header.model).decode(files)
print(torch.get_num_threads(), *(hashlib.sha256(image.pixels.numpy().tobytes()).hexdigest() for image in decoded))
"""


def make_checkpoint(folder: Path, seed: int) -> Path:
    """A network of random weights whose outputs are of order 1: it codes badly, and exactly."""
    config = UNetConfig(image_size=SIZE, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(config)
        torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    weights = dict(network.state_dict())
    facts = {"unet": asdict(config), "diffusion": asdict(DiffusionConfig(num_timesteps=100, beta_end=0.15))}
    saved = {"step": 7, "model": weights, "ema": weights, "optimizer": {}}
    return Path(str(write_checkpoint(folder / f"random-{seed}", saved, facts, []).path))


def smooth_pixels(count: int) -> np.ndarray:
    """uint8 [count, 8, 8, 1]: slopes with a little noise."""
    noise = 0.02 * rng.normal(0, "noise", torch.arange(count), 0, (1, SIZE, SIZE))
    slopes = torch.linspace(-0.8, 0.8, SIZE) * torch.linspace(-1, 1, count)[:, None, None, None]
    return images.to_uint8(slopes + noise).numpy()


@pytest.fixture
def checkpoint_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """(a checkpoint, the images that lie beside it as PNG files)."""
    monkeypatch.chdir(tmp_path)
    pixels = smooth_pixels(3)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(tmp_path / "images" / f"slope{number}.png")
    return make_checkpoint(tmp_path, 0), pixels


def same_again(monkeypatch: pytest.MonkeyPatch, command: str, folder: Path) -> None:
    """The recipe in a folder makes all of its files again, wherever it is given."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in {*files} - {"config.toml"}:
        (folder / name).unlink()
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(folder.parent / "images")
        assert run_job(elsewhere, "compress.py", command, "--config", str(folder / "config.toml")) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def encode_images(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, images: str) -> None:
    """Code the images in eight steps into the folder `coded`."""
    options = ["--run", str(checkpoint), "--images", images, "--output", "coded", "--steps", "8"]
    assert run_job(monkeypatch, "compress.py", "encode", *options) == 0


def test_another_process_with_other_threads_and_batches_decodes_the_images(
    checkpoint_and_images: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    model, pixels = checkpoint_and_images
    encode_images(monkeypatch, model, "images")
    size = sum(path.stat().st_size for path in (tmp_path / "coded").glob("*.x0"))
    assert f"encode: 3 images, {size} bytes, {8 * size / pixels.size:.3f} bits/dim" in capsys.readouterr().out
    same_again(monkeypatch, "encode", tmp_path / "coded")
    decode = ["decode", "--run", str(model), "--files", "coded", "--output", "back", "--batch-size", "2"]
    assert run_job(monkeypatch, "compress.py", *decode) == 0
    for number, image in enumerate(pixels):
        with Image.open(tmp_path / "back" / f"slope{number}.png") as back:
            assert np.array_equal(np.asarray(back), image[..., 0])
    same_again(monkeypatch, "decode", tmp_path / "back")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(model)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["2", *(hashlib.sha256(image.tobytes()).hexdigest() for image in pixels)], done.stderr


def test_wrong_files_end_with_2_and_one_sentence_and_write_nothing(
    checkpoint_and_images: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    model, _ = checkpoint_and_images
    encode_images(monkeypatch, model, "images/slope0.png")
    capsys.readouterr()
    data = (tmp_path / "coded" / "slope0.x0").read_bytes()
    other = make_checkpoint(tmp_path, 1)

    def refused(content: bytes, message: str, run: Path = model) -> None:
        (tmp_path / "file.x0").write_bytes(content)
        decode = ["decode", "--run", str(run), "--files", "file.x0", "--output", "back"]
        assert run_job(monkeypatch, "compress.py", *decode) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: file ")
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "back").exists()

    refused(data[:-3], f"is cut after {len(data) - 3} bytes")
    refused(data[:24] + bytes([data[24] ^ 1]) + data[25:], "is damaged somewhere after byte")
    refused(data, "was coded by another model", other)
    refused(data[:4] + b"\x02" + data[5:], "is of version 2 of the format, not 1")
    refused(b"GIF89a", "is not a coded image")
    (tmp_path / "cut.x0").write_bytes(data[: len(data) - 20])
    partial = ["decode", "--run", str(model), "--files", "cut.x0", "--output", "back", "--partial", "--frames"]
    assert run_job(monkeypatch, "compress.py", *partial) == 0
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"cut.png", "cut-20.png"} <= names


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("large.png", "is 9x8 of mode L, but this network codes 8x8 of mode L"),
        ("colour.png", "is 8x8 of mode RGB, but this network codes 8x8 of mode L"),
        ("broken.png", "cannot be read"),
        ("nowhere.png", "does not exist"),
        ("empty", "holds no images"),
        ("images/slope0.png images", "would both be written as 'slope0'"),
    ],
)
def test_images_that_would_not_decode_the_same_are_refused(
    images: str,
    message: str,
    checkpoint_and_images: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    Image.new("L", (9, 8)).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "large.png").read_bytes()[:40])
    (tmp_path / "empty").mkdir()
    encode = ["encode", "--run", str(checkpoint_and_images[0]), "--images", *images.split(), "--output", "coded"]
    assert run_job(monkeypatch, "compress.py", *encode) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "coded").exists()


def test_a_curve_holds_the_rate_and_distortion_of_files_and_theory(
    checkpoint_and_images: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    model, pixels = checkpoint_and_images
    write_dataset(tmp_path / "shards", pixels, [len(pixels)])
    options = ["--data", "shards", "--images", "3", "--steps", "8", "--output", "curve"]
    command = ["compress.py", "curve", "--run", str(model), *options, "--theory-steps"]
    assert run_job(monkeypatch, *command, "101") == 2
    assert "steps is 101: it must lie in 2..100" in capsys.readouterr().err
    assert run_job(monkeypatch, *command, "10") == 0
    printed = capsys.readouterr().out
    curve = json.loads((tmp_path / "curve" / "curve.json").read_text())
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ddpm").experiment_id])
    text = Path(client.download_artifacts(run.info.run_id, "compression/curve.json")).read_text()
    assert json.loads(text) == curve  # what the report reads
    recipe = tomllib.loads((tmp_path / "curve" / "config.toml").read_text())
    assert (recipe["data"], recipe["theory-steps"]) == (str(tmp_path / "shards"), 10)
    encode_images(monkeypatch, model, "images")
    size = sum(path.stat().st_size for path in (tmp_path / "coded").glob("*.x0"))
    assert curve["lossless"]["coded"] == pytest.approx(8 * size / pixels.size, rel=1e-12)
    account = curve["account"]
    # A file's last bits fill up a byte.
    assert account["header"] + account["lossy"] + account["decoder"] == pytest.approx(
        8 * size / pixels.size, abs=8 / 64
    )
    rates = [point["rate"] for point in curve["coded"]]
    assert rates == sorted(rates)
    assert rates[-1] < curve["lossless"]["coded"]
    assert rates[0] == pytest.approx(8 * 20 / 64)  # the header alone
    assert {point["quality"] for point in curve["lossy"]["JPEG"]} >= {5, 95}
    theory = curve["theory"]
    assert theory["total"] == pytest.approx(theory["lossy"] + theory["decoder"], rel=1e-12)
    assert len(theory["t"]) == len(theory["rate"]) == len(theory["rmse"])
    assert curve["overhead"]["total"] == pytest.approx(curve["lossless"]["coded"] / theory["total"] - 1, rel=1e-12)
    assert f"lossless {curve['lossless']['coded']:.3f} bits/dim" in printed
    drawing = (tmp_path / "curve" / "curve.svg").read_text()
    assert "<svg" in drawing
    assert 'href="http' not in drawing
