"""Training: the same steps for any number of workers, and the same end whatever was killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from support.commands import run_job
from support.processes import IMPORTED, ROOT, wait_for, workers_of
from support.training import LONG, config, contents, losses, result_of, starts

from ddpm_core.checkpoint import open_checkpoint
from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.errors import DivergedError, InputError
from ddpm_core.training import OptimConfig
from ddpm_core.unet import UNetConfig
from pipelines.runtime.cluster import Resources
from pipelines.shards.dataset import ShardedDataset
from pipelines.train import follower, session
from pipelines.train.config import TrainConfig
from pipelines.train.driver import train
from pipelines.train.loader import make_batch
from pipelines.train.session import TrainResult


@pytest.fixture(scope="session")
def alone(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """By one worker, keeping one checkpoint and showing samples."""
    changes: dict[str, Any] = {"workers": 1, "keep_last": 1, "keep_every": None, "sample_every": 6}
    return train(config(digits, tmp_path_factory.mktemp("alone"), **changes))


@pytest.fixture(scope="session")
def long_run(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(config(digits, tmp_path_factory.mktemp("long"), **LONG))


@pytest.fixture(scope="session")
def undisturbed(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(config(digits, tmp_path_factory.mktemp("undisturbed")))


def logged(result: TrainResult, storage: Path) -> list[tuple[int, float]]:
    history = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_metric_history(result.run_id, "train/loss")
    return sorted((metric.step, metric.value) for metric in history)


def test_a_run_leaves_checkpoints_records_and_models(undisturbed: TrainResult) -> None:
    assert [checkpoint.step for checkpoint in undisturbed.checkpoints] == [4, 8, 12]
    assert [step for step, _, _ in losses(undisturbed)] == [2, 4, 6, 8, 10, 12]
    storage = Path(str(undisturbed.storage.root))
    assert logged(undisturbed, storage) == [(step, loss) for step, loss, _ in losses(undisturbed)]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(undisturbed.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.batch_size"] == "8"
    models = client.search_logged_models([run.info.experiment_id])
    assert {int(model.params["step"]) for model in models} == {4, 8, 12}


def test_the_same_command_again_does_nothing(undisturbed: TrainResult, digits: ShardedDataset) -> None:
    before = undisturbed.last.path.stat().st_mtime_ns
    lines: list[str] = []
    again = train(config(digits, Path(str(undisturbed.storage.root))), lines.append)
    assert again == undisturbed
    assert again.last.path.stat().st_mtime_ns == before
    assert lines == [f"train: {again.run.name} is done, 12 steps"]


def test_the_recipe_in_a_runs_folder_is_that_run(
    undisturbed: TrainResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(undisturbed.run.folder / "config.toml")
    assert run_job(monkeypatch, "train_lsun.py", "--config", recipe) == 0
    assert f"train: {undisturbed.run.name} is done, 12 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    ["cut", pytest.param("zeros", marks=pytest.mark.slow), pytest.param("manifest", marks=pytest.mark.slow)],
)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_alike(
    undisturbed: TrainResult, digits: ShardedDataset, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(Path(str(undisturbed.run.folder)), tmp_path / "train" / undisturbed.run.name)
    newest = tmp_path / "train" / undisturbed.run.name / "step-00000012"
    victim = newest / ("manifest.json" if damage == "manifest" else "ema.safetensors")
    content = victim.read_bytes()
    victim.write_bytes(bytes(len(content)) if damage == "zeros" else content[: len(content) // 2])
    lines: list[str] = []
    again = train(config(digits, tmp_path), lines.append)
    assert sum("is set aside as step-00000012.damaged-" in line for line in lines) == 1
    assert any("from step 8 on" in line for line in lines)
    assert contents(again) == contents(undisturbed)
    assert len(list(newest.parent.glob("step-00000012.damaged-*"))) == 1


def test_a_checkpoint_that_a_killed_drivers_workers_delete_meanwhile_stops_no_resumption(
    undisturbed: TrainResult, digits: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They outlive it by a moment: what the next driver has listed may go before it is read."""
    folder = tmp_path / "train" / undisturbed.run.name
    shutil.copytree(Path(str(undisturbed.run.folder)), folder)
    shutil.rmtree(folder / "step-00000012")
    check = session.check_resources

    def meanwhile(config: TrainConfig) -> Resources:
        shutil.rmtree(folder / "step-00000008")
        return check(config)

    monkeypatch.setattr(session, "check_resources", meanwhile)
    resumed = train(config(digits, tmp_path))
    assert contents(resumed) == contents(undisturbed)
    assert logged(resumed, tmp_path) == [(step, loss) for step, loss, _ in losses(undisturbed)]


