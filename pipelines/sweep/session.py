"""A sweep that has trials to run, from its first to its result, and what MLflow gets of it."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ddpm_core.protocol import fingerprint
from ddpm_core.records import rung_path
from ddpm_core.schedules import PriorCheck, check_prior
from pipelines.evaluate.extractor import describe_extractor
from pipelines.evaluate.reference import reference_statistics
from pipelines.runtime.cluster import check_fits, connect
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.progress import Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import Storage
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.points import Point
from pipelines.sweep.ranking import Outcome, halve
from pipelines.sweep.records import log_schedules, open_run, record_result
from pipelines.sweep.result import SweepResult
from pipelines.sweep.trial import Trials
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import open_tracker
from pipelines.train.config import TrainConfig


def run_sweep(
    config: SweepConfig,
    points: Mapping[str, Point],
    name: str,
    decided_by: Mapping[str, Any],
    dataset: ShardedDataset,
    storage: Storage,
    say: Say,
) -> SweepResult:
    """All trials that are not done, and the result of all. decided_by: everything that decides it."""
    folder = storage.sweep(name)
    # All that can be refused is looked at before the run is there.
    extractor = describe_extractor(config.evaluate.extractor, dataset)
    concurrent = max_concurrent_trials(config.train)
    run = open_run(open_tracker(config.train, storage), name, fingerprint(decided_by), config, points, dataset)
    log_schedules(run, points)
    found = replace(config, train=replace(config.train, storage=str(storage.root), shards=str(dataset.path)))
    keep_recipe(folder, found)
    priors = check_priors(points, float(dataset.manifest["second_moment"]), say)
    try:
        # Once, here: two trials would make it at the same time.
        with Pool(None, config.evaluate.cpus_per_worker, say) as pool:
            reference_statistics(dataset, extractor, pool, config.evaluate.neighbours)
        trials = Trials(config, points, run.run_id, folder, storage, concurrent, say)
        outcomes = run_rungs(config, points, trials, run, say)
        return record_result(run, name, folder, config, points, outcomes, priors)
    except BaseException as error:
        run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def max_concurrent_trials(train: TrainConfig) -> int:
    """How many trials may run at once. Raises InputError if the cluster has no room for one.

    Each trial's workers are placed by Train and evaluate, not by Tune: Tune must not start more trials than there is room
    for, or they take each other's places and wait for ever (ray#54305).
    """
    resources = connect()
    cpus, gpus = train.workers * train.cpus_per_worker, train.workers if resources.gpus else 0
    check_fits(resources, workers=1, cpus=cpus, gpus=gpus, what="a trial")
    by_cpus = resources.cpus // cpus
    return max(1, int(min(by_cpus, resources.gpus // gpus) if gpus else by_cpus))


def run_rungs(
    config: SweepConfig, points: Mapping[str, Point], trials: Trials, run: TrackedRun, say: Say
) -> tuple[Outcome, ...]:
    """Bring all trials from rung to rung, and drop points that are stopped there; how each ended, by point and seed."""
    ended: dict[str, list[Outcome]] = {}
    for steps in (*config.rungs, config.train.steps):
        remaining = [label for label in points if label not in ended]
        outcomes = trials.run_to(steps, [(label, seed) for label in remaining for seed in config.seed_numbers])
        stopped = halve(outcomes) if steps < config.train.steps else {}
        for label in remaining:
            of_point = [outcome for outcome in outcomes if outcome.point == label]
            if label in stopped:
                say(f"sweep: {label} stops at step {steps:,}: {stopped[label]}")
                ended[label] = [  # one that diverged remains diverged
                    outcome
                    if outcome.status == "diverged"
                    else replace(outcome, status="stopped", reason=stopped[label])
                    for outcome in of_point
                ]
            elif steps == config.train.steps:
                ended[label] = of_point
        run.log_json(rung_path(steps), {"outcomes": [asdict(o) for o in outcomes], "stopped": stopped})
    return tuple(outcome for label in points for outcome in ended[label])


def check_priors(points: Mapping[str, Point], second_moment: float, say: Say) -> dict[str, PriorCheck]:
    """Each point's L_T (paper, Eq. 5) beside that of the paper's schedule, said before anything is trained.

    second_moment: E[x_0^2] of the data.
    """
    priors = {}
    for label, point in points.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # check_prior warns of what is said below
            priors[label] = prior = check_prior(point.config.diffusion.betas(), second_moment)
        verdict = "not above" if prior.met else "ABOVE"
        say(
            f"sweep: {label} leaves L_T = {prior.bits_per_dim:.2g} bits/dim of this data in x_T, {verdict} the paper's "
            f"{prior.reference_bits_per_dim:.2g}"
        )
    return priors
