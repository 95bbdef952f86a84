"""Which checkpoint a person means, and what lies where a storage was moved to."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.states import new_state

from ddpm_core.checkpoint import snapshot, write_checkpoint
from ddpm_core.errors import InputError
from pipelines.checkpoints.select import find_checkpoints
from pipelines.storage.layout import Storage, shards_of
from pipelines.tracking.tracker import Tracker
from pipelines.train.config import config_for


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a run of one checkpoint, and its shards."""
    storage = tmp_path_factory.mktemp("made") / "runs"
    (storage / "digits").mkdir(parents=True)
    settings = config_for("tiny", shards=str(storage / "digits"), storage=str(storage))
    folder = storage / "train" / "church-1"
    folder.mkdir(parents=True)
    write_checkpoint(folder, snapshot(new_state()), asdict(settings))
    return storage


def test_a_model_of_a_server_is_found_in_a_storage_that_was_moved(made: Path, tmp_path: Path) -> None:
    """The records are elsewhere, as a server's are, and hold the place of before."""
    tracker = Tracker(f"sqlite:///{tmp_path}/server/mlflow.db", "ddpm", tmp_path / "server")
    run = tracker.run("train", "church-1", "1", params={"a": "1"}, tags={})
    (checkpoint,) = (made / "train" / "church-1").iterdir()
    model = run.checkpoint_model("church-1-step-0", 0, checkpoint, "0" * 64)
    uri = tracker.uri
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    hidden = made.with_name("hidden")
    made.rename(hidden)
    try:
        _, (found,) = find_checkpoints(model, "all", Storage(moved), uri)
        assert found.path == moved / "train" / "church-1" / checkpoint.name
        with pytest.raises(InputError) as refused:
            find_checkpoints(model, "all", Storage(tmp_path / "other"), uri)
        assert str(checkpoint) in str(refused.value)
        assert str(tmp_path / "other" / "train") in str(refused.value)
    finally:
        hidden.rename(made)


def test_shards_of_a_moved_storage_are_those_in_it(made: Path, tmp_path: Path) -> None:
    _, (checkpoint,) = find_checkpoints("church-1", "all", Storage(made), f"sqlite:///{made}/mlflow.db")
    assert shards_of(checkpoint.config, checkpoint.path) == str(made / "digits")
    shutil.copytree(made, tmp_path / "copy")
    copy = replace(checkpoint, path=tmp_path / "copy" / "train" / "church-1" / checkpoint.path.name)
    assert shards_of(copy.config, copy.path) == str(tmp_path / "copy" / "digits")
    outside = {**copy.config, "shards": "/elsewhere/digits"}
    assert shards_of(outside, copy.path) == "/elsewhere/digits"


@pytest.mark.parametrize("name", ["../train/church-1", "/train/church-1", "..", "evaluate/../train/church-1"])
def test_a_name_leads_to_no_folder_outside_the_trainings_results(
    made: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    try:
        run, _ = find_checkpoints(name, "all", Storage(made), f"sqlite:///{made}/mlflow.db")
    except InputError:
        return
    assert run.evaluations == made / "evaluate" / "church-1"