def test_one_worker_takes_the_same_steps_as_two(undisturbed: TrainResult, alone: TrainResult) -> None:
    assert alone.run.name == undisturbed.run.name
    for ours, theirs in zip(losses(alone), losses(undisturbed), strict=True):
        # Sums of eight float32 losses in another order; twelve steps do not amplify that beyond 1e-5.
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_batch_of_a_step_is_the_same_for_any_number_of_workers(digits: ShardedDataset) -> None:
    settings = config(digits, Path("/"))
    whole = make_batch(settings, digits, 7, 0, 1)
    for workers in (2, 3, 8):
        shares = [make_batch(settings, digits, 7, rank, workers) for rank in range(workers)]
        for name in ("x_start", "t", "noise", "dropout_key"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))
    assert not torch.equal(whole.noise, make_batch(settings, digits, 8, 0, 1).noise)


@pytest.mark.slow  # the run in an object store does so too
def test_a_longer_run_goes_on_from_a_shorter_one(
    undisturbed: TrainResult, digits: ShardedDataset, tmp_path: Path
) -> None:
    short = train(config(digits, tmp_path, steps=8))
    assert [checkpoint.step for checkpoint in short.checkpoints] == [4, 8]
    lines: list[str] = []
    longer = train(config(digits, tmp_path), lines.append)
    assert "from step 8" in lines[0]
    assert contents(longer) == contents(undisturbed)


SCRIPT = """
import json, sys
from pathlib import Path
import conftest
import ray
from jobs.cli import run, say
from pipelines.shards.dataset import ShardedDataset
from pipelines.train.driver import train
from support.training import config, result_of
if __name__ == "__main__":
    ray.init("local", num_cpus=4, num_gpus=0, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)
    settings = config(ShardedDataset.open({shards!r}), Path({storage!r}), **json.loads({changes!r}))
    run(lambda: train(settings, say))
"""


def driver_of(digits: ShardedDataset, storage: Path, **changes: Any) -> subprocess.Popen[str]:
    """A training in a process, and with a cluster, of its own."""
    script = SCRIPT.format(shards=str(digits.path), storage=str(storage), changes=json.dumps(changes))
    environment = {**os.environ, "PYTHONPATH": IMPORTED}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    )


def test_old_checkpoints_make_room_and_samples_are_shown_on_the_way(alone: TrainResult) -> None:
    assert [checkpoint.step for checkpoint in alone.checkpoints] == [12]
    assert [step for step, _, _ in losses(alone)] == [2, 4, 6, 8, 10, 12]  # no record went with them
    storage = Path(str(alone.storage.root))
    grids = sorted(storage.glob("mlartifacts/*/*/artifacts/training/*.png"))
    assert [path.name for path in grids] == ["samples-00000006.png", "samples-00000012.png"]
    assert Image.open(grids[0]).size == (8 * 8, 8 * 8)


