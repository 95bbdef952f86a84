"""What a training run is, as a value: a preset with changes. Light to import, for workers get it too."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from ddpm_core.configs import DiffusionConfig, Execution, OptimConfig, UNetConfig, identity
from ddpm_core.errors import InputError
from ddpm_core.presets import PRESETS, Preset
from ddpm_core.ranges import Count, FilePath, Positive, Seed
from pipelines.runtime.options import StorageOptions


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StorageOptions):
    """A training run. What decides its result is in its name; how it is carried out is not."""

    preset: Annotated[str, tyro.conf.Suppress]
    """The recipe that the other values start from, and the first part of the run's name."""
    shards: FilePath
    """The data set: a folder or URL that jobs/preprocess.py made, reachable from every worker."""
    unet: UNetConfig
    """The network."""
    diffusion: DiffusionConfig
    """The diffusion process and the loss."""
    optim: OptimConfig
    """The optimiser."""
    execution: Execution
    """How a step is carried out."""
    horizontal_flip: bool
    """Mirror each training image with probability 1/2."""
    steps: Positive[int]
    """How many updates to make; a finished run given more goes on."""
    shuffle_window: Positive[int] | None = None
    """Images among which each epoch's order is uniform, of row groups in random order; by default all. For data sets that
    are read by row groups (URLs, storage float32) and too large to be kept."""
    seed: Seed = 0
    """Of weights, batches, timesteps, noise, flips and dropout."""
    workers: Positive[int] = 1
    """Data-parallel processes, one a GPU if there are GPUs; they share the batch."""
    cpus_per_worker: Positive[float] = 0.9
    """CPUs of each; a little under a whole one leaves room for drivers on a small machine."""
    min_workers: Positive[int] | None = None
    """With it, the run starts with as many workers as the cluster has room for, from this number up to --workers, and
    follows when nodes come and go."""
    checkpoint_every: Positive[int] = 5000
    """Updates between checkpoints; a killed run loses at most these."""
    keep_last: Positive[int] = 5
    """How many of the newest checkpoints stay; the one marked as the best stays besides."""
    keep_every: Positive[int] | None = 50_000
    """Checkpoints at multiples of so many updates stay for ever."""
    log_every: Positive[int] = 100
    """Updates between log records."""
    sample_every: Positive[int] | None = 10_000
    """Updates between grids of samples from the EMA weights, which MLflow shows while the run goes on."""
    max_failures: Count[int] = 3
    """How often a lost worker is replaced before the run fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_workers is not None and self.min_workers > self.workers:
            raise InputError(
                f"--min-workers is {self.min_workers}, above --workers {self.workers}: give at most as many"
            )
        replicas = self.optim.clip_replicas
        if replicas > 1 and (replicas % self.workers or self.min_workers is not None):
            raise InputError(
                f"--workers is {self.workers} and --optim.clip-replicas {replicas}: give a number of workers that divides it, "
                "without --min-workers"
            )
        if self.workers > self.optim.batch_size:
            raise InputError(
                f"--workers is {self.workers} for a batch of {self.optim.batch_size}: each worker needs an image"
            )

    def identity(self, dataset_sha256: str) -> dict[str, Any]:
        """Everything that decides the result of each step. The number of steps is not in it: a longer run goes on from a
        shorter one."""
        window = {} if self.shuffle_window is None else {"shuffle_window": self.shuffle_window}
        return {
            "unet": asdict(self.unet),
            "diffusion": identity(self.diffusion),
            "optim": self.optim.identity(),
            "horizontal_flip": self.horizontal_flip,
            "seed": self.seed,
            "dataset": dataset_sha256,
            **self.execution.identity(),
            **window,
        }


def config_for(preset_name: str, **changes: Any) -> TrainConfig:
    """The configuration of a preset, with changes. `shards` must be among them."""
    preset: Preset = PRESETS[preset_name]
    values = {
        "preset": preset_name,
        "unet": preset.unet,
        "diffusion": preset.diffusion,
        "optim": preset.optim,
        "execution": Execution(),
        "horizontal_flip": preset.horizontal_flip,
        "steps": preset.steps,
    }
    return TrainConfig(**{**values, **changes})
