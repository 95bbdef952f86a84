"""A sweep calls the same train() and evaluate() as everything else, and its trials are plain runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.tune
from mlflow import MlflowClient
from support.processes import IMPORTED, wait_for
from support.sweeps import MEASURED, points_of, schedules, training

from ddpm_core.errors import InputError
from ddpm_core.training import OptimConfig
from pipelines.evaluate.driver import evaluate
from pipelines.runtime.cluster import kept_by_ray
from pipelines.runtime.messages import MessageQueue, message_queue
from pipelines.runtime.progress import ProgressLine, StageStanding
from pipelines.shards.dataset import ShardedDataset
from pipelines.sweep.config import AblationSweep, ScheduleSweep, SweepConfig
from pipelines.sweep.driver import sweep
from pipelines.sweep.lines import TrialEnds, TrialLines, say_through
from pipelines.sweep.points import Point
from pipelines.sweep.result import SweepResult
from pipelines.train.driver import run_name, train
from reports.build import build_report


def artifact(storage: Path, result: SweepResult, name: str) -> Any:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    return json.loads(Path(client.download_artifacts(result.run_id, name)).read_text())


DIVERGING = OptimConfig(batch_size=8, lr=1e30, warmup_steps=0, ema_decay=0.9)


def with_diverging(config: SweepConfig) -> dict[str, Point]:
    """A sweep's points, and one that diverges."""
    return {**points_of(config), "wild": Point(replace(config.train, optim=DIVERGING), {"optim.lr": "1e30"})}


SAID: list[str] = []  # by the sweep that swept() makes


@pytest.fixture(scope="module")
def swept(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScheduleSweep, SweepResult]:
    """linear, quad, and a point that diverges."""
    storage = tmp_path_factory.mktemp("swept")
    config = schedules(training(digits, storage), matched=False)
    return storage, config, sweep(config, with_diverging(config), SAID.append)


def test_what_trials_say_is_said_by_their_sweep_as_progress_of_theirs(
    swept: tuple[Path, ScheduleSweep, SweepResult],
) -> None:
    for point in ("linear", "quad"):
        name = f"{point}, seed 0"
        lines = [line for line in SAID if line.startswith(f"sweep: {name}: ")]
        final = {line.standing.stage for line in lines if isinstance(line, ProgressLine) and line.standing.final}
        assert final == {f"{name}: train", f"{name}: evaluate"}
        assert lines[0].endswith("from step 0 on 1 worker")
        assert "has fd_pixels" in lines[-1]  # the last line is not lost
        assert len(set(lines)) == len(lines)
    *_, diverged, ended = [line for line in SAID if line.startswith("sweep: wild, seed 0: ")]
    assert diverged.startswith("sweep: wild, seed 0: diverged: ")
    assert isinstance(ended, ProgressLine)
    assert ended.standing.ended
    assert ended.standing.stage == "wild, seed 0: train"


def tuner(trial: Callable[[dict[str, Any]], None], queue: MessageQueue, folder: Path) -> ray.tune.Tuner:
    """Tune, with one trial and as a sweep uses it."""
    return ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": 0.001}),
        param_space={"trial": ray.tune.grid_search([("linear", 0)])},
        run_config=ray.tune.RunConfig(name="sweep", verbose=0, callbacks=[TrialEnds(queue)], **kept_by_ray(folder)),
    )


def test_the_stage_of_a_trial_whose_process_is_killed_ends(ray_session: None, tmp_path: Path) -> None:
    said: list[str] = []
    with message_queue() as queue, TrialLines(queue, said.append):

        def trial(values: dict[str, Any]) -> None:
            say_through(queue, "linear, seed 0")(ProgressLine(StageStanding("train", 1, 4, "steps", 2.0, None, None)))
            os.kill(os.getpid(), signal.SIGKILL)

        (result,) = tuner(trial, queue, tmp_path).fit()
    assert result.error is not None
    assert said == [
        "sweep: linear, seed 0: train: 1 of 4 steps",
        "sweep: linear, seed 0: train: 1 of 4 steps | ended after 0:02",
    ]


def test_ctrl_c_reaches_a_sweep_and_not_tune_alone(ray_session: None, tmp_path: Path) -> None:
    driver = os.getpid()

    def trial(values: dict[str, Any]) -> None:
        os.kill(driver, signal.SIGINT)
        time.sleep(60.0)

    with message_queue() as queue, pytest.raises(KeyboardInterrupt):
        tuner(trial, queue, tmp_path).fit()


