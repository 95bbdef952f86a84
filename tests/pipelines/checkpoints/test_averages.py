"""EMA of any length from what a run has kept: the same whatever was deleted meanwhile, from everywhere."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.states import new_state
from torch import Tensor, nn

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint, snapshot
from ddpm_core.ema import PowerEma
from ddpm_core.errors import InputError
from ddpm_core.posthoc_ema import chosen_steps
from ddpm_core.training import OptimConfig, TrainState
from pipelines.checkpoints import averages, retention
from pipelines.checkpoints.averages import averaged_checkpoint, kept_averages
from pipelines.checkpoints.retention import mark_best, prune
from pipelines.checkpoints.saver import Saver
from pipelines.checkpoints.store import commit_snapshot, commit_weights, saved_checkpoints, saved_steps
from pipelines.storage.locations import Location, location

UPDATES = 24
POSTHOC = OptimConfig(warmup_steps=0, posthoc_ema=True)


def tracking_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    return TrainState(nn.Linear(4, 3), POSTHOC)


def walk(state: TrainState, updates: int, others: tuple[PowerEma, ...] = ()) -> None:
    """Updates in place of a training's, each a random step of the weights that depends on its number."""
    for _ in range(updates):
        g = torch.Generator().manual_seed(state.step)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.1)
        for ema in (state.ema, *state.averages.values(), *others):
            ema.update(state.step)
        state.step += 1


def train(
    folder: Location, *, keep_last: int, others: tuple[PowerEma, ...] = (), state: TrainState | None = None
) -> None:
    """A run that saves after every update."""
    state = tracking_state() if state is None else state
    with Saver(folder, keep_last=keep_last) as saver:
        while state.step < UPDATES:
            walk(state, 1, others)
            saver.save(state, {"name": "linear"}, [])


def newest(folder: Location) -> Checkpoint:
    return saved_checkpoints(folder)[-1]


