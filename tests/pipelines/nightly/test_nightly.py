"""The nightly evaluation: a week of checkpoints that appear, break and get worse, and jobs that die and overlap."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from support.processes import IMPORTED, wait_for
from support.training import NETWORK, OPTIM

from ddpm_core.checkpoint import open_checkpoint, write_checkpoint
from ddpm_core.errors import InputError
from jobs.cli import parse, run
from jobs.nightly_eval import main
from pipelines.checkpoints.retention import marked_steps
from pipelines.evaluate.driver import evaluate
from pipelines.nightly import alarms, driver
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.driver import NightlyResult, budget, deliver_alarms, nightly
from pipelines.nightly.ledger import open_ledger
from pipelines.runtime.fan_out import Pool
from pipelines.shards.dataset import ShardedDataset
from pipelines.train.config import TrainConfig, config_for
from pipelines.train.driver import train
from pipelines.train.session import TrainResult

STEPS = 6


class Season:
    """A training whose checkpoints appear when a test says so, and the nights after it."""

    def __init__(self, trained: TrainResult, storage: Path) -> None:
        self.run, self.run_id, self.storage, self.folder = (
            trained.run.name,
            trained.run_id,
            storage,
            Path(str(trained.run.folder)),
        )
        self.hidden = storage / "hidden"
        self.client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
        self.lines: list[str] = []

    def show(self, step: int) -> Path:
        """Have a checkpoint appear as the training makes it: by a rename, and now."""
        path = (self.hidden / f"step-{step:08d}").rename(self.folder / f"step-{step:08d}")
        os.utime(path / "manifest.json")
        return path

    def config(self, **changes: Any) -> NightlyConfig:
        values: dict[str, Any] = {
            "storage": str(self.storage),
            "extractor": "pixels",
            "samples": 130,
            "chunk_size": 20,
            "batch_size": 10,
            "sampler_steps": 3,
            "workers": 1,
            "attempts": 2,
        }
        return NightlyConfig(**{**values, **changes})

    def night(self, **changes: Any) -> tuple[bool, NightlyResult]:
        """(whether there was an alarm, the result) of one night."""
        config = self.config(**changes)
        result = nightly(config, self.lines.append)
        return deliver_alarms(config, result, self.storage / "report.html", self.lines.append), result

    def job(self, monkeypatch: pytest.MonkeyPatch) -> int:
        """The exit code of one night by its command line."""
        options = (
            "--extractor pixels --samples 130 --chunk-size 20 --batch-size 10 --sampler-steps 3 --workers 1 --no-report"
        )
        monkeypatch.setattr(sys, "argv", ["nightly_eval.py", "--storage", str(self.storage), *options.split()])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return int(str(ended.value.code))

    def beside(self, name: str, step: int) -> Path:
        """A checkpoint of another training in the same experiment, which has no other."""
        (experiment,) = self.client.search_experiments(filter_string="name = 'ddpm'")
        run = self.client.create_run(experiment.experiment_id, run_name=name, tags={"ddpm.kind": "train"})
        self.client.log_param(run.info.run_id, "steps", STEPS)
        self.client.set_terminated(run.info.run_id)
        path = self.storage / "train" / name / f"step-{step:08d}"
        shutil.copytree(self.hidden / path.name, path)
        return path

    def evaluated(self) -> Any:
        """The MLflow run of the nightly protocol."""
        (experiment,) = self.client.search_experiments(filter_string="name = 'ddpm'")
        runs = self.client.search_runs([experiment.experiment_id], "tags.`ddpm.kind` = 'evaluate'")
        return next(run for run in runs if run.data.params["purpose"] == "selection")

    def history(self, key: str) -> list[Any]:
        return list(self.client.get_metric_history(self.evaluated().info.run_id, key))

    def best(self) -> dict[str, str]:
        return dict(self.client.get_model_version_by_alias(self.model, "best-fd-pixels").tags)

    @property
    def model(self) -> str:
        (registered,) = self.client.search_registered_models()
        return str(registered.name)


def training(digits: ShardedDataset, storage: Path) -> TrainConfig:
    return config_for(
        "tiny",
        shards=str(digits.path),
        storage=str(storage),
        unet=replace(NETWORK, dropout=0.0),
        optim=OPTIM,
        steps=STEPS,
        checkpoint_every=1,
        log_every=3,
        keep_last=STEPS,
    )


@pytest.fixture(scope="session")
def summer(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(training(digits, tmp_path_factory.mktemp("summer")))


@pytest.fixture
def season(summer: TrainResult, digits: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Season:
    """That training, once more in a storage of its own, with all of its checkpoints hidden. Samples after six steps look
    wrong, and rightly so: here they raise no alarm."""
    monkeypatch.setattr(alarms, "LEAST_SPREAD", 0.0)
    monkeypatch.setattr(alarms, "MOST_SATURATION", 1.0)
    shutil.copytree(Path(str(summer.run.folder)), tmp_path / "train" / summer.run.name)
    season = Season(train(training(digits, tmp_path)), tmp_path)  # finds it done, and makes its MLflow run
    season.hidden.mkdir()
    for path in season.folder.glob("step-*"):
        path.rename(season.hidden / path.name)
    return season


def spoil(checkpoint: Path) -> None:
    """Make a checkpoint worse than any: it sees dark noise everywhere, so that all of its samples are white."""
    whole = open_checkpoint(checkpoint)
    weights = {kind: dict(load_file(checkpoint / f"{kind}.safetensors")) for kind in ("model", "ema")}
    for tensors in weights.values():
        tensors["conv_out.bias"] = torch.full_like(tensors["conv_out.bias"], -100.0)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent.parent) as folder:
        made = write_checkpoint(Path(folder), {"step": whole.step, **weights, "optimizer": {}}, whole.config, [])
        shutil.rmtree(checkpoint)
        Path(str(made.path)).rename(checkpoint)


SCRIPT = """
import json, sys
import conftest
import ray
from jobs.cli import run, say
from pipelines.nightly.driver import nightly
from pipelines.nightly.config import NightlyConfig
if __name__ == "__main__":
    run(lambda: nightly(NightlyConfig(**json.loads(sys.argv[1])), say))