def test_a_trial_outlives_the_queue_of_its_lines(ray_session: None) -> None:
    with message_queue() as queue:
        ray.kill(queue.actor)
        say_through(queue, "linear, seed 0")("train: goes on")


def test_a_trial_is_the_plain_run_of_its_values(
    swept: tuple[Path, ScheduleSweep, SweepResult], digits: ShardedDataset
) -> None:
    storage, config, result = swept
    assert [(o.point, o.seed) for o in result.outcomes] == [("linear", 0), ("quad", 0), ("wild", 0)]
    outcome = result.outcomes[1]
    same = replace(config.train, diffusion=replace(config.train.diffusion, schedule="quad"))
    lines: list[str] = []
    plain = train(same, lines.append)
    assert lines == [f"train: {plain.run.name} is done, 4 steps"]
    assert (plain.run_id, plain.run.name) == (outcome.run_id, run_name(same, digits))
    lines.clear()
    measured = replace(MEASURED, noise="report", run=str(plain.last.path), storage=str(storage))
    assert evaluate(measured, lines.append).best.distance == outcome.distance
    assert "is done" in lines[-1]


def test_a_sweep_that_is_done_starts_nothing(swept: tuple[Path, ScheduleSweep, SweepResult]) -> None:
    storage, config, result = swept
    stamps = {path: path.stat().st_mtime_ns for path in storage.rglob("*.*")}
    lines: list[str] = []
    assert sweep(config, with_diverging(config), lines.append) == result
    assert lines == [f"sweep: {result.name} is done, 3 trials"]
    assert {path: path.stat().st_mtime_ns for path in storage.rglob("*.*")} == stamps


def test_a_moved_storage_is_the_same_with_everything_in_it(
    swept: tuple[Path, ScheduleSweep, SweepResult], digits: ShardedDataset, tmp_path: Path
) -> None:
    original, _, result = swept

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in original.rglob("*.*") if ".writers" not in str(path)}

    before = stamps()
    storage = tmp_path / "elsewhere"
    shutil.copytree(original, storage)
    config = schedules(training(digits, storage), matched=False)
    lines: list[str] = []
    assert sweep(config, with_diverging(config), lines.append) == result
    assert lines == [f"sweep: {result.name} is done, 3 trials"]
    plain = train(config.train, lines.append)
    assert lines[1:] == [f"train: {plain.run.name} is done, 4 steps"]
    measured = replace(MEASURED, run=plain.run.name, storage=str(storage), samples=MEASURED.samples - 1)
    evaluated = evaluate(measured)
    path = build_report(f"sqlite:///{storage}/mlflow.db", measured.experiment, storage / "report.html")
    assert f"{evaluated.best.distance:.2f}" in path.read_text()
    assert stamps() == before


def test_a_sweeps_records_hold_its_trials_schedules_and_conclusion(
    swept: tuple[Path, ScheduleSweep, SweepResult],
) -> None:
    storage, _, result = swept
    tags = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(str(result.outcomes[0].evaluation_run_id)).data.tags
    assert result.link.endswith(f"/runs?workflowType=machine_learning&viewStateShareKey={tags['ddpm.fingerprint']}")
    assert result.link in "\n".join(result.describe())
    rows = artifact(storage, result, "trials.json")
    assert [(row["label"], row["status"]) for row in rows] == [
        ("linear", "finished"),
        ("quad", "finished"),
        ("wild", "diverged"),
    ]
    assert rows[1]["values"] == {"diffusion.schedule": "quad"}
    # The linear schedule leaves less of the image in x_T (paper.md's L_T: 2.9e-5 against 5.3e-4 at x_0 = +-1).
    assert rows[0]["prior_bpd"] < rows[1]["prior_bpd"] / 10
    assert (rows[0]["prior_met"], rows[1]["prior_met"]) == (True, False)
    curves = artifact(storage, result, "schedules.json")
    assert curves["linear"]["alphas_cumprod"][-1] == pytest.approx(4.035829765375676e-05, rel=1e-9)
    assert curves["quad"]["betas"][0] == pytest.approx(1e-4, rel=1e-12)
    facts = artifact(storage, result, "summary.json")
    assert {standing["point"] for standing in facts["standings"]} == {"linear", "quad"}
    assert facts["conclusion"] == result.conclusion
    # The result stands in the training run too, beside the parameters that parallel coordinates draw.
    run = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(result.outcomes[0].run_id)
    assert run.data.metrics["fd_pixels"] == run.data.metrics["best_fd_pixels"] == result.outcomes[0].distance
    assert run.data.params["diffusion.schedule"] == "linear"
    assert run.data.tags["mlflow.parentRunId"] == result.run_id


