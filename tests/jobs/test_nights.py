"""What a night of a cluster brings: kills at random moments, clocks that jump, a report while others write."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.processes import ROOT
from support.training import LONG, config

from ddpm_core.errors import InputError
from pipelines.shards.dataset import ShardedDataset
from pipelines.train.driver import train
from reports.build import build_report

FAKETIME = find_spec("libfaketime")  # Debian's 0.9.10 breaks Python's time.sleep()
MEASURE = (
    "--extractor pixels --samples 200 --chunk-size 10 --batch-size 10 --sampler ddim --sampler-steps 20 --no-report "
    "--workers 1"
)


@pytest.fixture(scope="module")
def trained(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a training of three checkpoints."""
    storage = tmp_path_factory.mktemp("trained") / "runs"
    train(config(digits, storage, workers=1))
    return storage


def numbers_in(storage: Path) -> dict[str, dict[str, float]]:
    """Every number of every evaluation but the speed."""
    return {
        str(path.relative_to(storage)): {
            key: value for key, value in json.loads(path.read_text())["values"].items() if key != "samples_per_second"
        }
        for path in storage.glob("evaluate/*/*/step-*/manifest.json")
        if "values" in json.loads(path.read_text())
    }


def night(storage: Path, **environment: str) -> subprocess.Popen[str]:
    """A night as cron starts it, in a Ray of its own."""
    command = [sys.executable, str(ROOT / "jobs" / "nightly_eval.py"), *MEASURE.split(), "--storage", str(storage)]
    return subprocess.Popen(
        command,
        cwd=storage.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def undisturbed(trained: Path, folder: Path) -> dict[str, dict[str, float]]:
    """The numbers of a night that nothing happens to."""
    storage = folder / "undisturbed"
    shutil.copytree(trained, storage)
    process = night(storage)  # as the others: in this process torch has one thread, and sums round otherwise
    out, _ = process.communicate(timeout=300)
    assert process.returncode in (0, 3), out
    return numbers_in(storage)


@pytest.mark.slow
def test_nights_killed_at_random_moments_end_with_the_numbers_of_an_undisturbed_one(
    trained: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "killed"
    shutil.copytree(trained, storage)
    generator = random.Random(0)
    for _ in range(4):
        process = night(storage)
        time.sleep(generator.uniform(4.0, 25.0))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    for _ in range(3):  # a checkpoint at which a job was killed is left alone until its lease ends
        process = night(storage)
        out, _ = process.communicate(timeout=300)
        assert process.returncode in (0, 3), out
        assert "Traceback" not in out, out
    assert numbers_in(storage) == undisturbed(trained, tmp_path)
    assert not [path for path in storage.rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="it needs `pip install libfaketime`")
def test_a_night_whose_clock_jumps_ends_with_the_numbers_of_an_undisturbed_one(trained: Path, tmp_path: Path) -> None:
    storage, clock = tmp_path / "jumps", tmp_path / "clock"
    shutil.copytree(trained, storage)
    clock.write_text("+0")
    assert FAKETIME is not None
    assert FAKETIME.origin is not None
    (library,) = Path(FAKETIME.origin).parent.rglob("libfaketime.so.1")
    process = night(
        storage,
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",  # as a machine whose clock is set: the monotonic one goes on
        NO_FAKE_STAT="1",
    )
    generator, jumps = random.Random(0), 0
    while process.poll() is None:
        time.sleep(1.0)
        (tmp_path / "next").write_text(generator.choice(["-3d", "+3d", "-2h", "+2h", "+400d", "-400d", "+0"]))
        (tmp_path / "next").replace(clock)
        jumps += 1
    out, _ = process.communicate()
    assert process.returncode in (0, 3), out
    assert "Traceback" not in out, out
    assert jumps > 10
    assert numbers_in(storage) == undisturbed(trained, tmp_path)


TRAIN = """
import sys
from dataclasses import replace
from pathlib import Path
from pipelines.shards.dataset import ShardedDataset
from pipelines.train.driver import train
from support.training import LONG, config
train(config(ShardedDataset.open(Path(sys.argv[1])), Path(sys.argv[2]), **LONG), print)
"""


@pytest.mark.slow
def test_reports_during_a_training_are_whole_and_change_nothing(digits: ShardedDataset, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(digits.path), str(storage)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    reports, refusals = 0, list[str]()
    while process.poll() is None:
        try:
            page = build_report(f"sqlite:///{storage}/mlflow.db", "ddpm", tmp_path / "report.html").read_text()
            assert page.rstrip().endswith("</html>")
            reports += 1
        except InputError as error:
            refusals.append(str(error))
            time.sleep(0.2)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert reports > 1
    early = ("does not exist", "not in the tracking store", "no training run")  # nothing is recorded yet
    assert all(any(words in refusal for words in early) for refusal in refusals), refusals
    whole = train(config(digits, tmp_path / "alone", **LONG))
    (run,) = (storage / "train").iterdir()
    for name in ("model.safetensors", "ema.safetensors", "optimizer.pt"):
        assert (run / whole.last.path.name / name).read_bytes() == (whole.last.path / name).read_bytes()
