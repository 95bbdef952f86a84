"""Ray Tune: the same train() and evaluate() as the jobs, over variants of one configuration and several seeds.

A trial, that is a point with one seed, and a plain run of the same values are the same run: same name, same folder, same
numbers. What a trial came to is committed to a file when it is known, so that a sweep whose driver was killed goes on where
it was, and one that is done starts nothing.

With rungs, all points are compared at certain steps on few samples, and those that are worse beyond doubt are stopped
(sweep_ranking.halve). Everybody waits at a rung: unlike with asynchronous halving, what is stopped does not depend on who
is faster.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.tune
import torch

from ddpm_core.commit import MANIFEST, write_json
from ddpm_core.errors import DivergedError
from ddpm_core.priors import PriorCheck, check_prior
from ddpm_core.protocol import fingerprint
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.driver import evaluate
from pipelines.evaluate.reference import describe_extractor, reference_statistics
from pipelines.runtime import console
from pipelines.runtime.cluster import check_fits, connect
from pipelines.runtime.environment import prepare
from pipelines.runtime.layout import Storage, local_storage
from pipelines.runtime.locations import location
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.points import Point
from pipelines.sweep.ranking import Outcome, Standing, halve, spread, standings, summary
from pipelines.tracking.tracker import TrackedRun, flatten, open_tracker
from pipelines.train.config import TrainConfig
from pipelines.train.driver import TrainResult, check_dataset, run_name, train

CURVE = 200  # timesteps of each schedule's curve


@dataclass(frozen=True)
class SweepResult:
    """All trials of a sweep as they ended, and what they say together."""

    name: str
    run_id: str
    metric: str
    outcomes: tuple[Outcome, ...]
    conclusion: str

    @property
    def ranking(self) -> list[Standing]:
        """The points that finished, the lowest mean distance first."""
        return standings([outcome for outcome in self.outcomes if outcome.status == "finished"])

    def describe(self) -> list[str]:
        """The outcome in sentences."""
        lines = [
            f"{place}. {standing.point}: {self.metric} {standing.mean:.4g}{spread(standing)} over {standing.seeds} of its seeds"
            for place, standing in enumerate(self.ranking, 1)
        ]
        failed = [outcome for outcome in self.outcomes if outcome.status != "finished"]
        lines += [
            f"{each.point}, seed {each.seed}, {each.status} at step {each.steps:,}: {each.reason}" for each in failed
        ]
        return [*lines, self.conclusion]


def sweep(config: SweepConfig, points: Mapping[str, Point], say: Say = lambda line: None) -> SweepResult:
    """Train and evaluate every point with every seed, or finish that, or find it done.

    InputError for anything train() or evaluate() would refuse, before a trial starts.
    """
    storage = local_storage(config.train.storage)
    dataset = ShardedDataset.open(location(config.train.shards, option="--shards"))
    seeds = range(config.train.seed, config.train.seed + config.seeds)
    for point in points.values():
        check_dataset(point.config, dataset)
    names = {
        label: [run_name(config.trial(point, seed, 1), dataset) for seed in seeds] for label, point in points.items()
    }
    identity = {
        "runs": names,
        "steps": config.train.steps,
        "rungs": config.rungs,
        "evaluate": [protocol_of(config.measurement(steps)) for steps in (*config.rungs, config.train.steps)],
    }
    name = f"sweep-{config.train.preset}-{fingerprint(identity)}"
    folder = storage.sweep(name)
    done = read_result(folder)
    if done is not None:
        say(f"sweep: {name} is done, {len(done.outcomes)} trials")
        return done
    resources = connect()
    cpus = config.train.workers * config.train.cpus_per_worker
    check_fits(resources, workers=1, cpus=cpus, gpus=config.train.workers if resources.gpus else 0, what="a trial")
    run = open_tracker(config.train, storage).run(
        "sweep",
        name,
        fingerprint(identity),
        params={
            "points": ", ".join(points),
            "seeds": str(config.seeds),
            "rungs": ", ".join(map(str, config.rungs)),
            **flatten(config.train, "train."),
            **flatten(config.measurement(config.train.steps), "evaluate."),
        },
        tags={"ddpm.data": dataset.name},
    )
    log_schedules(run, points)
    priors = check_priors(points, float(dataset.manifest["second_moment"]), say)
    # Once, here: two trials would make it at the same time.
    extractor = describe_extractor(config.evaluate.extractor, dataset)
    reference_statistics(dataset, extractor, config.evaluate.cpus_per_worker, say)
    # Each trial's workers are placed by Train and evaluate, not by Tune: Tune must not start more trials than there is
    # room for, or they take each other's places and wait for ever (ray#54305).
    room = resources.cpus // cpus
    if resources.gpus:
        room = min(room, resources.gpus // config.train.workers)
    tune = Tune(config, points, run.run_id, folder, storage, max(1, int(room)), say)
    try:
        ended: dict[str, list[Outcome]] = {}
        for steps in (*config.rungs, config.train.steps):
            alive = [label for label in points if label not in ended]
            outcomes = tune.reach(steps, [(label, seed) for label in alive for seed in seeds])
            stopped = halve(outcomes) if steps < config.train.steps else {}
            for label in alive:
                mine = [outcome for outcome in outcomes if outcome.point == label]
                if label in stopped:
                    say(f"sweep: {label} stops at step {steps:,}: {stopped[label]}")
                    ended[label] = [
                        outcome
                        if outcome.status == "diverged"
                        else replace(outcome, status="stopped", reason=stopped[label])
                        for outcome in mine
                    ]
                elif steps == config.train.steps:
                    ended[label] = mine
            run.log_json(f"rungs/{steps:08d}.json", {"outcomes": [asdict(o) for o in outcomes], "stopped": stopped})
        finished = tuple(outcome for label in points for outcome in ended[label])
        return conclude(run, name, folder, config, points, finished, priors)
    except BaseException as error:
        run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def check_priors(points: Mapping[str, Point], second_moment: float, say: Say) -> dict[str, PriorCheck]:
    """Each point's L_T beside that of the paper's schedule, told before anything is trained."""
    found = {}
    for label, point in points.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it is said here
            found[label] = prior = check_prior(point.config.diffusion.betas(), second_moment)
        verdict = "not above" if prior.met else "ABOVE"
        say(
            f"sweep: {label} leaves L_T = {prior.bits_per_dim:.2g} bits/dim of this data in x_T, {verdict} the paper's "
            f"{prior.reference_bits_per_dim:.2g}"
        )
    return found


def conclude(
    run: TrackedRun,
    name: str,
    folder: Path,
    config: SweepConfig,
    points: Mapping[str, Point],
    outcomes: tuple[Outcome, ...],
    priors: Mapping[str, PriorCheck],
) -> SweepResult:
    """What a sweep came to, into MLflow and its manifest."""
    metric = next((outcome.metric for outcome in outcomes if outcome.metric), "distance")
    said = {label: point.paper for label, point in points.items() if point.paper}
    choice = next((label for label, point in points.items() if point.chosen), None)
    facts = summary([outcome for outcome in outcomes if outcome.status == "finished"], metric, choice)
    rows = [
        {
            **asdict(outcome),
            "label": outcome.point if config.seeds == 1 else f"{outcome.point}, seed {outcome.seed}",
            "values": {**points[outcome.point].values, **({"seed": str(outcome.seed)} if config.seeds > 1 else {})},
            "prior_bpd": priors[outcome.point].bits_per_dim,
            "prior_met": priors[outcome.point].met,
        }
        for outcome in outcomes
    ]
    run.log_json("trials.json", rows)
    run.log_json("summary.json", {**facts, "paper": said})
    run.finish()
    result = SweepResult(name, run.run_id, metric, outcomes, facts["conclusion"])
    write_json(folder / MANIFEST, asdict(result))
    return result


def read_result(folder: Path) -> SweepResult | None:
    """What a finished sweep came to."""
    try:
        facts = json.loads((folder / MANIFEST).read_text())
    except OSError:
        return None
    return SweepResult(**{**facts, "outcomes": tuple(Outcome(**outcome) for outcome in facts["outcomes"])})


def protocol_of(config: EvaluateConfig) -> dict[str, Any]:
    """The part of an evaluation's configuration that decides its numbers."""
    keys = (
        "extractor",
        "samples",
        "sampler",
        "sampler_steps",
        "spacing",
        "weights",
        "precision",
        "noise",
        "seed",
        "batch_size",
    )
    return {key: getattr(config, key) for key in keys}