"""


def test_a_week(season: Season) -> None:
    # Monday: the first checkpoint.
    season.show(1)
    alarmed, result = season.night()
    assert not alarmed
    assert len(result.evaluated) == 1
    assert season.best()["ddpm.step"] == "1"
    assert "on samples it was not chosen by" in result.champions[0].describe()

    # Tuesday: a broken one fails, and the job goes on.
    torn = season.show(2)
    (torn / "ema.safetensors").write_bytes((torn / "ema.safetensors").read_bytes()[:-1])
    alarmed, result = season.night()
    assert not alarmed
    assert [work.step for work in result.failed] == [2]
    assert any("time 1 of 2" in line and "damaged" in line for line in season.lines)

    # Wednesday: it fails for the last time, beside a new one.
    season.show(3)
    alarmed, result = season.night()
    assert alarmed
    assert (len(result.evaluated), len(result.failed)) == (1, 1)
    assert "step 2 is left alone after 2 failed attempts" in result.new[0].text

    # Thursday: a regression. The alias stays, the broken one is not tried again.
    spoil(season.show(4))
    before = season.best()
    alarmed, result = season.night()
    assert alarmed
    assert not result.failed
    assert [alarm.kind for alarm in result.new] == ["worse"]
    assert season.best() == before
    assert "worse than" in season.evaluated().data.tags["ddpm.alarm"]
    assert result.describe()[0].startswith("ALARM ")

    # Friday: nothing is new, and nothing is delivered again.
    season.lines.clear()
    alarmed, result = season.night()
    assert not alarmed
    assert len(result.alarms) == 2
    assert not result.evaluated
    assert not any("samples" in line and "left" in line for line in season.lines)

    # Saturday: the job is killed in the middle; the next one takes its place, and what was made stays.
    season.show(5)
    settings = json.dumps({**asdict(season.config()), "sampler_steps": 3})
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, settings],
        env={**os.environ, "PYTHONPATH": IMPORTED, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        start_new_session=True,
    )
    fingerprint = season.evaluated().data.tags["ddpm.fingerprint"]
    chunks = season.storage / "evaluate" / season.run
    try:
        wait_for(lambda: len(list(chunks.glob("samples-*/step-00000005/chunk-*"))) >= 1)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    finished = (chunks / fingerprint / "step-00000005" / "manifest.json").exists()
    alarmed, result = season.night()
    assert not alarmed
    assert len(result.evaluated) == 1 or finished
    assert [alarm.kind for alarm in result.alarms] == ["failed"]  # the regression is over
    assert "worse" not in season.evaluated().data.tags["ddpm.alarm"]

    # Sunday: two jobs at once, and one checkpoint.
    season.show(6)
    results: list[NightlyResult] = []
    jobs = [threading.Thread(target=lambda: results.append(season.night()[1])) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(results) == 2
    assert sum(len(result.evaluated) for result in results) == 1

    run = season.evaluated()
    history = season.history("fd_pixels")
    assert sorted(metric.step for metric in history) == [1, 3, 4, 5, 6]
    values = {metric.step: metric.value for metric in history}
    assert int(season.best()["ddpm.step"]) != 4
    assert season.best()["ddpm.protocol"] == fingerprint
    newest = season.client.get_model_version_by_alias(season.model, "newest")
    assert newest.tags["ddpm.step"] == "6"
    (model,) = (
        each
        for each in season.client.search_logged_models([run.info.experiment_id])
        if f"models:/{each.model_id}" == newest.source
    )
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": season.model, "version": str(newest.version)}]
    # What the UI's table of models sorts by.
    models = season.client.search_logged_models(
        [run.info.experiment_id],
        filter_string="metrics.fd_pixels > 0",
        order_by=[{"field_name": "creation_timestamp"}],
    )
    measured = {int(model.params["step"]) for model in models}
    assert measured == {1, 3, 4, 5, 6}
    assert min(values, key=lambda step: values[step]) != 4
    # A model by its alias is what an evaluation by hand finds done.
    by_hand = evaluate(season.config().evaluation(f"models:/{season.model}@best-fd-pixels"))
    assert str(by_hand.best.step) == season.best()["ddpm.step"]
    # Training keeps it, whatever it deletes.
    assert int(season.best()["ddpm.step"]) in marked_steps(season.folder)
    folder = open_ledger(season.config()).folder
    assert not list((folder / "leases").iterdir())
    assert parse(NightlyConfig, ["--config", str(folder / "config.toml")], description="") == season.config()


def test_a_budget_is_kept_and_the_rest_left_for_the_next_night(season: Season) -> None:
    season.show(1)
    season.show(2)
    alarmed, result = season.night(hours=1e-9)
    assert (alarmed, result.evaluated, len(result.left)) == (False, [], 2)
    assert not any("samples" in line for line in season.lines)
    # Hours of four workers together.
    assert budget(season.config(gpu_hours=1.0, workers=None), cast(Pool, FakePool(4))) == 900.0
    assert budget(season.config(gpu_hours=99.0, workers=None), cast(Pool, FakePool(4))) == 8 * 3600.0
    _, result = season.night(report=False)
    assert len(result.evaluated) == 2
    assert result.evaluated[0].split(" step ")[1].startswith("2")  # the newest first


class FakePool:
    """A pool's size, without Ray."""

    def __init__(self, size: int) -> None:
        self.size = size


