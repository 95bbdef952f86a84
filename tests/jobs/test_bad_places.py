"""Every place that a command reads or writes, unreadable, unwritable or no place at all: one sentence, and nothing half-written.

Each {place} of COMMANDS is tried in each way of PLACES.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import ray
import torch
from PIL import Image
from support.commands import run_job
from support.privileges import without_privileges
from support.small_disk import mounted_disk
from support.synthetic_shards import random_pixels, write_dataset

from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.configs import DiffusionConfig, UNetConfig
from ddpm_core.training import OptimConfig, TrainState
from ddpm_core.unet import UNet

# {W}: a place to write to; {R}: one to read from. {shards}, {run}: whole ones; {storage}: one that is not there yet.
COMMANDS = {
    "preprocess to": "preprocess.py --source {images} --output {W} --image-size 8",
    "preprocess from": "preprocess.py --source {R} --output {storage} --image-size 8",
    "preprocess from one of two": "preprocess.py --source {images} {R} --output {storage} --image-size 8",
    "train to": "train_lsun.py tiny --shards {shards} --storage {W}",
    "train from": "train_lsun.py tiny --shards {R} --storage {storage}",
    "sweep to": "sweep.py schedules tiny --train.shards {shards} --evaluate.extractor pixels --train.storage {W}",
    "sweep from": "sweep.py schedules tiny --train.shards {R} --evaluate.extractor pixels --train.storage {storage}",
    "sweep with an extractor": (
        "sweep.py schedules tiny --train.shards {shards} --evaluate.extractor {R} --train.storage {storage}"
    ),
    "evaluate to": "evaluate.py --run {run} --extractor pixels --storage {W}",
    "evaluate a run": "evaluate.py --run {R} --extractor pixels --storage {storage}",
    "evaluate against": "evaluate.py --run {run} --extractor pixels --reference {R} --storage {storage}",
    "evaluate by an extractor": "evaluate.py --run {run} --extractor {R} --storage {storage}",
    "evaluate weights": "evaluate.py --weights {R} --extractor pixels --storage {storage}",
    "likelihood to": "evaluate.py likelihood --run {run} --storage {W}",
    "likelihood of": "evaluate.py likelihood --run {run} --data {R} --storage {storage}",
    "calibrate to": "evaluate.py calibrate --data {shards} --test-data {shards} --extractor pixels --storage {W}",
    "calibrate by": "evaluate.py calibrate --data {R} --test-data {shards} --extractor pixels --storage {storage}",
    "compare": "evaluate.py compare {R} {run}",
    "night to": "nightly_eval.py --storage {W}",
    "night by an extractor": "nightly_eval.py --extractor {R} --storage {storage}",
    "encode to": "compress.py encode --run {run} --images {images} --output {W}",
    "encode": "compress.py encode --run {run} --images {R} --output {storage}",
    "decode": "compress.py decode --run {run} --files {R} --output {storage}",
    "curve to": "compress.py curve --run {run} --data {shards} --images 2 --output {W}",
    "curve of": "compress.py curve --run {run} --data {R} --images 2 --output {storage}",
    "export to": "export.py {run} --output {W} --storage {storage}",
    "export": "export.py {R} --output {storage}",
    "report to": "report.py --storage {storage} --output {W}/report.html",
    "report of": "report.py --storage {R} --output {storage}/report.html",
    "show": "ui.py --storage {R}",
    "demo in": "demo.py --storage {W}",
}
PLACES = ("file", "long", "nobody", "proc", "read-only", "forbidden", "inside", "empty")
URLS = {
    "no bucket": "s3://ddpm-no-such-bucket/a b/ü",
    "forbidden bucket": "s3://ddpm-forbidden/place",
    "read-only bucket": "s3://ddpm-read-only/place",
    "other region": "s3://ddpm-elsewhere/place",
    "password": "s3://somebody:secret@ddpm-tests/place",
    "no store": "nostore://bucket/place",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    shards = write_dataset(folder / "shards", random_pixels(64, (8, 8, 1)), [64])
    network = UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    torch.manual_seed(0)
    config = {"unet": asdict(network), "diffusion": asdict(DiffusionConfig()), "shards": str(shards.path)}
    run = write_checkpoint(folder / "train" / "run", snapshot(TrainState(UNet(network), OptimConfig())), config).path
    (folder / "images").mkdir()
    Image.new("L", (8, 8)).save(folder / "images" / "one.png")
    return {"shards": str(shards.path), "run": str(run), "images": str(folder / "images")}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("places")
    (folder / "a-file").write_text("nothing that anybody wants")
    (folder / "forbidden").mkdir(mode=0o000)
    with mounted_disk(64) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield {
            "file": f"{folder}/a-file",
            "long": f"{folder}/{'long' * 64}",
            "nobody": "~nosuchuser/place",
            "proc": "/proc/place",
            "read-only": f"{disk}/place",
            "forbidden": f"{folder}/forbidden",
            "inside": f"{folder}/a-file/place",
            "empty": "",
            **URLS,
        }


@pytest.mark.parametrize("place", [*PLACES, *URLS])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_place_is_one_sentence(
    name: str,
    place: str,
    whole: dict[str, str],
    places: dict[str, str],
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/mlflow.db") if place in URLS else None
    monkeypatch.chdir(tmp_path)
    before = sorted(Path(whole["run"]).parent.parent.rglob("*"))
    values = {**whole, "storage": tmp_path / "storage", "R": "{}", "W": "{}"}
    words = [word.format(places[place]) for word in COMMANDS[name].format(**values).split()]
    with without_privileges():
        code = run_job(monkeypatch, *words)
    said = capfd.readouterr()
    assert code == 2, said
    assert "Traceback" not in said.out, said
    assert said.err.startswith("error: "), said
    assert said.err.count("\n") == 1, said
    assert not list(tmp_path.rglob("*")), said
    assert sorted(Path(whole["run"]).parent.parent.rglob("*")) == before
