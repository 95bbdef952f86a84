"""Training: the same steps for any number of workers, and the same end whatever was killed on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.errors import DivergedError, InputError
from ddpm_core.training import OptimConfig
from ddpm_core.unet import UNet, UNetConfig
from pipelines.shards import ShardedDataset
from pipelines.train import TrainResult, train
from pipelines.training_config import TrainConfig, config_for
from pipelines.training_loop import initial_state, make_batch

ROOT = Path(__file__).resolve().parent.parent.parent
NETWORK = UNetConfig(
    image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dropout=0.1
)
OPTIM = OptimConfig(batch_size=8, lr=1e-3, warmup_steps=2, ema_decay=0.9)


def config(digits: ShardedDataset, storage: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "shards": str(digits.path),
        "storage": str(storage),
        "unet": NETWORK,
        "optim": OPTIM,
        "horizontal_flip": True,
        "steps": 12,
        "workers": 2,
        "checkpoint_every": 4,
        "log_every": 2,
    }
    return config_for("tiny", **{**values, **changes})


@pytest.fixture(scope="session")
def undisturbed(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(config(digits, tmp_path_factory.mktemp("undisturbed")))


def contents(result: TrainResult) -> dict[str, bytes]:
    """What must be equal: weights, EMA and optimizer of the last checkpoint, and every logged loss."""
    names = ("model.safetensors", "ema.safetensors", "optimizer.pt")
    return {name: (result.last.path / name).read_bytes() for name in names} | {"losses": repr(losses(result)).encode()}


def losses(result: TrainResult) -> list[tuple[float, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for c in result.checkpoints for r in c.history]


def logged(result: TrainResult, storage: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    history = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_metric_history(result.run_id, "loss")
    return sorted((metric.step, metric.value) for metric in history)


def test_a_run_leaves_checkpoints_records_and_models(undisturbed: TrainResult) -> None:
    assert [checkpoint.step for checkpoint in undisturbed.checkpoints] == [4, 8, 12]
    assert [step for step, _, _ in losses(undisturbed)] == [2, 4, 6, 8, 10, 12]
    storage = undisturbed.folder.parent.parent
    assert logged(undisturbed, storage) == [(step, loss) for step, loss, _ in losses(undisturbed)]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(undisturbed.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.batch_size"] == "8"
    models = client.search_logged_models([run.info.experiment_id])
    assert {int(model.params["step"]) for model in models} == {4, 8, 12}


def test_the_same_command_again_does_nothing(undisturbed: TrainResult, digits: ShardedDataset) -> None:
    before = undisturbed.last.path.stat().st_mtime_ns
    lines: list[str] = []
    again = train(config(digits, undisturbed.folder.parent.parent), lines.append)
    assert again == undisturbed
    assert again.last.path.stat().st_mtime_ns == before
    assert lines == [f"train: {again.name} is done, 12 steps"]


def test_one_worker_takes_the_same_steps_as_two(
    undisturbed: TrainResult, digits: ShardedDataset, tmp_path: Path
) -> None:
    # Without dropout, whose masks belong to a worker.
    plain = replace(NETWORK, dropout=0.0)
    one = train(config(digits, tmp_path / "one", workers=1, unet=plain))
    two = train(config(digits, tmp_path / "two", workers=2, unet=plain))
    assert one.name == two.name
    for ours, theirs in zip(losses(one), losses(two), strict=True):
        # Sums of eight float32 losses in another order; twelve steps do not amplify that beyond 1e-5.
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_loop_in_plain_torch_takes_the_same_steps(digits: ShardedDataset, tmp_path: Path) -> None:
    settings = config(digits, tmp_path, workers=1, unet=replace(NETWORK, dropout=0.0), steps=4, log_every=1)
    result = train(settings)
    model = UNet(settings.unet)
    model.load_state_dict(initial_state(settings).model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for step, (_, expected, _) in enumerate(losses(result)):
        batch = make_batch(settings, digits, step, 0, 1)
        scale = abar[batch.t].reshape(-1, 1, 1, 1)
        x_t = (scale.sqrt() * batch.x_start + (1 - scale).sqrt() * batch.noise).float()
        loss = torch.nn.functional.mse_loss(model(x_t, batch.t), batch.noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(step / 2, 1)
        optimizer.step()
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_batch_of_a_step_is_the_same_for_any_number_of_workers(digits: ShardedDataset) -> None:
    settings = config(digits, Path("/"))
    whole = make_batch(settings, digits, 7, 0, 1)
    for workers in (2, 3, 8):
        shares = [make_batch(settings, digits, 7, rank, workers) for rank in range(workers)]
        for name in ("x_start", "t", "noise"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))
    assert not torch.equal(whole.noise, make_batch(settings, digits, 8, 0, 1).noise)


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
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest
import ray
from pipelines.shards import ShardedDataset
from pipelines.train import train
from test_train import config
if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)
    train(config(ShardedDataset.open({shards!r}), Path({storage!r})), lambda line: print(line, flush=True))
"""


def workers_of(folder: str) -> list[int]:
    """Ray Train's worker processes whose current folder or command line belongs to a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if command.startswith("ray::") and folder in command:
                found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def test_a_driver_killed_with_its_cluster_is_resumed_to_the_same_bits(
    undisturbed: TrainResult, digits: ShardedDataset, tmp_path: Path
) -> None:
    folder = Path(__file__).parent
    script = SCRIPT.format(tests=f"{folder}", shards=str(digits.path), storage=str(tmp_path))
    path = [str(ROOT), str(folder), str(folder.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    driver = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    try:
        wait_for(lambda: list(tmp_path.glob("train/*/step-00000004/manifest.json")))
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    there = len(list(tmp_path.glob("train/*/step-*")))
    resumed = train(config(digits, tmp_path))
    assert there < 3  # it was killed on the way, not after the end
    assert contents(resumed) == contents(undisturbed)
    assert logged(resumed, tmp_path) == [(step, loss) for step, loss, _ in losses(undisturbed)]


def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_same_bits(
    undisturbed: TrainResult, digits: ShardedDataset, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(line: str) -> None:
        if not killed and list(tmp_path.glob("train/*/step-00000004/manifest.json")):
            killed.extend(workers_of("RayTrainWorker")[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    result = train(config(digits, tmp_path), kill_one)
    assert killed
    assert contents(result) == contents(undisturbed)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    digits: ShardedDataset, tmp_path: Path
) -> None:
    good = train(config(digits, tmp_path, steps=4))
    state = initial_state(config(digits, tmp_path))
    good.last.restore(state)
    assert all(torch.isfinite(tensor).all() for tensor in state.ema.shadow.values())
    # A weight of that size overflows the squares of the very next loss.
    victim = good.last.path / "model.safetensors"
    assert victim.is_file()
    wild = OptimConfig(batch_size=8, lr=1e30, warmup_steps=0, ema_decay=0.9)
    with pytest.raises(DivergedError, match=r"is not finite by step \d+ .*last good checkpoint is none"):
        train(config(digits, tmp_path, optim=wild, steps=40))
    assert contents(train(config(digits, tmp_path, steps=4))) == contents(good)


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
