"""A command that is refused leaves nothing: no folder, no database, no run in MLflow."""

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
    "encode nothing": "compress.py encode --run {run} --images {nowhere} {out}",
    "decode what is no coded file": "compress.py decode --run {run} --files {run}/manifest.json {out}",
    "curve of too many images": "compress.py curve --run {run} --data {shards} --images 5000 {out}",
    "export nobody": "export.py nobody {out}",
    "report of nothing": "report.py --output {storage}/report.html {at}",
    "preprocess nothing": "preprocess.py --source {nowhere} --output {storage} --image-size 8",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    shards = write_dataset(folder / "shards", random_pixels(64, (8, 8, 1)), [64])
    other = write_dataset(folder / "other", random_pixels(4, (16, 16, 3)), [4])
    network = UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    torch.manual_seed(0)
    state = TrainState(UNet(network), OptimConfig())
    config = {"unet": asdict(network), "diffusion": asdict(DiffusionConfig()), "shards": str(shards.path)}
    run = write_checkpoint(folder / "train" / "run", snapshot(state), config).path
    return {"shards": str(shards.path), "other": str(other.path), "run": str(run), "nowhere": str(folder / "nowhere")}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_command_leaves_nothing(
    tmp_path: Path,
    places: dict[str, str],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.chdir(tmp_path)
    storage = tmp_path / "storage"
    at, out = f"--storage {storage}", f"--output {storage} --storage {storage}"
    words = REFUSED[what].format(**places, storage=storage, at=at, out=out).split()
    before = sorted(Path(places["shards"]).parent.rglob("*"))
    assert run_job(monkeypatch, *words) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == []
    assert sorted(Path(places["shards"]).parent.rglob("*")) == before