@pytest.mark.slow
def test_a_training_that_stopped_raises_one_alarm_until_it_goes_on(
    season: Season, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = season.show(3)
    season.client.update_run(season.run_id, status="RUNNING")
    season.client.set_tag(season.run_id, "ddpm.started", "0")
    alarmed, _ = season.night(report=False)
    assert not alarmed
    os.utime(shown / "manifest.json", (time.time() - 90_000,) * 2)
    assert season.job(monkeypatch) == 3
    said = f"training has made no checkpoint for 25 hours, at step 3 of {STEPS}"
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"nightly: ALARM {season.run}: {said}") for line in lines)
    page = (open_ledger(season.config()).folder.parent / "report.html").read_text()
    assert said in page[page.index("<header") : page.index("</header>")]
    assert "no checkpoint" in season.client.get_run(season.run_id).data.tags["ddpm.alarm"]
    assert season.job(monkeypatch) == 0
    season.client.update_run(season.run_id, status="FAILED")
    season.show(4)
    alarmed, result = season.night(report=False)
    assert alarmed
    assert "training failed at step 4 of 6" in result.new[0].text
    season.client.update_run(season.run_id, status="RUNNING")
    assert season.night(report=False)[1].alarms == []
    assert season.client.get_run(season.run_id).data.tags["ddpm.alarm"] == ""