@dataclass(frozen=True)
class Tune:
    """Brings trials to a step, as many at a time as the cluster has room for."""

    config: SweepConfig
    points: Mapping[str, Point]
    parent_run_id: str
    folder: Path
    storage: Storage[Path]
    room: int
    say: Say

    def reach(self, steps: int, wanted: Sequence[tuple[str, int]]) -> list[Outcome]:
        """The outcomes of (point, seed) at a step, in that order; those that are known are not run again."""
        missing = [key for key in wanted if not self.place(steps, *key).is_file()]
        if missing:
            concurrent = min(self.room, len(missing))
            self.say(f"sweep: {len(missing)} trials to step {steps:,}, {concurrent} at a time")
            config, points, parent = self.config, self.points, self.parent_run_id
            places = {key: self.place(steps, *key) for key in missing}

            def trial(values: dict[str, Any]) -> None:
                prepare()  # in a process of Ray's, before MLflow is imported
                from pipelines.sweep.driver import run_trial

                label, seed = values["trial"]
                outcome = run_trial(config, points[label], label, seed, steps, parent)
                write_json(places[label, seed], asdict(outcome))
                ray.tune.report({"done": 1})

            tuner = ray.tune.Tuner(
                ray.tune.with_resources(trial, {"CPU": 0.001}),  # Tune takes a whole CPU by default, and refuses 0
                param_space={"trial": ray.tune.grid_search(missing)},
                tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent),
                run_config=ray.tune.RunConfig(
                    name=f"{self.folder.name}-{steps}", storage_path=str(self.storage.ray), verbose=0
                ),
            )
            for result in tuner.fit():
                if result.error is not None:
                    raise result.error
        return [Outcome(**json.loads(self.place(steps, *key).read_text())) for key in wanted]

    def place(self, steps: int, label: str, seed: int) -> Path:
        """The file of a trial's outcome."""
        return self.folder / f"step-{steps:08d}" / f"{list(self.points).index(label)}-seed-{seed}.json"


