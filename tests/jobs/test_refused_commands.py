"""A command that is refused leaves nothing: no folder, no database, no run in MLflow; and says so in any encoding."""

import io
import struct
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
import ray
import torch
from support.commands import run_job
from support.synthetic_shards import random_pixels, write_dataset

from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.configs import DiffusionConfig, UNetConfig
from ddpm_core.training import OptimConfig, TrainState
from ddpm_core.unet import UNet

# {storage}: a new one; {at} and {out}: the options that name it. {shards}: images of the network's size. {other}: of another.
# {run}: a checkpoint's folder.
REFUSED = {
    "train without shards": "train_lsun.py tiny --shards {nowhere} {at}",
    "train on images of another size": "train_lsun.py tiny --shards {other} {at}",
    "sweep without shards": "sweep.py schedules tiny --train.shards {nowhere} --train.storage {storage}",
    "sweep with more sampler steps than there are": (
        "sweep.py schedules tiny --train.shards {shards} --evaluate.sampler-steps 5000 --evaluate.extractor pixels "
        "--train.storage {storage}"
    ),
    "sweep measured by a file that is no extractor": (
        "sweep.py schedules tiny --train.shards {shards} --evaluate.extractor {nowhere}.pt --train.storage {storage}"
    ),
    "evaluate nobody": "evaluate.py --run nobody {at}",
    "evaluate against images of another size": "evaluate.py --run {run} --reference {other} {at}",
    "evaluate with more steps than there are": "evaluate.py --run {run} --extractor pixels --sampler-steps 5000 {at}",
    "evaluate by a file that is no extractor": "evaluate.py --run {run} --extractor {nowhere}.pt {at}",
    "likelihood of nobody": "evaluate.py likelihood --run nobody {at}",
    "likelihood of images of another size": "evaluate.py likelihood --run {run} --data {other} {at}",
    "likelihood of too many images": "evaluate.py likelihood --run {run} --images 5000 {at}",
    "calibrate without data": "evaluate.py calibrate --data {nowhere} --test-data {nowhere} {at}",
    "compare what is no evaluation": "evaluate.py compare {nowhere} {run}",
    "night without trainings": "nightly_eval.py {at}",
    "encode what is no image": "compress.py encode --run {run} --images {run}/manifest.json {out}",
    "encode an image that fills the memory": "compress.py encode --run {run} --images {bomb} {out}",
    "encode nothing": "compress.py encode --run {run} --images {nowhere} {out}",
    "decode what is no coded file": "compress.py decode --run {run} --files {run}/manifest.json {out}",
    "curve of too many images": "compress.py curve --run {run} --data {shards} --images 5000 {out}",
    "export nobody": "export.py nobody {out}",
    "report of nothing": "report.py --output {storage}/report.html {at}",
    "preprocess an image that fills the memory": "preprocess.py --source {bomb} --output {storage} --image-size 8",
    "preprocess from where nobody answers": (
        "preprocess.py --source http://127.0.0.1:1/x.zip --output {storage} --image-size 8"
    ),
    "preprocess from a host that is none": "preprocess.py --source http://a..b/x.zip --output {storage} --image-size 8",
    "preprocess nothing": "preprocess.py --source {nowhere} --output {storage} --image-size 8",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("Plätze-漢")
    shards = write_dataset(folder / "shards", random_pixels(64, (8, 8, 1)), [64])
    other = write_dataset(folder / "other", random_pixels(4, (16, 16, 3)), [4])
    network = UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    torch.manual_seed(0)
    state = TrainState(UNet(network), OptimConfig())
    config = {"unet": asdict(network), "diffusion": asdict(DiffusionConfig()), "shards": str(shards.path)}
    run = write_checkpoint(folder / "train" / "run", snapshot(state), config).path
    (folder / "bomb.png").write_bytes(png_bomb(100_000))
    named = {
        "shards": shards.path,
        "other": other.path,
        "run": run,
        "nowhere": folder / "nowhere",
        "bomb": folder / "bomb.png",
    }
    return {name: str(path) for name, path in named.items()}


def png_bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that says it holds an image of many gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    image = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + image


class AsciiStream(io.TextIOWrapper):
    """A standard stream of a terminal that knows ASCII alone."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_command_says_one_sentence_and_leaves_nothing(
    tmp_path: Path,
    places: dict[str, str],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.chdir(tmp_path)
    storage, out_stream, err_stream = tmp_path / "Störage", AsciiStream(), AsciiStream()
    at, out = f"--storage {storage}", f"--output {storage} --storage {storage}"
    words = REFUSED[what].format(**places, storage=storage, at=at, out=out).split()
    before = sorted(Path(places["shards"]).parent.rglob("*"))
    monkeypatch.setattr(sys, "stdout", out_stream)
    monkeypatch.setattr(sys, "stderr", err_stream)
    assert run_job(monkeypatch, *words) == 2
    sentence = err_stream.text()
    assert sentence.startswith("error: ")
    assert sentence.count("\n") == 1
    assert "Traceback" not in out_stream.text()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == []
    assert sorted(Path(places["shards"]).parent.rglob("*")) == before
