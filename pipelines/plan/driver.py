"""A month of a cluster on a page: what each stage takes, what of that is measured or assumed, and what ends the growth."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipelines.nightly.config import NightlyConfig
from pipelines.plan.config import PlanConfig
from pipelines.plan.rows import LimitRow, PlanRow, counted
from pipelines.plan.simulation import RayCosts, SimulatedOutcome, WorkerModel, simulate
from pipelines.plan.stages import StageCosts
from pipelines.plan.unit_costs import read_unit_costs
from pipelines.storage.chunks import chunk_ranges

GROWTH = (8, 64, 512, 1000, 4096)  # workers
IMAGES, CHECKPOINTS, CHUNKS = 3_000_000, 10_000, 100_000
SEEDS = 3  # of the simulated stragglers and losses, for a spread
SLOWDOWN, SPREAD, RESTART = 3.0, 0.02, 60.0  # of stragglers; of a chunk's seconds; seconds. Assumed
ENOUGH = 0.95  # of the workers' time
MIN_BATCH = 8  # below, a GPU is far from the assumed utilisation


@dataclass(frozen=True)
class Page:
    """A plan. machine: where unit costs were measured. assumed: of the GPUs and workers. notes: what to change, in sentences."""

    machine: str
    assumed: str
    rows: Sequence[PlanRow]
    limits: Sequence[LimitRow]
    notes: Sequence[str]


@dataclass(frozen=True)
class Sampling:
    """Samples of some checkpoints, by a pool."""

    stages: StageCosts
    samples: int
    sampler_steps: int
    chunk_size: int
    checkpoints: int

    @property
    def gpu_seconds(self) -> float:
        return self.checkpoints * self.samples * self.stages.sample_seconds(self.sampler_steps)

    def on(self, workers: int, seed: int = 0) -> SimulatedOutcome:
        """As it goes on so many workers, which have started."""
        config, costs = self.stages.config, self.stages.costs
        each = self.stages.sample_seconds(self.sampler_steps)
        model = WorkerModel(
            workers=workers,
            seconds=lambda indices: each * len(indices),
            spread=SPREAD,
            stragglers=config.stragglers,
            slowdown=SLOWDOWN,
            losses=min(0.5, each * self.chunk_size / 3600 / config.loss_hours),
            restart=RESTART,
            numbers=self.stages.number_seconds(self.samples),
        )
        ray = RayCosts(
            submit=costs["ray_submit"],
            result=costs["ray_result"],
            wait=costs["ray_wait"],
            wait_each=costs["ray_wait_each"],
        )
        chunks = chunk_ranges(self.samples, self.chunk_size)
        return simulate(chunks, model, ray, checkpoints=self.checkpoints, seed=seed, meter=time.process_time)

    def seconds(self, workers: int, outcome: SimulatedOutcome) -> dict[str, float]:
        """What the parts of an evaluation would take, were each the only one."""
        costs, ideal = self.stages.costs, self.gpu_seconds / workers
        calls = costs["mlflow_evaluation"] + self.checkpoints * costs["mlflow_checkpoint"]
        return {
            "arithmetic": ideal,
            "the last round of chunks": max(0.0, outcome.sampling - ideal - outcome.driver),
            "the driver's loop": outcome.driver,
            "the numbers of the last checkpoint": outcome.seconds - outcome.sampling,
            "MLflow": calls * costs["mlflow_call"],
        }

    def limit(self, stage: str, workers: int) -> LimitRow:
        outcome = self.on(workers)
        parts = self.seconds(workers, outcome)
        return LimitRow(
            stage=stage,
            workers=workers,
            hours=self.total(outcome) / 3600,
            busy=outcome.busy,
            limit=max(parts, key=lambda name: parts[name]),
        )

    def total(self, outcome: SimulatedOutcome) -> float:
        """Seconds of the whole evaluation."""
        return outcome.seconds + self.seconds(outcome.workers, outcome)["MLflow"]


def plan(config: PlanConfig) -> Page:
    """The page of a configuration. Raises InputError for a GPU that is not known, or counts that do not go together."""
    stages = StageCosts(config, read_unit_costs())
    evaluation = Sampling(stages, config.samples, stages.sampler_steps, config.chunk_size, stages.checkpoints)
    night = NightlyConfig(hours=config.hours)
    nightly = Sampling(stages, night.samples, night.sampler_steps or stages.sampler_steps, night.chunk_size, 1)
    rows = [
        *stages.preprocessing(),
        *stages.train(),
        *sweep(stages),
        *evaluated(stages, evaluation),
        *nights(stages, nightly),
        *at_scale(stages),
    ]
    limits = [
        limit
        for workers in sorted({config.workers, *GROWTH})
        for limit in (
            preprocessing_limit(stages, workers),
            training_limit(stages, workers),
            evaluation.limit("evaluate", workers),
            nightly.limit("nightly", workers),
        )
    ]
    limits.sort(key=lambda row: ("preprocess", "train", "evaluate", "nightly").index(row.stage))
    assumed = (
        f"each GPU does {config.utilisation:.0%} of {stages.peak.describe()}; chunks differ by {SPREAD:.0%}, "
        f"{config.stragglers:.1%} take {SLOWDOWN:g} times as long, a worker is lost in {config.loss_hours:,.0f} GPU-hours"
    )
    return Page(stages.costs.machine, assumed, rows, limits, list(advice(evaluation)))


def sweep(stages: StageCosts) -> Iterator[PlanRow]:
    config = stages.config
    at_once = min(config.trials, config.workers // config.train_workers)
    rounds = math.ceil(config.trials / at_once)
    hours = stages.training_hours + stages.sample_seconds(stages.sampler_steps) * config.samples / (
        3600 * config.train_workers
    )
    yield stages.on_gpus(
        "sweep",
        "time",
        rounds * hours,
        f"{config.trials} trainings with their evaluation, {at_once} at once on {config.train_workers} GPUs each",
    )
    kept = config.trials * stages.training_costs.checkpoint_bytes
    yield counted("sweep", "disk", kept / 1e9, "GB", "at least: the last checkpoint of each trial")


def evaluated(stages: StageCosts, evaluation: Sampling) -> Iterator[PlanRow]:
    workers = stages.config.workers
    outcomes = [evaluation.on(workers, seed) for seed in range(SEEDS)]
    hours = [evaluation.total(outcome) / 3600 for outcome in outcomes]
    row = stages.on_gpus(
        "evaluate",
        "time",
        hours[0],
        f"checkpoints: {evaluation.checkpoints}, of {evaluation.samples:,} samples each; GPUs: {workers}, with workers that run",
    )
    yield row
    shares = sorted(outcome.busy for outcome in outcomes)
    yield replace(
        row,
        what="busy workers",
        value=100 * outcomes[0].busy,
        low=100 * shares[0],
        high=100 * shares[-1],
        unit="%",
        basis="while they sample: the fan-out's own code over simulated workers",
    )
    yield from stages.evaluation("evaluate", evaluation.checkpoints)


def nights(stages: StageCosts, nightly: Sampling) -> Iterator[PlanRow]:
    config = stages.config
    made = 24 / (stages.training_hours * stages.training.checkpoint_every / stages.training.steps)
    each = nightly.total(nightly.on(config.workers)) / 3600
    yield stages.on_gpus(
        "nightly",
        "time",
        each * made,
        f"{made:.0f} checkpoints that a training makes in a day, one after the other, of {nightly.samples:,} samples by "
        f"{nightly.sampler_steps} steps",
    )
    yield replace(
        stages.on_gpus("nightly", "checkpoints a night", config.hours / each, f"in {config.hours:g} hours"),
        low=config.hours / each / 2,
        high=config.hours / each * 1.5,
        unit="",
    )


def at_scale(stages: StageCosts) -> Iterator[PlanRow]:
    """What grows with numbers that are not those of this configuration."""
    costs, stage = stages.costs, f"{IMAGES:,} images"
    seconds = IMAGES * costs["preprocess_listing"]
    yield stages.timed(stage, "listing", seconds, "s", "preprocess_listing", "of the driver, before the first shard")
    memory = IMAGES * costs["preprocess_driver"] / 1e9
    yield stages.timed(stage, "driver memory", memory, "GB", "preprocess_driver", "the list of the images")
    order = IMAGES * costs["epoch_order"]
    yield stages.timed(stage, "order of an epoch", order, "s", "epoch_order", "of each worker, once an epoch")
    stage = f"{CHECKPOINTS:,} checkpoints"
    numbers = CHECKPOINTS * stages.number_seconds(stages.config.samples) / 3600
    yield stages.timed(stage, "numbers", numbers, "CPU hours", "numbers_50000", "of workers, on one core each")
    calls = CHECKPOINTS * costs["mlflow_checkpoint"]
    hours = calls * costs["mlflow_call"] / 3600
    yield stages.timed(stage, "MLflow", hours, "hours", "mlflow_call", f"{calls:,.0f} calls, one after the other")
    size = CHECKPOINTS * stages.training_costs.checkpoint_bytes / 1e12
    yield counted(stage, "disk", size, "TB", "if all are kept")
    stage = f"{CHUNKS:,} chunks"
    per_chunk = stages.config.chunk_size
    model = WorkerModel(workers=1000, seconds=lambda indices: 100.0)
    ray = RayCosts(submit=costs["ray_submit"], result=costs["ray_result"], wait_each=costs["ray_wait_each"])
    loop = simulate(chunk_ranges(4000, 1), model, ray, meter=time.process_time).driver / 4000 * CHUNKS
    yield stages.timed(
        stage, "the driver's loop", loop, "s", "ray_submit", "at 1,000 workers: giving out, waiting, taking"
    )
    read = CHUNKS * per_chunk * costs["chunk_read"] / 3600
    yield stages.timed(
        stage, "reading them again", read, "CPU hours", "chunk_read", "of the driver, after a kill at worst"
    )
    size = CHUNKS * per_chunk * costs["chunk_sample"] / 1e12
    yield stages.timed(stage, "disk", size, "TB", "chunk_sample", f"of {per_chunk} samples each")


def preprocessing_limit(stages: StageCosts, workers: int) -> LimitRow:
    """workers: CPUs, here."""
    work = stages.config.images * stages.image_seconds()
    parts = {
        "CPUs": work / min(workers, stages.shards),
        "listing, on the driver": stages.config.images * stages.costs["preprocess_listing"],
    }
    limit = max(parts, key=lambda name: parts[name])
    if workers > stages.shards and limit == "CPUs":
        limit = f"there are {stages.shards:,} shards, a task each"
    return LimitRow(stage="preprocess", workers=workers, hours=sum(parts.values()) / 3600, busy=None, limit=limit)


def training_limit(stages: StageCosts, workers: int) -> LimitRow:
    batch = stages.training.optim.batch_size
    step = stages.step(min(workers, batch))
    limit = "exchange of gradients" if step.exposed > step.compute else "arithmetic"
    if workers > batch:
        limit = f"the batch of {batch}: no more than {batch} workers have an image"
    return LimitRow(
        stage="train",
        workers=workers,
        hours=stages.training.steps * step.total / 3600,
        busy=min(workers, batch) / workers * step.compute / step.total,
        limit=limit,
    )


def advice(evaluation: Sampling) -> Iterator[str]:
    """What to give so that the workers of an evaluation are busier, and what stands against it."""
    config = evaluation.stages.config
    workers, batch = config.workers, config.batch_size
    busy = evaluation.on(workers).busy
    each = math.ceil(evaluation.samples * evaluation.checkpoints / workers)  # samples of a worker
    smaller = [size for size in (math.ceil(each / rounds) for rounds in (4, 8, 16, 32)) if MIN_BATCH <= size < batch]
    for sizes, options, note in (
        ([batch], "--chunk-size {0}", "the protocol stays the same"),
        (smaller, "--chunk-size {0} --batch-size {0}", "under another protocol, a part of which is the batch"),
    ):
        shares = {size: replace(evaluation, chunk_size=size).on(workers).busy for size in sizes if busy < ENOUGH}
        best = max(shares, key=lambda size: shares[size], default=None)
        if best is not None and shares[best] > busy + 0.02:
            given = f"evaluate with {options.format(best)}"
            yield f"{given}: workers are busy for {shares[best]:.0%} of the time, not {busy:.0%}; {note}"
            busy = shares[best]
