"""Ray Tune: the same train() and evaluate() as the jobs, over variants of one configuration and several seeds.

A trial, that is a point with one seed, and a plain run of the same values are the same run: same name, same folder, same
numbers. A trial's outcome is committed to a file, so that a sweep whose driver was killed goes on where it was, and one
that is done starts nothing.

With rungs, all points are compared at certain steps on few samples, and those that are worse beyond doubt are stopped
(ranking.halve). All trials wait at a rung: unlike with asynchronous halving, what is stopped does not depend on who
is faster.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ddpm_core.configs import later_choices
from ddpm_core.protocol import fingerprint
from ddpm_core.records import rung_path
from ddpm_core.schedules import PriorCheck, check_prior
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.extractor import describe_extractor
from pipelines.evaluate.reference import reference_statistics
from pipelines.evaluate.subject import sampler_steps, with_execution
from pipelines.runtime.cluster import check_fits, choose_execution, connect
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.progress import Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import open_storage
from pipelines.storage.locations import location
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.points import Point
from pipelines.sweep.ranking import Outcome, halve
from pipelines.sweep.records import log_schedules, open_run, record_result
from pipelines.sweep.result import SweepResult, read_result
from pipelines.sweep.trial import Trials
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import open_tracker
from pipelines.train.config import TrainConfig
from pipelines.train.driver import check_dataset, run_name

# The options that decide an evaluation's numbers, beside the extractor: not workers, chunk size or storage, nor what is drawn
# for a person.
EVALUATION = "samples sampler sampler_steps spacing weights precision noise seed batch_size"


def sweep(config: SweepConfig, points: Mapping[str, Point], say: Say = lambda line: None) -> SweepResult:
    """Train and evaluate every point with every seed, or finish that, or read it if it is done.

    Raises InputError for anything train() or evaluate() would refuse, before a trial starts.
    """
    storage = open_storage(config.train.storage, to_write=True)
    dataset = ShardedDataset.open(location(config.train.shards, option="--shards"))
    for point in points.values():
        check_dataset(point.config, dataset)
        sampler_steps(config.evaluate, point.config.diffusion.num_timesteps)
    config, points = with_execution_chosen(config, points, say)
    names = {
        label: [run_name(config.training(point, seed, 1), dataset) for seed in seeds_of(config)]
        for label, point in points.items()
    }
    given = config.evaluate.extractor
    extractor_id = describe_extractor(given, dataset).sha256 if given.endswith(".pt") or "://" in given else given
    decided_by = sweep_identity(config, names, extractor_id)
    name = f"sweep-{config.train.preset}-{fingerprint(decided_by)}"
    folder = storage.sweep(name)
    finished = read_result(folder)
    if finished is not None:
        say(f"sweep: {name} is done, {len(finished.outcomes)} trials")
        return finished
    # All that can be refused is looked at before the run is there.
    extractor = describe_extractor(given, dataset)
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


def with_execution_chosen(
    config: SweepConfig, points: Mapping[str, Point], say: Say
) -> tuple[SweepConfig, dict[str, Point]]:
    """How everything is executed, chosen before anything is named by it."""

    def chosen(train: TrainConfig) -> TrainConfig:
        return replace(train, execution=choose_execution(train.execution, lambda line: None)[0])

    config = replace(config, train=chosen(config.train), evaluate=with_execution(config.evaluate, say))
    return config, {label: replace(point, config=chosen(point.config)) for label, point in points.items()}


def seeds_of(config: SweepConfig) -> range:
    return range(config.train.seed, config.train.seed + config.seeds)


def sweep_identity(config: SweepConfig, names: Mapping[str, Sequence[str]], extractor: str) -> dict[str, Any]:
    """Everything that decides a sweep's result. names: of each point's trainings. extractor: its name, or the sha256 of its
    file, which may lie elsewhere tomorrow."""
    evaluations = [config.evaluation(steps) for steps in (*config.rungs, config.train.steps)]
    return {
        "runs": names,
        "steps": config.train.steps,
        "rungs": config.rungs,
        # A finished sweep is known by the fingerprint of this value: other keys would be another sweep.
        "evaluate": [{"extractor": extractor, **evaluation_identity(each)} for each in evaluations],
    }


def evaluation_identity(config: EvaluateConfig) -> dict[str, Any]:
    """What decides the result of an evaluation, but for its subject and extractor."""
    values = {key: getattr(config, key) for key in EVALUATION.split()}
    return {**values, **later_choices(config), "precision": config.network_precision}


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
        outcomes = trials.run_to(steps, [(label, seed) for label in remaining for seed in seeds_of(config)])
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