@pytest.mark.slow
def test_a_driver_killed_with_its_cluster_is_resumed_to_the_same_bits(
    long_run: TrainResult, digits: ShardedDataset, tmp_path: Path
) -> None:
    driver = driver_of(digits, tmp_path, **{**LONG, "checkpoint_every": 20})
    try:
        wait_for(lambda: list(tmp_path.glob("train/*/step-000000[46]0/manifest.json")))
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not list(tmp_path.glob("train/*/step-00000200"))  # it was killed on the way, not after the end
    lines: list[str] = []
    resumed = train(config(digits, tmp_path, **LONG), lines.append)
    assert "from step 0 " not in lines[0]
    assert contents(resumed) == contents(long_run)
    assert logged(resumed, tmp_path) == [(step, loss) for step, loss, _ in losses(long_run)]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_same_bits(
    long_run: TrainResult, digits: ShardedDataset, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: list(tmp_path.glob("train/*/step-000000[46]0/manifest.json")))
        killed.extend(workers_of("RayTrainWorker")[:1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    lines: list[str] = []
    result = train(config(digits, tmp_path, **{**LONG, "checkpoint_every": 20}), lines.append)
    killer.join()
    assert killed
    assert sum("from step" in line for line in lines) == 2  # it began, and went on
    assert contents(result) == contents(long_run)


@pytest.mark.slow
def test_a_worker_that_is_stopped_for_a_while_is_told_of_and_changes_nothing(
    long_run: TrainResult, digits: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "SILENCE", 3.0)
    lines: list[str] = []

    def silences() -> int:
        return sum("nothing was heard of the workers" in line for line in lines)

    def stop_one() -> None:
        wait_for(lambda: list(tmp_path.glob("train/*/step-000000[46]0/manifest.json")))
        pid, before = workers_of("RayTrainWorker")[0], silences()
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: silences() > before)
        finally:
            os.kill(pid, signal.SIGCONT)

    stopper = threading.Thread(target=stop_one)
    stopper.start()
    result = train(config(digits, tmp_path, **{**LONG, "checkpoint_every": 20}), lines.append)
    stopper.join()
    assert silences()
    assert sum("from step" in line for line in lines) == 1  # nobody was replaced
    assert contents(result) == contents(long_run)


def train_while(
    scenario: str, digits: ShardedDataset, folder: Path, **changes: object
) -> tuple[TrainResult, list[str]]:
    """The result of a long run over nodes with different current folders, one of which dies, is about to or joins on the
    way, and the lines that its driver printed."""
    temporary = tempfile.mkdtemp(prefix="ray-")  # a short path, for sockets lie in it, and not where other Rays look
    script = ROOT / "tests" / "support" / "node_scenarios.py"
    environment = {
        **os.environ,
        "PYTHONPATH": IMPORTED,
        "RAY_TMPDIR": temporary,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # a killed node looks alive at first
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    }
    arguments = [scenario, str(digits.path), str(folder), json.dumps({**LONG, **changes})]
    try:
        done = subprocess.run(
            [sys.executable, str(script), *arguments], env=environment, stdout=subprocess.PIPE, text=True, timeout=400
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, lines
    path = Path(lines[-1])
    assert path.is_relative_to(folder / "driver" / "runs")  # a relative --storage is the driver's
    return result_of(path.parent, [open_checkpoint(path)]), lines


@pytest.mark.slow
def test_a_node_about_to_go_is_saved_for_and_a_node_that_dies_is_replaced(
    long_run: TrainResult, digits: ShardedDataset, tmp_path: Path
) -> None:
    # No regular checkpoint lies on the way: what the run goes on from was saved with the notice.
    result, lines = train_while("lost", digits, tmp_path, checkpoint_every=200)
    first, *again = [step for step, _ in starts(lines)]
    assert first == 0
    assert len(again) >= 2
    assert all(40 <= step < 200 for step in again)
    assert contents(result) == contents(long_run)


@pytest.mark.slow
def test_an_elastic_run_takes_a_new_node_in(long_run: TrainResult, digits: ShardedDataset, tmp_path: Path) -> None:
    # Ray looks for new nodes once a minute.
    result, lines = train_while("grown", digits, tmp_path, min_workers=1, checkpoint_every=20, steps=3000)
    assert [workers for _, workers in starts(lines)] == [1, 2]
    assert [step for step, _, _ in losses(result)] == list(range(40, 3001, 40))
    assert losses(result)[0] == pytest.approx(losses(long_run)[0], rel=1e-5)


@pytest.mark.slow
def test_a_run_asked_to_stop_saves_the_newest_step_and_goes_on_from_it(
    long_run: TrainResult, digits: ShardedDataset, tmp_path: Path
) -> None:
    """SIGTERM in the middle of everything: of a logging interval, and between checkpoints."""
    driver = driver_of(digits, tmp_path, **LONG)
    assert driver.stdout is not None
    lines = []
    for line in driver.stdout:
        lines.append(line.rstrip())
        if " of 200 steps" in line and ": 0 of" not in line:
            break
    driver.send_signal(signal.SIGTERM)
    lines += driver.stdout.read().splitlines()
    assert driver.wait() == 130
    saved = next(line for line in lines if "is saved at step" in line)
    step = int(saved.rsplit(" ", 1)[1])
    assert 40 <= step < 200
    assert step % 10 == 0
    assert [path.name for path in tmp_path.glob("train/*/step-*")] == [f"step-{step:08d}"]

    resumed = train(config(digits, tmp_path, **LONG), lines.append)
    assert any(f"from step {step} on" in line for line in lines)
    assert contents(resumed) == contents(long_run)
    assert logged(resumed, tmp_path) == [(step, loss) for step, loss, _ in losses(long_run)]


@pytest.mark.slow
def test_a_run_in_an_object_store_is_the_same_run(
    undisturbed: TrainResult, digits: ShardedDataset, s3_bucket: str, tmp_path: Path
) -> None:
    storage, tracking = f"{s3_bucket}/{tmp_path.name}", f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(InputError, match=r"where no SQLite database can lie: give --tracking-uri"):
        train(replace(config(digits, tmp_path), storage=storage))
    settings = replace(config(digits, tmp_path, steps=8), storage=storage, tracking_uri=tracking)
    assert [checkpoint.step for checkpoint in train(settings).checkpoints] == [4, 8]
    resumed = train(replace(settings, steps=12))
    assert contents(resumed) == contents(undisturbed)
    assert resumed.run.name == undisturbed.run.name


def test_a_tracking_server_that_does_not_answer_is_named_at_once(digits: ShardedDataset, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"tracking server 'http://127.0.0.1:9' cannot be reached from here"):
        train(config(digits, tmp_path, tracking_uri="http://127.0.0.1:9"))
    assert time.monotonic() - began < 10
    assert not any(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run_and_tells_the_whole_story(
    digits: ShardedDataset, tmp_path: Path
) -> None:
    # Weights of that size overflow the squares of the very next loss.
    wild = OptimConfig(batch_size=8, lr=1e30, warmup_steps=0, ema_decay=0.9)
    said = r"not finite at update 2 .* learning rate 1e\+30, images .*; the last good checkpoint is none"
    with pytest.raises(DivergedError, match=said) as raised:
        train(config(digits, tmp_path, optim=wild, steps=40, workers=1))
    assert MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(raised.value.run_id).info.status == "FAILED"
    (story,) = tmp_path.glob(f"mlartifacts/*/{raised.value.run_id}/artifacts/diverged.json")
    images = json.loads(story.read_text())["images"]
    assert images == digits.global_batch(0, 1, 8).tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unet": UNetConfig(image_size=16, in_channels=1, ch=32)}, "hold images 8x8x1, but"),
        ({"workers": 8, "cpus_per_worker": 2.0}, "the cluster has 4"),
        ({"diffusion": DiffusionConfig(var_type="learned", loss_type="kl")}, "wants a network with 2 output channels"),
        ({"shards": "/nonexistent"}, "'/nonexistent' does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_a_worker_starts(
    digits: ShardedDataset, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        train(config(digits, tmp_path, **changes))
    assert not list(tmp_path.glob("train/*/step-*"))