def test_a_diverged_trial_is_recorded_and_does_not_stop_the_others(
    swept: tuple[Path, ScheduleSweep, SweepResult],
) -> None:
    _, _, result = swept
    lost = result.outcomes[-1]
    assert (lost.status, lost.distance) == ("diverged", None)
    assert "loss" in lost.reason or "gradient" in lost.reason
    assert {standing.point for standing in result.ranking} == {"linear", "quad"}
    assert any(line.startswith("wild, seed 0, diverged at step") for line in result.describe())


def test_an_ablation_has_the_six_cells_of_table_2(digits: ShardedDataset, tmp_path: Path) -> None:
    config = AblationSweep(train=training(digits, tmp_path), evaluate=MEASURED)
    points = points_of(config)
    assert len(points) == 6
    for point in points.values():
        learned = point.config.diffusion.var_type == "learned"
        assert point.config.unet.out_channels == (2 if learned else None)
    assert points["eps L_simple"].config == config.train
    fixed = replace(
        config.train, diffusion=replace(config.train.diffusion, var_type="learned_range", loss_type="hybrid")
    )
    with pytest.raises(InputError, match="give fixedlarge or fixedsmall"):
        points_of(replace(config, train=fixed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedules": ("quad", "quad")}, "each once"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"rungs": (3, 2)}, "ascending"),
        ({"rungs": (4,)}, "the last must come before --train.steps 4"),
        ({"rung_samples": 3}, "an interval needs 10 or more"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    digits: ShardedDataset, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        points_of(schedules(training(digits, tmp_path), **changes))


DRIVER = """
import sys
import ray
ray.init("local", num_cpus=4, num_gpus=0, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=True)
from support.sweeps import points_of, schedules, training
from pipelines.shards.dataset import ShardedDataset
from pathlib import Path
from pipelines.sweep.driver import sweep
digits, storage = ShardedDataset.open(sys.argv[1]), Path(sys.argv[2])
config = schedules(training(digits, storage, steps=6, checkpoint_every=2), matched=False, seeds=2, rungs=(2,), rung_samples=40)
result = sweep(config, points_of(config), lambda line: print(line, flush=True))
"""


@pytest.mark.slow
def test_a_sweep_goes_on_where_its_driver_was_killed(digits: ShardedDataset, tmp_path: Path) -> None:
    train = training(digits, tmp_path / "b", steps=6, checkpoint_every=2)
    config = schedules(train, matched=False, seeds=2, rungs=(2,), rung_samples=40)
    whole = sweep(config, points_of(config))
    rung = artifact(tmp_path / "b", whole, "rungs/00000002.json")
    assert [(outcome["steps"], outcome["point"]) for outcome in rung["outcomes"]] == [(2, "linear")] * 2 + [
        (2, "quad")
    ] * 2
    assert [o.steps for o in whole.outcomes] == [6 if o.point not in rung["stopped"] else 2 for o in whole.outcomes]
    command = [sys.executable, "-c", DRIVER, str(digits.path), str(tmp_path / "a")]
    environment = {**os.environ, "PYTHONPATH": IMPORTED}
    first = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: list((tmp_path / "a" / "sweep").rglob("*-seed-0.json")), 400)  # one trial is known
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    (known, *_) = (tmp_path / "a" / "sweep").rglob("*-seed-0.json")
    stamp = known.stat().st_mtime_ns
    subprocess.run(command, env=environment, check=True, timeout=500)
    assert known.stat().st_mtime_ns == stamp
    (manifest,) = (tmp_path / "a" / "sweep").glob("*/manifest.json")
    again = json.loads(manifest.read_text())
    assert [each["distance"] for each in again["outcomes"]] == [each.distance for each in whole.outcomes]
