"""Two commands that would write to the same folder, and what a killed one leaves."""

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.commands import run_job
from support.processes import IMPORTED, ROOT, wait_for
from support.synthetic_shards import random_pixels, write_dataset

from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.configs import DiffusionConfig, UNetConfig
from ddpm_core.errors import InputError
from ddpm_core.training import OptimConfig, TrainState
from ddpm_core.unet import UNet
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage import lease
from pipelines.storage.lease import HOLDER, LOCK, sole_writer
from pipelines.train.config import config_for
from pipelines.train.driver import run_name

HOLD = """
import sys, time
from pathlib import Path
from pipelines.storage import lease
lease.LEASE = float(sys.argv[2])
with lease.sole_writer(Path(sys.argv[1]), "output"):
    (Path(sys.argv[1]) / "held").touch()
    time.sleep(600)
"""
BY_WHOM = r"is written to by process {} on '[^']+' since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait until"


def hold(folder: Path, seconds: float = lease.LEASE) -> "subprocess.Popen[bytes]":
    """A process that holds the lease of a folder."""
    environment = {**os.environ, "PYTHONPATH": IMPORTED}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], cwd=ROOT, env=environment)
    wait_for((folder / "held").exists)
    return process


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    first = hold(tmp_path / "output")
    try:
        with (
            pytest.raises(InputError, match=BY_WHOM.format(first.pid)),
            sole_writer(tmp_path / "output", "output"),
        ):
            raise AssertionError("two hold it")
        assert sorted(path.name for path in (tmp_path / "output").iterdir()) == [LOCK, HOLDER, "held"]
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with sole_writer(tmp_path / "output", "output"):
        pass
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["held"]


def test_a_lease_of_a_machine_that_is_gone_is_free_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE", 1.0)
    first = hold(tmp_path, 1.0)
    first.send_signal(signal.SIGKILL)
    first.wait()
    for path in (tmp_path / LOCK, tmp_path / HOLDER):
        text = path.read_text()
        path.write_text(re.sub(re.escape(os.uname().nodename), "elsewhere", text))
        assert "elsewhere" in path.read_text()
    lines: list[str] = []
    with sole_writer(tmp_path, "output", lines.append):
        assert "process" in (tmp_path / HOLDER).read_text()
    assert lines == [
        f"waiting for up to 1 s: process {first.pid} on elsewhere wrote to {str(tmp_path)!r}, and may be gone"
    ]


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    first = hold(tmp_path)
    threading.Timer(0.5, first.kill).start()
    threading.Thread(target=first.wait).start()  # so that it is gone, and not only dead
    with sole_writer(tmp_path, "output", wait=30.0):
        assert str(os.getpid()) in (tmp_path / HOLDER).read_text()


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="refused"), sole_writer(tmp_path / "there" / "a" / "b", "output"):
        raise InputError("refused")
    assert not any((tmp_path / "there").iterdir())
    with sole_writer(tmp_path / "there" / "a" / "b", "output"):
        (tmp_path / "there" / "a" / "b" / "image").touch()
    assert [path.name for path in (tmp_path / "there" / "a" / "b").iterdir()] == ["image"]


@pytest.fixture
def shards(tmp_path: Path) -> ShardedDataset:
    return write_dataset(tmp_path / "shards", random_pixels(64, (8, 8, 1)), [64])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint."""
    network = UNetConfig(image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    torch.manual_seed(0)
    state = TrainState(UNet(network), OptimConfig())
    config = {"unet": asdict(network), "diffusion": asdict(DiffusionConfig()), "shards": str(tmp_path / "shards")}
    write_checkpoint(tmp_path / "train" / "run", snapshot(state), config)
    return tmp_path / "train" / "run" / "step-00000000"


def refused(monkeypatch: pytest.MonkeyPatch, output: Path, job: str, *arguments: str) -> bool:
    """Whether a job is refused because this process holds the lease of its folder, whose content it leaves."""
    with sole_writer(output, "output"):
        (output / "shards").mkdir()
        for name in (".half.tmp", "shards/.shard-00000.parquet.0.tmp"):
            (output / name).write_text("half-written")
        before = sorted(output.rglob("*"))
        code = run_job(monkeypatch, job, *arguments)
        return code == 2 and sorted(output.rglob("*")) == before


def test_a_second_preprocessing_into_an_output_is_refused_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "source" / "a.png")
    output = tmp_path / "output"
    arguments = ["--source", str(tmp_path / "source"), "--output", str(output), "--image-size", "8"]
    # The first has begun: an output without a plan would be another's folder.
    output.mkdir()
    monkeypatch.setattr("pipelines.preprocess.driver.earlier_plan", lambda output: None)
    assert refused(monkeypatch, output, "preprocess.py", *arguments)
    assert re.search(BY_WHOM.format(os.getpid()), capsys.readouterr().err)


def test_a_second_training_of_a_run_is_refused_and_deletes_nothing(
    tmp_path: Path, shards: ShardedDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "storage"
    folder = storage / "train" / run_name(config_for("tiny", shards=str(shards.path)), shards)
    arguments = ["tiny", "--shards", str(shards.path), "--storage", str(storage)]
    assert refused(monkeypatch, folder, "train_lsun.py", *arguments)
    assert re.search(BY_WHOM.format(os.getpid()), capsys.readouterr().err)
    assert not (storage / "mlflow.db").exists()


@pytest.mark.parametrize("job", ["compress.py encode", "compress.py curve"])
def test_a_second_writer_of_an_output_is_refused(
    tmp_path: Path,
    shards: ShardedDataset,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: str,
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    given = {
        "compress.py encode": ["--run", str(run), "--images", str(tmp_path / "a.png")],
        "compress.py curve": ["--run", str(run), "--data", str(shards.path), "--images", "1"],
    }
    name, *word = job.split()
    output = tmp_path / "output"
    with sole_writer(output, "output"):
        arguments = [*word, *given[job], "--output", str(output), "--storage", str(tmp_path)]
        assert run_job(monkeypatch, name, *arguments) == 2
        assert sorted(path.name for path in output.iterdir()) == [LOCK, HOLDER]
    assert re.search(BY_WHOM.format(os.getpid()), capsys.readouterr().err)
