"""Trials: a trial is a point of a sweep with one seed, trained and evaluated under Ray Tune up to a step."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray.tune
import torch

from ddpm_core import typed
from ddpm_core.errors import DivergedError, InputError
from ddpm_core.records import CI_HIGH, CI_LOW, TRAIN
from pipelines.evaluate.driver import evaluate
from pipelines.runtime.cluster import kept_by_ray
from pipelines.runtime.environment import prepare
from pipelines.runtime.messages import MessageQueue, message_queue
from pipelines.runtime.progress import PACE, Say
from pipelines.storage.layout import Storage
from pipelines.storage.locations import Location, commit_json
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.lines import TrialEnds, TrialLines, say_through
from pipelines.sweep.points import Point, trial_name
from pipelines.sweep.ranking import Outcome
from pipelines.tracking.tracker import open_tracker
from pipelines.train.config import TrainConfig
from pipelines.train.driver import train
from pipelines.train.session import TrainResult


@dataclass(frozen=True)
class Trials:
    """Runs trials to a step, at most `max_concurrent` at a time. folder: of the files of their outcomes."""

    config: SweepConfig
    points: Mapping[str, Point]
    parent_run_id: str
    folder: Location
    storage: Storage
    max_concurrent: int
    say: Say

    def run_to(self, steps: int, trials: Sequence[tuple[str, int]]) -> list[Outcome]:
        """The outcomes of trials, each a (point, seed), at a step, in that order; one that has an outcome is not run again."""
        missing = [key for key in trials if not self.outcome_file(steps, *key).exists()]
        if missing:
            concurrent = min(self.max_concurrent, len(missing))
            self.say(
                f"sweep: {len(missing)} trial{'' if len(missing) == 1 else 's'} to step {steps:,}, {concurrent} at a time"
            )
            with message_queue() as queue, TrialLines(queue, self.say):
                self._tune(steps, missing, concurrent, queue)
        return [read_outcome(self.outcome_file(steps, *key)) for key in trials]

    def _tune(self, steps: int, missing: list[tuple[str, int]], concurrent: int, queue: MessageQueue) -> None:
        """Have Ray Tune run trials to a step, each of which writes the file of its outcome, and puts what it says into a queue.
        Raises what a trial raised."""
        config, points, parent = self.config, self.points, self.parent_run_id
        files = {key: self.outcome_file(steps, *key) for key in missing}
        command, pace = list(sys.argv), os.environ.get(PACE)

        def trial(values: dict[str, Any]) -> None:
            prepare()  # in a process of Ray's, and before MLflow is imported
            sys.argv[:] = command  # the source of its runs in MLflow
            if pace is not None:  # of who watches the driver
                os.environ[PACE] = pace
            from pipelines.sweep.trial import run_trial

            label, seed = values["trial"]
            say = say_through(queue, trial_name(label, seed))
            outcome = run_trial(config, points[label], label, seed, steps, parent, say)
            commit_json(files[label, seed], asdict(outcome))
            ray.tune.report({"done": 1})

        tuner = ray.tune.Tuner(
            ray.tune.with_resources(trial, {"CPU": 0.001}),  # Tune takes a whole CPU by default, and refuses 0
            param_space={"trial": ray.tune.grid_search(missing)},
            tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent),
            run_config=ray.tune.RunConfig(
                name=f"{self.folder.name}-{steps}",
                verbose=0,
                callbacks=[TrialEnds(queue)],
                **kept_by_ray(self.storage.ray),
            ),
        )
        for result in tuner.fit():
            if result.error is not None:
                raise result.error

    def outcome_file(self, steps: int, label: str, seed: int) -> Location:
        """The file of a trial's outcome at a step; a point's name may hold what a file's may not."""
        return self.folder / f"step-{steps:08d}" / f"{list(self.points).index(label)}-seed-{seed}.json"


def read_outcome(path: Location) -> Outcome:
    """How a trial ended, from its file. Raises InputError if that is damaged."""
    what, advice = "outcome of a trial", "delete it and give the same command again, which reads how the trial ended"
    facts = typed.read_json(path, typed.JsonObject, what=what, advice=advice)
    try:
        return typed.build(Outcome, facts)
    except ValueError as error:
        raise InputError(f"{what} {str(path)!r} is damaged ({error}): {advice}") from error


def run_trial(
    config: SweepConfig, point: Point, label: str, seed: int, steps: int, parent_run_id: str, say: Say
) -> Outcome:
    """Train and evaluate a point with one seed up to a step, in a process of Tune's. A training that diverges is an outcome."""
    torch.set_num_threads(1)  # its workers compute, not this process
    trial = config.training(point, seed, steps)
    run_id = ""
    try:
        trained = train(trial, say, parent_run_id=parent_run_id)
        run_id = trained.run_id
        evaluated = evaluate(
            replace(
                config.evaluation(steps),
                run=str(trained.last.path),
                workers=trial.workers,
                storage=trial.storage,
                tracking_uri=trial.tracking_uri,
                experiment=trial.experiment,
            ),
            say,
        )
    except DivergedError as error:
        say(f"diverged: {error}")
        return Outcome(label, seed, "diverged", steps, error.run_id or run_id, reason=str(error))
    (result,) = evaluated.evaluations  # of the one checkpoint
    low, high = result.interval or (None, None)
    metric = result.protocol.distance
    if steps == config.train.steps:
        log_result(trial, trained, {metric: result.distance, metric + CI_LOW: low, metric + CI_HIGH: high})
    return Outcome(label, seed, "finished", steps, run_id, evaluated.run_id, metric, result.distance, low, high)


def log_result(trial: TrainConfig, trained: TrainResult, values: Mapping[str, float | None]) -> None:
    """Put a trial's result into its training run too, beside whose parameters MLflow's parallel coordinates show it."""
    run = open_tracker(trial, trained.storage).find(TRAIN, trained.run.name)
    if run is not None:
        known = {key: value for key, value in values.items() if value is not None}
        new = {key: value for key, value in known.items() if trial.steps not in run.logged_steps(key)}
        run.log_records([{"step": trial.steps, **new}])
