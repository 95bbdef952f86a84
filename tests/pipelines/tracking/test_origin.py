"""Where a run comes from, as MLflow shows it: its command, its code and its data."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.tracking import origin
from pipelines.tracking.origin import command, data_input, git_tags
from pipelines.tracking.tracker import Tracker

CARD = {"name": "church", "images": 126_227, "shape": [256, 256, 3], "mean": [0.1, 0.0, -0.1]}


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_run_shows_its_command_and_data_and_is_found_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(origin.ROOT / "jobs" / "train_lsun.py"), "church", "--shards", "/data/a b"])
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "origin", tmp_path)
    data = data_input("church", "ab12" * 16, CARD, Path("/data/church"), "training")
    for _ in range(2):  # the same command again
        run = tracker.run("train", "r", "f", params={"a": "1"}, tags={}, data=data)
    found = tracker.client.get_run(run.run_id)
    assert found.data.tags["mlflow.source.name"] == "python jobs/train_lsun.py church --shards '/data/a b'"
    assert found.data.tags["mlflow.source.type"] == "JOB"
    (logged,) = found.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("church", "ab12ab12ab12")
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]
    assert '"images": 126227' in logged.dataset.profile
    for condition, count in (("dataset.name = 'church'", 1), ("dataset.name = 'bedroom'", 0)):
        assert len(tracker.search(condition)) == count


def test_a_checkouts_commit_is_named_and_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    assert git_tags.__wrapped__() == {}
    git(tmp_path, "init", "--initial-branch", "main")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    tags = {"mlflow.source.git.commit": commit, "mlflow.source.git.branch": "main"}
    assert git_tags.__wrapped__() == {**tags, "mlflow.source.git.dirty": "false"}
    (tmp_path / "code.py").write_text("2")
    assert git_tags.__wrapped__() == {**tags, "mlflow.source.git.dirty": "true"}
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(origin, "ROOT", tmp_path / "inside")
    assert git_tags.__wrapped__() == {}


def test_a_command_of_another_program_is_named_without_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-q"])
    assert command() == "pytest -q"
