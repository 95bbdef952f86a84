"""Ray Tune: the same train() and evaluate() as the jobs, over variants of one configuration and several seeds.

A trial, that is a point with one seed, and a plain run of the same values are the same run: same name, same folder, same
numbers. A trial's outcome is committed to a file, so that a sweep whose driver was killed goes on where it was, and one
that is done starts nothing.

With rungs, all points are compared at certain steps on few samples, and those that are worse beyond doubt are stopped
(ranking.halve). All trials wait at a rung: unlike with asynchronous halving, what is stopped does not depend on who
is faster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ddpm_core.configs import later_choices
from ddpm_core.protocol import fingerprint
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.extractor import describe_extractor
from pipelines.runtime.cluster import choose_execution
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import open_storage
from pipelines.storage.locations import location
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.points import Point
from pipelines.sweep.result import SweepResult, read_result
from pipelines.train.checks import check_dataset
from pipelines.train.config import TrainConfig
from pipelines.train.driver import run_name

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
        config.evaluate.steps_of(point.config.diffusion.num_timesteps)
    config, points = with_execution_chosen(config, points, say)
    names = {
        label: [run_name(config.training(point, seed, 1), dataset) for seed in config.seed_numbers]
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
    # Here: MLflow, torch and Ray Tune take seconds, in which what is wrong with a command, or done, is said.
    from pipelines.sweep.session import run_sweep

    return run_sweep(config, points, name, decided_by, dataset, storage, say)


def with_execution_chosen(
    config: SweepConfig, points: Mapping[str, Point], say: Say
) -> tuple[SweepConfig, dict[str, Point]]:
    """How everything is executed, chosen before anything is named by it."""

    def chosen(train: TrainConfig) -> TrainConfig:
        return replace(train, execution=choose_execution(train.execution, lambda line: None)[0])

    evaluate = choose_execution(config.evaluate.execution, lambda line: say(f"evaluate: {line}"))[0]
    config = replace(config, train=chosen(config.train), evaluate=config.evaluate.executed(evaluate))
    return config, {label: replace(point, config=chosen(point.config)) for label, point in points.items()}


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
