"""Ray Tune: the same train() and evaluate() as the jobs, over variants of one configuration.

A trial and a plain run of the same values are the same run: same name, same folder, same numbers. So a sweep that was
stopped goes on when the command is given again, and a variant that was trained before is not trained twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray.tune
import torch

from ddpm_core.errors import DivergedError, InputError
from ddpm_core.protocol import fingerprint
from ddpm_core.schedules import Schedule, prior_bits_per_dim
from pipelines.cluster import check_fits, connect
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.locations import absolute, location
from pipelines.progress import Say
from pipelines.reference import extractor_spec, reference_statistics
from pipelines.shards import ShardedDataset
from pipelines.tracking import TrackedRun, Tracker, default_uri
from pipelines.train import check_dataset, run_name, train
from pipelines.training_config import TrainConfig

POINTS = 200  # of each schedule's curve


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Variants of a training run, each trained and then evaluated by one protocol."""

    train: TrainConfig
    """What the variants share."""
    evaluate: EvaluateConfig
    """How each is evaluated; its run is filled in for every trial."""
    schedules: tuple[Schedule, ...] = ("linear", "quad")
    """The beta schedules to compare."""

    def __post_init__(self) -> None:
        if len(self.schedules) < 1 or len(set(self.schedules)) < len(self.schedules):
            raise InputError(f"--schedules is {' '.join(self.schedules)!r}: name one or more, each once")

    def trials(self) -> dict[str, TrainConfig]:
        """Each variant's configuration by its label."""
        return {
            schedule: replace(self.train, diffusion=replace(self.train.diffusion, schedule=schedule))
            for schedule in self.schedules
        }


@dataclass(frozen=True)
class Trial:
    """A variant's outcome; `distance` is None where it failed."""

    label: str
    run_id: str
    distance: float | None


@dataclass(frozen=True)
class SweepResult:
    """All trials of a sweep, in the order they were asked for."""

    name: str
    run_id: str
    metric: str
    trials: tuple[Trial, ...]

    @property
    def ranking(self) -> list[Trial]:
        """The finished trials, the lowest distance first."""
        finished = [trial for trial in self.trials if trial.distance is not None]
        return sorted(finished, key=lambda trial: trial.distance or 0.0)


