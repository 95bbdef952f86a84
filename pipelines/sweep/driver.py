"""Ray Tune: the same train() and evaluate() as the jobs, over variants of one configuration and several seeds.

A trial, that is a point with one seed, and a plain run of the same values are the same run: same name, same folder, same
numbers. What a trial came to is committed to a file when it is known, so that a sweep whose driver was killed goes on where
it was, and one that is done starts nothing.

With rungs, all points are compared at certain steps on few samples, and those that are worse beyond doubt are stopped
(ranking.halve). Everybody waits at a rung: unlike with asynchronous halving, what is stopped does not depend on who
is faster.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddpm_core.commit import MANIFEST, write_json
from ddpm_core.protocol import fingerprint
from ddpm_core.schedules import PriorCheck, check_prior
from ddpm_core.verdicts import Standing, standings
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.reference import describe_extractor, reference_statistics
from pipelines.runtime.cluster import check_fits, connect
from pipelines.runtime.layout import local_storage
from pipelines.runtime.locations import location
from pipelines.runtime.options import flatten
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.points import Point
from pipelines.sweep.ranking import Outcome, halve, measurements, summary
from pipelines.sweep.trial import Trials
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker, open_tracker
from pipelines.train.config import TrainConfig
from pipelines.train.driver import check_dataset, run_name

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
        return standings(measurements([outcome for outcome in self.outcomes if outcome.status == "finished"]))

    def describe(self) -> list[str]:
        """The outcome in sentences."""
        lines = [
            f"{place}. {standing.point}: {self.metric} {standing.mean:.4g}{standing.spread} over {standing.seeds} of its seeds"
            for place, standing in enumerate(self.ranking, 1)
        ]
        failed = [outcome for outcome in self.outcomes if outcome.status != "finished"]
        lines += [
            f"{each.point}, seed {each.seed}, {each.status} at step {each.steps:,}: {each.reason}" for each in failed
        ]
        return [*lines, self.conclusion]


def sweep(config: SweepConfig, points: Mapping[str, Point], say: Say = lambda line: None) -> SweepResult:
    """Train and evaluate every point with every seed, or finish that, or find it done.

    Raises InputError for anything train() or evaluate() would refuse, before a trial starts.
    """
    storage = local_storage(config.train.storage)
    dataset = ShardedDataset.open(location(config.train.shards, option="--shards"))
    for point in points.values():
        check_dataset(point.config, dataset)
    identity = sweep_identity(config, trial_names(config, points, dataset))
    name = f"sweep-{config.train.preset}-{fingerprint(identity)}"
    folder = storage.sweep(name)
    done = read_result(folder)
    if done is not None:
        say(f"sweep: {name} is done, {len(done.outcomes)} trials")
        return done
    room = room_for_trials(config.train)
    run = open_run(open_tracker(config.train, storage), name, fingerprint(identity), config, points, dataset)
    log_schedules(run, points)
    priors = check_priors(points, float(dataset.manifest["second_moment"]), say)
    # Once, here: two trials would make it at the same time.
    extractor = describe_extractor(config.evaluate.extractor, dataset)
    reference_statistics(dataset, extractor, config.evaluate.cpus_per_worker, say)
    try:
        outcomes = climb(config, points, Trials(config, points, run.run_id, folder, storage, room, say), run, say)
        return conclude(run, name, folder, config, points, outcomes, priors)
    except BaseException as error:
        run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def seeds_of(config: SweepConfig) -> range:
    """The seeds of each point's trainings."""
    return range(config.train.seed, config.train.seed + config.seeds)


def trial_names(config: SweepConfig, points: Mapping[str, Point], dataset: ShardedDataset) -> dict[str, list[str]]:
    """The names of each point's trainings, one a seed."""
    return {
        label: [run_name(config.trial(point, seed, 1), dataset) for seed in seeds_of(config)]
        for label, point in points.items()
    }


def sweep_identity(config: SweepConfig, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Everything that decides what a sweep comes to. names: of each point's trainings."""
    return {
        "runs": names,
        "steps": config.train.steps,
        "rungs": config.rungs,
        "evaluate": [protocol_of(config.measurement(steps)) for steps in (*config.rungs, config.train.steps)],
    }


def room_for_trials(train: TrainConfig) -> int:
    """How many trials may run at once. Raises InputError if the cluster has no room for one.

    Each trial's workers are placed by Train and evaluate, not by Tune: Tune must not start more trials than there is room
    for, or they take each other's places and wait for ever (ray#54305).
    """
    resources = connect()
    cpus, gpus = train.workers * train.cpus_per_worker, train.workers if resources.gpus else 0
    check_fits(resources, workers=1, cpus=cpus, gpus=gpus, what="a trial")
    room = resources.cpus // cpus
    return max(1, int(min(room, resources.gpus // gpus) if gpus else room))


def open_run(
    tracker: Tracker,
    name: str,
    mark: str,
    config: SweepConfig,
    points: Mapping[str, Point],
    dataset: ShardedDataset,
) -> TrackedRun:
    """The sweep's MLflow run, of which trials are children."""
    return tracker.run(
        "sweep",
        name,
        mark,
        params={
            "points": ", ".join(points),
            "seeds": str(config.seeds),
            "rungs": ", ".join(map(str, config.rungs)),
            **flatten(config.train, "train."),
            **flatten(config.measurement(config.train.steps), "evaluate."),
        },
        tags={"ddpm.data": dataset.name},
    )


def climb(
    config: SweepConfig, points: Mapping[str, Point], trials: Trials, run: TrackedRun, say: Say
) -> tuple[Outcome, ...]:
    """Bring all trials from rung to rung, those of points that are stopped only so far; how each ended, by point and seed."""
    ended: dict[str, list[Outcome]] = {}
    for steps in (*config.rungs, config.train.steps):
        alive = [label for label in points if label not in ended]
        outcomes = trials.reach(steps, [(label, seed) for label in alive for seed in seeds_of(config)])
        stopped = halve(outcomes) if steps < config.train.steps else {}
        for label in alive:
            of_point = [outcome for outcome in outcomes if outcome.point == label]
            if label in stopped:
                say(f"sweep: {label} stops at step {steps:,}: {stopped[label]}")
                ended[label] = [stop(outcome, stopped[label]) for outcome in of_point]
            elif steps == config.train.steps:
                ended[label] = of_point
        run.log_json(f"rungs/{steps:08d}.json", {"outcomes": [asdict(o) for o in outcomes], "stopped": stopped})
    return tuple(outcome for label in points for outcome in ended[label])


def stop(outcome: Outcome, reason: str) -> Outcome:
    """The outcome of a trial that is not gone on with; one that diverged stays what it is."""
    return outcome if outcome.status == "diverged" else replace(outcome, status="stopped", reason=reason)


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