def ema(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return checkpoint.weights("ema")


def averaged(folder: Location, length: float, into: Path) -> Checkpoint:
    return averaged_checkpoint(newest(folder), length, into, lambda line: None)


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A run's folder, empty."""
    if request.param == "local":
        (tmp_path / "a[b]").mkdir()  # no pattern, whatever it looks like
        return tmp_path / "a[b]"
    root = request.getfixturevalue("s3_bucket") if request.param == "s3" else "memory:/"
    return location(f"{root}/{tmp_path.name}/a[b]", option="--storage")


@pytest.mark.parametrize("folder", ["local", "memory"], indirect=True)
def test_deleting_checkpoints_changes_no_bit_of_an_ema_made_after_the_training(
    folder: Location, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    train(whole, keep_last=UPDATES)
    train(folder, keep_last=2)
    assert saved_steps(whole) == list(range(1, UPDATES + 1))
    assert saved_steps(folder) == [UPDATES - 1, UPDATES]
    assert set(kept_averages(folder)) == set(chosen_steps(range(1, UPDATES + 1))) - set(saved_steps(folder))
    for length in (0.075, 0.15):
        one, other = (
            averaged(whole, length, tmp_path / f"one{length}"),
            averaged(folder, length, tmp_path / f"other{length}"),
        )
        assert one.made_of == other.made_of
        assert one.weights_sha256("ema") == other.weights_sha256("ema")


def test_an_ema_made_after_the_training_is_near_the_one_tracked_in_it(tmp_path: Path) -> None:
    state = tracking_state()
    direct = PowerEma(state.model, 0.075)
    train(tmp_path, keep_last=1, others=(direct,), state=state)
    made = averaged(tmp_path, 0.075, tmp_path / "made")
    assert made.made_of is not None
    assert made.made_of["error"] < 0.03
    near, far = (
        sum(float((weights[name] - wanted).square().sum()) for name, wanted in direct.shadow.items())
        for weights in (ema(made), ema(newest(tmp_path)))
    )
    assert near < 1e-4 * far


def test_an_ema_of_a_tracked_length_is_the_tracked_one_to_the_bit(tmp_path: Path) -> None:
    train(tmp_path, keep_last=3)
    checkpoint = newest(tmp_path)
    for length in ("0.05", "0.1"):
        made = ema(averaged(tmp_path, float(length), tmp_path / length))
        assert all(torch.equal(made[name], checkpoint.averages()[f"{length}/{name}"]) for name in made)
    assert made.keys() == ema(checkpoint).keys()


def test_averages_come_back_exactly_and_a_resumed_run_goes_on_from_them(tmp_path: Path) -> None:
    undisturbed = tracking_state()
    walk(undisturbed, 5)
    commit_snapshot(tmp_path, snapshot(undisturbed), {}, [])
    walk(undisturbed, 4)
    resumed = tracking_state(seed=1)
    newest(tmp_path).restore(resumed)
    walk(resumed, 4)
    one, other = undisturbed.state_dict(), resumed.state_dict()
    assert one["averages"].keys() == other["averages"].keys()
    assert all(torch.equal(tensor, other["averages"][name]) for name, tensor in one["averages"].items())


def test_a_run_that_tracks_no_averages_keeps_none_and_is_refused(tmp_path: Path) -> None:
    with Saver(tmp_path, keep_last=1) as saver:
        for step in (1, 2, 3):
            saver.save(new_state(step), {}, [])
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(3)]
    with pytest.raises(
        InputError, match=r"has no averages to make an EMA of length 0.15 from: train with --optim.posthoc"
    ):
        averaged(tmp_path, 0.15, tmp_path / "made")


def test_too_few_averages_for_a_length_are_said(tmp_path: Path) -> None:
    state, said = tracking_state(), list[str]()
    for updates in (20, 20):
        walk(state, updates)
        commit_snapshot(tmp_path, snapshot(state), {}, [])
    averaged_checkpoint(newest(tmp_path), 0.2, tmp_path / "made", said.append)
    (line,) = said
    assert line.startswith(
        "checkpoints: step 40 has averages of 2 steps to make an EMA of length 0.2 from, whose profile is 4"
    )
    averaged_checkpoint(newest(tmp_path), 0.08, tmp_path / "made", said.append)
    assert len(said) == 1


def test_a_deletion_that_is_stopped_loses_no_averages(
    folder: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tracking_state()
    for _ in range(6):
        walk(state, 1)
        commit_snapshot(folder, snapshot(state), {}, [])
    wanted = averaged(folder, 0.15, tmp_path / "before")

    def stopped(folder: Location, step: int) -> None:
        raise OSError("the power went")

    monkeypatch.setattr(retention, "delete_checkpoint", stopped)
    with pytest.raises(OSError, match="the power went"):
        prune(folder, 6, 1, None)
    assert averaged(folder, 0.15, tmp_path / "between").weights_sha256("ema") == wanted.weights_sha256("ema")
    monkeypatch.undo()
    prune(folder, 6, 1, None)
    assert saved_steps(folder) == [6]
    assert averaged(folder, 0.15, tmp_path / "after").weights_sha256("ema") == wanted.weights_sha256("ema")


def test_an_average_is_made_once_and_anew_if_the_run_is_another(tmp_path: Path) -> None:
    train(tmp_path, keep_last=1)
    made = averaged(tmp_path, 0.15, tmp_path / "made")
    stamp = (made.path / "manifest.json").stat().st_mtime_ns
    assert averaged(tmp_path, 0.15, tmp_path / "made") == made
    assert (made.path / "manifest.json").stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / checkpoint_name(UPDATES))
    train(tmp_path, keep_last=1, state=tracking_state(seed=1))
    assert set(kept_averages(tmp_path)) == set(chosen_steps(range(1, UPDATES)))
    again = averaged(tmp_path, 0.15, tmp_path / "made")
    assert again.weights_sha256("ema") != made.weights_sha256("ema")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    train(fresh, keep_last=UPDATES, state=tracking_state(seed=1))
    assert averaged(fresh, 0.15, tmp_path / "of fresh").weights_sha256("ema") == again.weights_sha256("ema")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_two_commands_that_want_an_ema_one_makes_it(
    place: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    train(tmp_path / "run", keep_last=1)
    into: Location = tmp_path / "made"
    if place == "s3":
        into = location(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}/made", option="--storage")
    commits: list[Location] = []

    def commit_slowly(folder: Location, *arguments: Any) -> None:
        commits.append(folder)
        time.sleep(1.0)
        commit_weights(folder, *arguments)

    monkeypatch.setattr(averages, "commit_weights", commit_slowly)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: averaged_checkpoint(newest(tmp_path / "run"), 0.1, into, print), range(2))
    assert commits == [into]
    assert one == two


def test_a_damaged_file_of_averages_is_named(tmp_path: Path) -> None:
    train(tmp_path, keep_last=1)
    path = min(kept_averages(tmp_path).items())[1]
    assert isinstance(path, Path)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=rf"file '.*{path.name}' is damaged \(sha256 differs\): delete it"):
        averaged(tmp_path, 0.15, tmp_path / "made")


def test_what_the_averages_were_made_of_is_said_and_the_rest_is_not_there(tmp_path: Path) -> None:
    train(tmp_path, keep_last=1)
    mark_best(tmp_path, UPDATES)
    made = open_checkpoint(averaged(tmp_path, 0.15, tmp_path / "made").path)
    assert made.config["name"] == "linear"
    assert made.made_of is not None
    assert made.made_of["length"] == 0.15
    assert made.made_of["steps"] == chosen_steps(range(1, UPDATES), UPDATES)
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        made.weights("raw")