def sweep(config: SweepConfig, say: Say = lambda line: None) -> SweepResult:
    """Train and evaluate every variant, or finish that, or find it done.

    InputError for anything train() or evaluate() would refuse, before a trial starts.
    """
    storage = absolute(config.train.storage, option="--storage")
    dataset = ShardedDataset.open(location(config.train.shards, option="--shards"))
    check_dataset(config.train, dataset)
    trials = config.trials()
    names = {label: run_name(trial, dataset) for label, trial in trials.items()}
    identity = {"runs": names, "steps": config.train.steps, "evaluate": flat_protocol(config.evaluate)}
    name = f"sweep-{config.train.preset}-{fingerprint(identity)}"
    resources = connect()
    cpus = config.train.workers * config.train.cpus_per_worker
    check_fits(resources, workers=1, cpus=cpus, gpus=0, what="a trial")
    tracker = Tracker(config.train.tracking_uri or default_uri(storage), config.train.experiment, storage)
    run = tracker.run(
        "sweep",
        name,
        fingerprint(identity),
        params={"schedules": ", ".join(config.schedules), "steps": str(config.train.steps)},
        tags={"ddpm.data": dataset.name},
    )
    log_schedules(run, trials)
    second_moment = float(dataset.manifest["second_moment"])
    priors = {label: prior_bits_per_dim(t.diffusion.betas(), second_moment) for label, t in trials.items()}
    for label, bits in priors.items():
        say(f"sweep: {label} leaves L_T = {bits:.2g} bits/dim of this data in x_T")

    # Once, here: two trials would make it at the same time.
    reference_statistics(dataset, extractor_spec(config.evaluate.extractor), config.evaluate.cpus_per_worker, say)
    # Each trial's workers are placed by Train and evaluate, not by Tune: Tune must not start more trials than there is
    # room for, or they take each other's places and wait for ever (ray#54305).
    slots = resources.gpus // config.train.workers if resources.gpus else resources.cpus // cpus
    concurrent = max(1, min(len(trials), int(slots)))

    def trial(values: dict[str, str]) -> None:
        ray.tune.report(run_trial(config, values["label"], run.run_id))

    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": 0.001}),  # Tune takes a whole CPU by default, and refuses 0
        param_space={"label": ray.tune.grid_search(list(trials))},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=ray.tune.RunConfig(name=name, storage_path=str(storage / "ray"), verbose=0),
    )
    say(f"sweep: {len(trials)} trials, {concurrent} at a time")
    grid = tuner.fit()
    outcomes: dict[str, Mapping[str, Any]] = {}
    for result in grid:
        if result.error is not None:
            run.finish("FAILED")
            raise result.error
        outcomes[result.metrics["label"]] = result.metrics
    rows = [
        {
            "label": label,
            "values": {"diffusion.schedule": label},
            "run_id": outcomes[label]["run_id"],
            "evaluation_run_id": outcomes[label]["evaluation_run_id"],
            "steps": config.train.steps,
            "status": outcomes[label]["status"],
            "prior_bpd": priors[label],
        }
        for label in trials
    ]
    run.log_json("trials.json", rows)
    run.finish()
    metric = next((str(o["metric"]) for o in outcomes.values() if o["metric"]), "distance")
    finished = tuple(Trial(label, str(outcomes[label]["run_id"]), outcomes[label]["distance"]) for label in trials)
    for entry in finished:
        shown = "failed" if entry.distance is None else f"{metric} {entry.distance:.4g}"
        say(f"sweep: {entry.label} has {shown}")
    return SweepResult(name, run.run_id, metric, finished)


def flat_protocol(config: EvaluateConfig) -> dict[str, Any]:
    """The part of an evaluation's configuration that decides its numbers."""
    keys = ("extractor", "samples", "sampler", "sampler_steps", "spacing", "weights", "seed", "batch_size")
    return {key: getattr(config, key) for key in keys}


def run_trial(config: SweepConfig, label: str, parent_run_id: str) -> dict[str, Any]:
    """Train and evaluate one variant, in a process of Tune's."""
    torch.set_num_threads(1)  # its workers compute, not this process
    trial = config.trials()[label]

    def say(line: str) -> None:
        print(f"sweep: {label}: {line}", flush=True)

    empty = {"label": label, "evaluation_run_id": None, "distance": None, "metric": None}
    try:
        trained = train(trial, say, parent_run_id=parent_run_id)
    except DivergedError as error:
        say(f"diverged: {error}")
        return {**empty, "status": "failed", "run_id": error.run_id}
    evaluated = evaluate(
        replace(
            config.evaluate,
            run=str(trained.last.path),
            workers=trial.workers,
            storage=trial.storage,
            tracking_uri=trial.tracking_uri,
            experiment=trial.experiment,
        ),
        say,
    )
    (result,) = evaluated.evaluations
    return {
        "label": label,
        "status": "finished",
        "run_id": trained.run_id,
        "evaluation_run_id": evaluated.run_id,
        "distance": result.distance,
        "metric": result.protocol.distance,
    }


def log_schedules(run: TrackedRun, trials: Mapping[str, TrainConfig]) -> None:
    """alpha-bar and log-SNR of every variant, at up to POINTS timesteps, for the report."""
    curves = {}
    for label, trial in trials.items():
        abar = torch.cumprod(1.0 - trial.diffusion.betas(), 0)
        at = torch.linspace(0, len(abar) - 1, min(POINTS, len(abar))).round().long()
        chosen = abar[at]
        log_snr = chosen.log() - torch.log1p(-chosen)
        curves[label] = {
            "t": (at + 1).tolist(),
            "alphas_cumprod": chosen.tolist(),
            "log_snr": log_snr.tolist(),
        }
    run.log_json("schedules.json", curves)