def run_trial(config: SweepConfig, point: Point, label: str, seed: int, steps: int, parent_run_id: str) -> Outcome:
    """Train and evaluate a point with one seed up to a step, in a process of Tune's."""
    torch.set_num_threads(1)  # its workers compute, not this process
    trial = config.trial(point, seed, steps)

    def say(line: str) -> None:
        console.say(f"sweep: {label}, seed {seed}: {line}")

    run_id = ""
    try:
        trained = train(trial, say, parent_run_id=parent_run_id)
        run_id = trained.run_id
        evaluated = evaluate(
            replace(
                config.measurement(steps),
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
    (result,) = evaluated.evaluations
    low, high = result.interval or (None, None)
    metric = result.protocol.distance
    if steps == config.train.steps:
        log_result(trial, trained, {metric: result.distance, f"{metric}_ci_low": low, f"{metric}_ci_high": high})
    return Outcome(label, seed, "finished", steps, run_id, evaluated.run_id, metric, result.distance, low, high)


def log_result(trial: TrainConfig, trained: TrainResult, values: Mapping[str, float | None]) -> None:
    """A trial's result into its training run as well, whose parameters MLflow's parallel coordinates set it beside."""
    run = open_tracker(trial, trained.storage).find("train", trained.run.name)
    if run is not None:
        known = {key: value for key, value in values.items() if value is not None}
        new = {key: value for key, value in known.items() if trial.steps not in run.logged_steps(key)}
        run.log_records([{"step": trial.steps, **new}])


def log_schedules(run: TrackedRun, points: Mapping[str, Point]) -> None:
    """beta, alpha-bar and log-SNR of every point's schedule, at up to CURVE timesteps, for the report."""
    curves = {}
    for label, point in points.items():
        betas = point.config.diffusion.betas()
        abar = torch.cumprod(1.0 - betas, 0)
        at = torch.linspace(0, len(abar) - 1, min(CURVE, len(abar))).round().long()
        chosen = abar[at]
        log_snr = chosen.log() - torch.log1p(-chosen)
        curves[label] = {
            "t": (at + 1).tolist(),
            "betas": betas[at].tolist(),
            "alphas_cumprod": chosen.tolist(),
            "log_snr": log_snr.tolist(),
        }
    run.log_json("schedules.json", curves)
