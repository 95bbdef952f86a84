"""Checkpoints: what was saved comes back exactly, damage is named, nothing runs on load, and a killed writer loses nothing."""

import contextlib
import copy
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddpm_core.checkpoint import Checkpoint, list_checkpoints, open_checkpoint, snapshot, write_checkpoint
from ddpm_core.commit import remove_leftovers, sha256_file, verify_files
from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.presets import PRESETS
from ddpm_core.training import OptimConfig, TrainState, train_step
from ddpm_core.unet import UNet

TINY = PRESETS["tiny"]
OPTIM = OptimConfig(batch_size=2, lr=1e-3, warmup_steps=0, ema_decay=0.9)
CONFIG = {"unet": asdict(TINY.unet), "diffusion": asdict(TINY.diffusion), "name": "tiny"}


def state_after(steps: int, seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    state = TrainState(UNet(TINY.unet), OPTIM)
    for step in range(steps):
        advance(state, step)
    return state


def advance(state: TrainState, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    x, noise = torch.randn(2, 2, 1, 8, 8, generator=g)
    train_step(state, TINY.diffusion.build(), state.model, OPTIM, x_start=x, t=torch.tensor([3, 700]), noise=noise)


def tensors(state: TrainState) -> dict[str, Tensor]:
    values = {f"model.{name}": p.detach() for name, p in state.model.named_parameters()}
    values |= {f"ema.{name}": tensor for name, tensor in state.ema.shadow.items()}
    for i, entry in state.optimizer.state_dict()["state"].items():
        values |= {f"adam.{i}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    return values


def assert_equal_states(a: TrainState, b: TrainState) -> None:
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert a.step == b.step


@pytest.fixture(scope="module")
def trained() -> TrainState:
    return state_after(2)


def test_model_average_and_optimizer_come_back_exactly(tmp_path: Path, trained: TrainState) -> None:
    saved = write_checkpoint(tmp_path, snapshot(trained), CONFIG, [{"step": 1, "loss": 0.5}])
    assert saved.path.name == "step-00000002"
    resumed = state_after(0, seed=9)
    open_checkpoint(saved.path).restore(resumed)
    assert_equal_states(resumed, trained)
    advance(resumed, 2)  # and goes on as if nothing had happened
    undisturbed = state_after(3)
    assert_equal_states(resumed, undisturbed)


def test_a_checkpoint_knows_its_step_history_and_configuration(tmp_path: Path, trained: TrainState) -> None:
    write_checkpoint(tmp_path, snapshot(trained), CONFIG, [{"step": 1, "loss": 0.5}])
    (checkpoint,) = list_checkpoints(tmp_path)
    assert checkpoint.step == 2
    assert checkpoint.history == [{"step": 1, "loss": 0.5}]
    assert checkpoint.unet_config() == TINY.unet
    assert checkpoint.diffusion_config() == DiffusionConfig(var_type="fixedlarge")


def test_the_whole_history_of_a_long_run_comes_back_exactly(tmp_path: Path, trained: TrainState) -> None:
    history = [
        {"step": 100 * n, "loss": 0.1 / n, "grad_norm": 1e300 / n, "lr": 2e-4, "images_per_second": 812.25 + n}
        for n in range(1, 13_001)
    ]
    saved = write_checkpoint(tmp_path, snapshot(trained), CONFIG, history)
    assert saved.history == history
    assert (saved.path / "history.jsonl").stat().st_size < 2_000_000
    assert (saved.path / "manifest.json").stat().st_size < 10_000  # a list of many checkpoints stays cheap
    with (saved.path / "history.jsonl").open("a") as file:
        file.write('{"step": 1300100, "loss": 0.0}\n')
    with pytest.raises(InputError, match=r"has a damaged file 'history.jsonl'"):
        _ = saved.history


def test_a_snapshot_shares_nothing_and_takes_the_memory_of_an_earlier_one() -> None:
    state = state_after(1)
    first = snapshot(state)
    before = copy.deepcopy(first)
    advance(state, 1)
    assert_equal_trees(first, before)
    addresses = {tensor.data_ptr() for tensor in leaves(first)}
    second = snapshot(state, first)
    assert_equal_trees(second, state.state_dict())
    assert {tensor.data_ptr() for tensor in leaves(second)} == addresses
    other = TrainState(torch.nn.Linear(3, 2), OPTIM)  # nothing of it fits
    assert_equal_trees(snapshot(other, second), other.state_dict())
    untrained = state_after(0)
    assert_equal_trees(
        snapshot(state, snapshot(untrained)), state.state_dict()
    )  # Adam's moments come with its first step


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else []
    return [leaf for item in items for leaf in leaves(item)]


def assert_equal_trees(one: Any, two: Any) -> None:
    """Equal keys, values, shapes and layouts."""
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
        assert one.stride() == two.stride()
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_equal_trees(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert type(one) is type(two)
        for a, b in zip(one, two, strict=True):
            assert_equal_trees(a, b)
    else:
        assert one == two


def test_a_reader_of_a_checkpoint_being_replaced_gets_its_own_weights(tmp_path: Path) -> None:
    state = TrainState(torch.nn.Linear(200, 200), OPTIM)
    stop = threading.Event()

    def write(value: float = 0.0) -> None:
        for tensor in [*state.model.parameters(), *state.ema.shadow.values()]:
            tensor.data.fill_(value)
        write_checkpoint(tmp_path, snapshot(state), {"value": value})

    def read() -> int:
        good = 0
        while not stop.is_set():
            with contextlib.suppress(InputError):
                checkpoint = open_checkpoint(tmp_path / "step-00000000")
                weights = checkpoint.weights()
                assert all(bool((tensor == checkpoint.config["value"]).all()) for tensor in weights.values())
                good += 1
        return good

    write()
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for number in range(60):
                write(float(number))
        finally:
            stop.set()
    assert all(reader.result() > 0 for reader in readers)


def test_a_list_is_made_beside_a_deletion(tmp_path: Path, trained: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    for trained.step in (1, 2):
        write_checkpoint(tmp_path, snapshot(trained), CONFIG)

    def open_late(path: Path) -> Checkpoint:
        if path.name == "step-00000001":
            path.rename(tmp_path / ".step-00000001.0123abcd.del")
        return open_checkpoint(path)

    monkeypatch.setattr("ddpm_core.checkpoint.open_checkpoint", open_late)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2]
    (tmp_path / "step-00000002" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"damaged manifest.json"):  # which is no deletion
        list_checkpoints(tmp_path)


def test_weights_are_the_named_ones(tmp_path: Path, trained: TrainState) -> None:
    saved = write_checkpoint(tmp_path, snapshot(trained), CONFIG)
    raw, ema = saved.weights("raw"), saved.weights()
    assert all(torch.equal(raw[name], p.detach()) for name, p in trained.model.named_parameters())
    assert all(torch.equal(ema[name], tensor) for name, tensor in trained.ema.shadow.items())
    assert not torch.equal(raw["conv_out.weight"], ema["conv_out.weight"])
    UNet(saved.unet_config()).load_state_dict(ema)
    assert saved.weights_sha256("raw") == sha256_file(saved.path / "model.safetensors") != saved.weights_sha256("ema")


def test_checkpoints_are_listed_by_step_and_unfinished_ones_are_not(tmp_path: Path, trained: TrainState) -> None:
    step = trained.step
    for trained.step in (100, 20, 123_456_789):
        write_checkpoint(tmp_path, snapshot(trained), CONFIG)
    trained.step = step
    (tmp_path / "step-00000050").mkdir()
    (tmp_path / ".step-00000060.0123abcd.tmp").mkdir()
    (tmp_path / ".step-00000060.0123abcd.tmp" / "manifest.json").write_text("{}")
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [20, 100, 123_456_789]
    assert list_checkpoints(tmp_path / "absent") == []


FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_file_is_refused_by_name_and_changes_nothing(
    tmp_path: Path, trained: TrainState, name: str, damage: str
) -> None:
    saved = write_checkpoint(tmp_path, snapshot(trained), CONFIG)
    file = saved.path / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content[: {"truncated": len(content) // 3, "flipped": len(content), "empty": 0}[damage]])
    state = state_after(1, seed=4)
    before = {key: value.clone() for key, value in tensors(state).items()}
    with pytest.raises(InputError, match=rf"checkpoint '.*step-00000002' (has a damaged|lacks its) file '{name}'"):
        saved.restore(state)
    assert all(torch.equal(before[key], value) for key, value in tensors(state).items())
    if name != "optimizer.pt":
        with pytest.raises(InputError, match=name):
            saved.weights("ema" if name.startswith("ema") else "raw")


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_nothing_runs_when_a_forged_optimizer_is_loaded(tmp_path: Path, trained: TrainState, form: str) -> None:
    """The manifest is forged too, so that every checksum agrees."""
    saved = write_checkpoint(tmp_path, snapshot(trained), CONFIG)
    file, sprung = saved.path / "optimizer.pt", tmp_path / "sprung"
    payload = {"state": Bomb(str(sprung)), "param_groups": []}
    if form == "torch.save":
        torch.save(payload, file)
    else:
        file.write_bytes(pickle.dumps(payload, protocol=2))
    manifest = json.loads((saved.path / "manifest.json").read_text())
    manifest["files"]["optimizer.pt"] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    (saved.path / "manifest.json").write_text(json.dumps(manifest))
    forged = open_checkpoint(saved.path)
    verify_files(forged.path, {"files": forged.files}, what="checkpoint")
    with pytest.raises(InputError, match=r"optimizer.pt that holds more than tensors and numbers"):
        forged.restore(state_after(0))
    assert not sprung.exists()
    # The bomb is live: a loader that trusts the file would set it off.
    torch.load(file, weights_only=False) if form == "torch.save" else pickle.loads(file.read_bytes())
    assert sprung.exists()


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoint '.*absent' does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no manifest.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text('{"files": {}, "rows": 3}')
    with pytest.raises(InputError, match=r"a manifest without config, step: it is the folder of something else"):
        open_checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text('{"files": {}, "step": 3, "config": {}}')
    with pytest.raises(InputError, match=r"holds no ema.safetensors: it is the folder of something else"):
        open_checkpoint(tmp_path).weights()


@pytest.mark.parametrize("moment", ["model", "ema", "optimizer", "manifest"])
def test_a_writer_stopped_at_any_file_leaves_the_checkpoints_before(
    tmp_path: Path, trained: TrainState, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write_checkpoint(tmp_path, snapshot(trained), CONFIG)

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    if moment == "optimizer":
        monkeypatch.setattr(torch, "save", stop)
    elif moment == "manifest":
        monkeypatch.setattr("ddpm_core.commit.json_text", stop)
    else:

        def sometimes(weights: Any, path: Path) -> None:
            if path.stem == moment:
                path.write_bytes(b"half")
                stop()
            save_file(weights, path)

        monkeypatch.setattr("safetensors.torch.save_file", sometimes)
    for later in (2, 3):  # over the one that stands there, and beside it
        trained.step = later
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, snapshot(trained), CONFIG)
    trained.step = 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    resumed = state_after(0, seed=9)
    list_checkpoints(tmp_path)[-1].restore(resumed)
    assert_equal_states(resumed, trained)


WRITER = """
import sys, torch
from pathlib import Path
from torch import nn
from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.training import OptimConfig, TrainState
torch.set_num_threads(1)
state = TrainState(nn.Linear(300, 300), OptimConfig())
folder, state.step = Path(sys.argv[1]), int(sys.argv[2])
while True:
    state.step += 1
    for tensor in [*state.model.parameters(), *state.ema.shadow.values()]:
        tensor.data.fill_(state.step)
    write_checkpoint(folder, snapshot(state), {"step": state.step})
"""


def whole(checkpoint: Checkpoint) -> bool:
    """Every file is there and of the same step."""
    verify_files(checkpoint.path, {"files": checkpoint.files}, what="checkpoint")
    values = [*checkpoint.weights("raw").values(), *checkpoint.weights("ema").values()]
    return checkpoint.config["step"] == checkpoint.step and all(bool((v == checkpoint.step).all()) for v in values)


def test_a_writer_killed_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """kill -9 of a process that does nothing but save, twice at a random moment."""
    dice, last = random.Random(0), 0
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(last)])
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / f"step-{last + 2:08d}").exists():
                assert writer.poll() is None
                assert time.monotonic() < deadline, "the writer never got to its second checkpoint"
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.1))
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        checkpoints = list_checkpoints(tmp_path)
        assert [c.step for c in checkpoints] == list(
            range(1, checkpoints[-1].step + 1)
        )  # none is missing, none is torn
        assert all(whole(c) for c in checkpoints)
        assert checkpoints[-1].step > last
        last = checkpoints[-1].step
        remove_leftovers(tmp_path)
        assert all(path.name.startswith("step-") for path in tmp_path.iterdir())
