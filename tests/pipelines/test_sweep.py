"""A sweep calls the same train() and evaluate() as everything else, and its trials are plain runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_train import NETWORK, OPTIM

from ddpm_core.errors import InputError
from ddpm_core.training import OptimConfig
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.shards import ShardedDataset
from pipelines.sweep import SweepConfig, sweep
from pipelines.train import train
from pipelines.training_config import config_for


def config(digits: ShardedDataset, storage: Path, **train_changes: Any) -> SweepConfig:
    values: dict[str, Any] = {
        "shards": str(digits.path),
        "storage": str(storage),
        "unet": replace(NETWORK, dropout=0.0),
        "optim": OPTIM,
        "steps": 4,
        "checkpoint_every": 4,
        "log_every": 2,
    }
    measured = EvaluateConfig(
        run="", extractor="pixels", samples=60, chunk_size=12, batch_size=12, sampler="ddim", sampler_steps=2
    )
    return SweepConfig(train=config_for("tiny", **{**values, **train_changes}), evaluate=measured)


def test_a_trial_is_the_plain_run_of_its_values_and_a_second_sweep_does_nothing(
    digits: ShardedDataset, tmp_path: Path
) -> None:
    settings = config(digits, tmp_path)
    result = sweep(settings)
    assert [trial.label for trial in result.trials] == ["linear", "quad"]
    assert all(trial.distance is not None for trial in result.trials)
    assert result.ranking[0].distance == min(trial.distance or 0.0 for trial in result.trials)

    lines: list[str] = []
    plain = train(settings.trials()["quad"], lines.append)
    assert lines == [f"train: {plain.name} is done, 4 steps"]
    assert plain.run_id == result.trials[1].run_id
    lines.clear()
    again = evaluate(replace(settings.evaluate, run=plain.name, storage=str(tmp_path)), lines.append)
    assert again.best.distance == result.trials[1].distance
    assert "is done" in lines[-1]

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert sweep(settings) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == stamps

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    root = Path(client.get_run(result.run_id).info.artifact_uri.removeprefix("file://"))
    rows = json.loads((root / "trials.json").read_text())
    assert [(row["label"], row["status"]) for row in rows] == [("linear", "finished"), ("quad", "finished")]
    # The linear schedule leaves less of the image in x_T (paper.md's L_T: 2.9e-5 against 5.3e-4 at x_0 = +-1).
    assert rows[0]["prior_bpd"] < rows[1]["prior_bpd"] / 10
    curves = json.loads((root / "schedules.json").read_text())
    assert curves["linear"]["alphas_cumprod"][-1] == pytest.approx(4.035829765375676e-05, rel=1e-9)


def test_a_trial_that_diverges_is_recorded_and_does_not_stop_the_sweep(digits: ShardedDataset, tmp_path: Path) -> None:
    wild = OptimConfig(batch_size=8, lr=1e30, warmup_steps=0, ema_decay=0.9)
    result = sweep(replace(config(digits, tmp_path, optim=wild), schedules=("linear",)))
    (trial,) = result.trials
    assert trial.distance is None
    assert result.ranking == []


def test_a_schedule_given_twice_is_refused(digits: ShardedDataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="each once"):
        replace(config(digits, tmp_path), schedules=("quad", "quad"))
