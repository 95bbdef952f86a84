"""What each stage takes: hours, memory, disk, requests. Counts from the configuration, times unit costs that were measured, or
arithmetic over a GPU's speed that is assumed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ddpm_core.configs import Execution
from ddpm_core.costs import Plan, forward_flops
from ddpm_core.costs import plan as training_plan
from ddpm_core.devices import Peak
from ddpm_core.errors import InputError
from ddpm_core.presets import PRESETS
from pipelines.plan.config import PlanConfig
from pipelines.plan.data_parallel import StepTime, all_reduce_bytes, step_time
from pipelines.plan.rows import PlanRow, counted
from pipelines.plan.unit_costs import UnitCosts
from pipelines.preprocess.config import PreprocessConfig
from pipelines.storage.chunks import chunk_ranges
from pipelines.train.config import TrainConfig, config_for
from pipelines.train.plan import kept_checkpoints, known_peak

INCEPTION = 11.4e9  # FLOPs of the feature network an image: 5.7 G multiplications at 299x299 (Szegedy et al. 2016)
# Of the hours that rest on an assumed utilisation: between half as much again and half of it.
FASTER, SLOWER = 2 / 3, 2.0
PART = 50 << 20  # bytes of one request of an upload in parts


@dataclass(frozen=True)
class StageCosts:
    """The stages of a configuration, counted. Raises InputError for a GPU that is not known, or more training workers than
    images of a batch."""

    config: PlanConfig
    costs: UnitCosts

    def __post_init__(self) -> None:
        config = self.config
        if config.train_workers > config.workers:
            raise InputError(
                f"--train-workers is {config.train_workers}, more than --workers {config.workers}: give at most as many"
            )
        batch = PRESETS[config.model].optim.batch_size
        if config.train_workers > batch:
            raise InputError(
                f"--train-workers is {config.train_workers} for a batch of {batch}: each needs an image, so give at most {batch}"
            )
        _ = self.peak  # raises, if it is not known
        steps, T = self.sampler_steps, PRESETS[config.model].diffusion.num_timesteps
        if steps > T:
            raise InputError(f"--sampler-steps is {steps}: the schedule of {config.model} has {T:,} timesteps")

    @cached_property
    def training(self) -> TrainConfig:
        """The training, as its job takes it."""
        execution = Execution().resolved(fast=True)  # as the GPUs that are known choose it
        return config_for(self.config.model, shards="-", workers=self.config.train_workers, execution=execution)

    @cached_property
    def peak(self) -> Peak:
        return known_peak(self.config.gpu, self.training.execution.network_precision)

    @property
    def sampler_steps(self) -> int:
        return self.config.sampler_steps or self.training.diffusion.num_timesteps

    @property
    def checkpoints(self) -> int:
        return self.config.checkpoints or kept_checkpoints(self.training)

    @cached_property
    def training_costs(self) -> Plan:
        training = self.training
        return training_plan(
            training.unet,
            training.optim,
            training.execution,
            steps=training.steps,
            checkpoint_every=training.checkpoint_every,
            workers=training.workers,
            peak_flops=self.peak.flops,
            utilisation=self.config.utilisation,
        )

    def step(self, workers: int) -> StepTime:
        """Of the training, on so many workers."""
        share = math.ceil(self.training.optim.batch_size / workers)
        compute = share * self.training_costs.training_flops / (self.peak.flops * self.config.utilisation)
        return step_time(
            forward=compute / 3,
            backward=compute * 2 / 3,
            update=0.0,
            gradients=4 * self.training_costs.parameters,
            workers=workers,
            bandwidth=self.config.bandwidth * 1e9,
        )

    @property
    def training_hours(self) -> float:
        return self.training.steps * self.step(self.training.workers).total / 3600

    def sample_seconds(self, sampler_steps: int) -> float:
        """Of a GPU, for a sample and its features."""
        flops = sampler_steps * forward_flops(self.training.unet) + INCEPTION
        return flops / (self.peak.flops * self.config.utilisation)

    @property
    def chunks(self) -> list[range]:
        """Of a checkpoint's samples."""
        return chunk_ranges(self.config.samples, self.config.chunk_size)

    def number_seconds(self, samples: int) -> float:
        """Of a worker, for all numbers of a checkpoint, on one core: on the line through those that were measured."""
        few, many = self.costs["numbers_10000"], self.costs["numbers_50000"]
        if samples <= 10_000:
            return few * samples / 10_000
        return few + (many - few) * (samples - 10_000) / 40_000

    @property
    def shards(self) -> int:
        return math.ceil(self.config.images / PreprocessConfig.images_per_shard)

    def image_seconds(self) -> float:
        """Of a CPU, for an image: on the line, by pixels, through those that were measured."""
        small, large = self.costs["preprocess_image_32"], self.costs["preprocess_image_256"]
        side = self.training.unet.image_size
        return small + (large - small) * max(0.0, (side**2 - 32**2) / (256**2 - 32**2))

    # From here on: the lines of a page.

    def timed(self, stage: str, what: str, value: float, unit: str, cost: str, basis: str) -> PlanRow:
        """A count times a measured unit cost, with that one's spread."""
        low, high = self.costs.spread(cost)
        return PlanRow(
            stage=stage,
            what=what,
            value=value,
            low=value * low,
            high=value * high,
            unit=unit,
            source="measured",
            basis=basis,
        )

    def on_gpus(self, stage: str, what: str, hours: float, basis: str) -> PlanRow:
        """Hours that rest on the assumed utilisation."""
        return PlanRow(
            stage=stage,
            what=what,
            value=hours,
            low=hours * FASTER,
            high=hours * SLOWER,
            unit="hours",
            source="assumed",
            basis=basis,
        )

    def preprocessing(self) -> Iterator[PlanRow]:
        config, costs, stage = self.config, self.costs, "preprocess"
        network = self.training.unet
        side, channels = network.image_size, network.in_channels
        shards = self.shards
        work = config.images * self.image_seconds()
        yield self.timed(
            stage,
            "time",
            work / min(config.cpus, shards) / 3600,
            "hours",
            "preprocess_image_256",
            f"{config.images:,} images of {1e3 * self.image_seconds():.2g} CPU ms on {min(config.cpus, shards)} CPUs",
        )
        listing = config.images * costs["preprocess_listing"]
        yield self.timed(
            stage, "listing", listing / 3600, "hours", "preprocess_listing", "of the driver, before the first shard"
        )
        memory = config.images * costs["preprocess_driver"]
        yield self.timed(stage, "driver memory", memory / 1e9, "GB", "preprocess_driver", "the list of the images")
        worker = costs["preprocess_worker"]
        yield self.timed(
            stage, "worker memory", worker / 1e9, "GB", "preprocess_worker", "each, with a shard of 256x256"
        )
        size = config.images * side**2 * channels
        yield counted(stage, "disk", size / 1e9, "GB", f"{shards:,} shards, a byte a value")
        requests = shards * costs["store_shard"] + size / PART
        yield self.timed(stage, "store requests", requests, "", "store_shard", "if the output is a URL")

    def train(self) -> Iterator[PlanRow]:
        stage, training, plan, step = "train", self.training, self.training_costs, self.step(self.training.workers)
        yield self.on_gpus(
            stage,
            "time",
            self.training_hours,
            f"{training.steps:,} steps of {1e3 * step.total:.3g} ms on {training.workers} GPUs",
        )
        exchanged = all_reduce_bytes(4 * plan.parameters, training.workers)
        yield replace(
            self.on_gpus(
                stage,
                "exchange",
                self.training.steps * step.exposed / 3600,
                f"of it, waiting: {exchanged / 1e9:.2f} GB of gradients at {self.config.bandwidth:g} GB/s take "
                f"{1e3 * step.exchange:.3g} ms a step, {1e3 * step.exposed:.3g} ms not beside the backward pass",
            ),
            low=0.0,
        )
        memory = plan.memory.total
        yield counted(stage, "GPU memory", memory / 2**30, "GiB", "at least, of each GPU, without micro-batches")
        kept = kept_checkpoints(training)
        size = plan.checkpoint_bytes
        yield counted(stage, "disk", kept * size / 1e9, "GB", f"{kept} checkpoints of {size / 1e9:.2f} GB")
        made = math.ceil(training.steps / training.checkpoint_every)
        saving = made * size * self.costs["checkpoint_byte"] / 3600
        yield self.timed(
            stage, "saving", saving, "CPU hours", "checkpoint_byte", f"{made:,} checkpoints, beside the steps"
        )
        requests = made * (self.costs["store_checkpoint"] + size / PART)
        yield self.timed(stage, "store requests", requests, "", "store_checkpoint", "if the storage is a URL")
        calls = training.steps // training.log_every * self.costs["mlflow_record"] + made * self.costs["mlflow_model"]
        yield self.timed(stage, "MLflow calls", calls, "", "mlflow_model", "records and checkpoints")

    def evaluation(self, stage: str, checkpoints: int) -> Iterator[PlanRow]:
        """The lines of an evaluation of so many checkpoints, but for its time, which is simulated."""
        config, costs = self.config, self.costs
        chunks = checkpoints * len(self.chunks)
        numbers = checkpoints * self.number_seconds(config.samples)
        yield self.timed(
            stage,
            "numbers",
            numbers / 3600,
            "CPU hours",
            "numbers_50000",
            f"of workers, {numbers / checkpoints:.0f} s of one core a checkpoint; on a GPU less, which is not measured",
        )
        memory = costs["numbers_bytes_10000" if config.samples <= 10_000 else "numbers_bytes_50000"]
        yield self.timed(stage, "worker memory", memory / 1e9, "GB", "numbers_bytes_50000", "at the numbers")
        size = checkpoints * config.samples * costs["chunk_sample"]
        yield self.timed(
            stage, "disk", size / 1e9, "GB", "chunk_sample", f"{chunks:,} chunks, with Inception's features"
        )
        requests = float(3 * chunks + checkpoints)
        yield counted(
            stage, "store requests", requests, "", "a chunk: PUT, HEAD and GET; a listing of a checkpoint's folder"
        )
        calls = costs["mlflow_evaluation"] + checkpoints * costs["mlflow_checkpoint"]
        yield self.timed(
            stage,
            "MLflow calls",
            calls,
            "",
            "mlflow_checkpoint",
            f"of {1e3 * costs['mlflow_call']:.2g} ms each, one after the other: {calls * costs['mlflow_call']:,.1f} s",
        )