def test_a_dry_run_only_says_what_is_new(season: Season) -> None:
    season.show(1)
    _, result = season.night(dry_run=True)
    assert [line for line in season.lines if line.startswith("nightly")] == [f"nightly: {season.run} step 1 is new"]
    assert not (season.storage / "evaluate").exists()
    assert result.left == [f"{season.run} step 1"]


def test_what_cannot_be_evaluated_as_asked_is_refused_at_the_start(season: Season) -> None:
    season.show(1)
    with pytest.raises(InputError, match="sampler-steps is 2000"):
        season.night(sampler_steps=2000)
    with pytest.raises(InputError, match=r"experiment 'ddpm' has no training 'nobody': train with"):
        season.night(run="nobody")
    with pytest.raises(InputError, match="--hours is -1"):
        season.config(hours=-1.0)
    assert not (season.storage / "evaluate").exists()


def test_an_alias_moves_only_from_what_is_deleted_or_worse(season: Season) -> None:
    shown = season.show(3)
    season.night(report=False)
    spoil(season.beside("tiny-worse", 4))
    _, result = season.night(report=False, run="tiny-worse")
    assert season.best()["ddpm.run"] == season.run
    assert result.champions == []
    assert any("stays at step 3" in line for line in season.lines)
    assert marked_steps(season.folder) == {3}
    shown.rename(season.hidden / shown.name)
    season.folder.rename(season.storage / "away")  # not gone: its storage is
    season.night(report=False, run="tiny-worse")
    assert season.best()["ddpm.run"] == season.run
    (season.storage / "away").rename(season.folder)
    season.night(report=False, run="tiny-worse")
    assert season.best()["ddpm.run"] == "tiny-worse"


@pytest.mark.slow
def test_the_best_of_a_training_is_kept_as_soon_as_it_is_measured(
    season: Season, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 3):
        season.show(step)

    def interrupt(*values: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "find_alarms", interrupt)
    with pytest.raises(KeyboardInterrupt):
        season.night(report=False)
    (kept,) = marked_steps(season.folder)
    values = {metric.step: metric.value for metric in season.history("fd_pixels")}
    assert kept == min(values, key=lambda step: values[step])


@pytest.mark.slow
def test_trouble_with_one_training_does_not_stop_the_others(season: Season) -> None:
    season.show(1)
    strange = season.beside("tiny-strange", 2) / "manifest.json"
    facts = json.loads(strange.read_text())
    facts["config"]["diffusion"]["from_the_future"] = 1
    strange.write_text(json.dumps(facts))
    alarmed, result = season.night(report=False)
    assert alarmed
    assert len(result.evaluated) == 1
    (alarm,) = result.new
    assert (alarm.run, alarm.of_training) == ("tiny-strange", True)
    assert "from_the_future" in alarm.text
    assert season.best()["ddpm.step"] == "1"


@pytest.mark.slow
def test_if_everything_fails_no_attempt_is_counted(season: Season) -> None:
    whole = {}
    for step in (1, 3):
        weights = season.show(step) / "ema.safetensors"
        whole[weights] = weights.read_bytes()
        weights.write_bytes(whole[weights][:-1])
    for _ in range(3):  # more often than a checkpoint may fail
        alarmed, result = season.night(report=False)
        assert (alarmed, len(result.failed)) == (False, 2)
    for weights, content in whole.items():
        weights.write_bytes(content)
    assert len(season.night(report=False)[1].evaluated) == 2


@pytest.mark.slow
def test_an_alarm_is_delivered_when_the_report_cannot_be_written(
    season: Season, monkeypatch: pytest.MonkeyPatch
) -> None:
    season.show(3)
    season.client.update_run(season.run_id, status="FAILED")
    folder = open_ledger(season.config()).folder.parent
    (folder / "report.html").mkdir(parents=True)
    assert season.job(monkeypatch) == 3
    assert season.job(monkeypatch) == 1  # delivered already, and still no report
