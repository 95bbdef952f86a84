"""What a training run is, as a value: a preset with changes. Light to import, for workers get it too."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.presets import PRESETS, Preset
from ddpm_core.training import OptimConfig
from ddpm_core.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. What decides its result is in its name; how it is carried out is not."""

    preset: Annotated[str, tyro.conf.Suppress]
    """The recipe that the other values start from, and the first part of the run's name."""
    shards: str
    """The data set: a folder that jobs/preprocess.py made, reachable from every worker."""
    unet: UNetConfig
    """The network."""
    diffusion: DiffusionConfig
    """The diffusion process and the loss."""
    optim: OptimConfig
    """The optimiser."""
    horizontal_flip: bool
    """Mirror each training image with probability 1/2."""
    steps: int
    """How many updates to make; a finished run given more goes on."""
    seed: int = 0
    """Of weights, batches, timesteps, noise and flips."""
    workers: int = 1
    """Data-parallel processes, one a GPU where there are GPUs; they share the batch."""
    cpus_per_worker: float = 0.9
    """CPUs of each; a little under a whole one leaves room for drivers on a small machine."""
    checkpoint_every: int = 5000
    """Updates between checkpoints; a killed run loses at most these."""
    log_every: int = 100
    """Updates between log records."""
    max_failures: int = 3
    """How often a lost worker is replaced before the run fails."""
    storage: str = "runs"
    """The folder for checkpoints and results, reachable from every worker."""
    tracking_uri: str | None = None
    """MLflow's; by default MLFLOW_TRACKING_URI, or an SQLite file in the storage folder."""
    experiment: str = "ddpm"
    """The MLflow experiment."""

    def __post_init__(self) -> None:
        for name in ("steps", "workers", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} is {getattr(self, name)}: give a positive number")
        if self.workers > self.optim.batch_size:
            raise InputError(
                f"--workers is {self.workers} for a batch of {self.optim.batch_size}: each worker needs an image"
            )

    def identity(self, dataset_sha256: str) -> dict[str, Any]:
        """Everything that decides the result of each step. The number of steps is not in it: a longer run goes on from a
        shorter one."""
        return {
            "unet": asdict(self.unet),
            "diffusion": asdict(self.diffusion),
            "optim": asdict(self.optim),
            "horizontal_flip": self.horizontal_flip,
            "seed": self.seed,
            "dataset": dataset_sha256,
        }


def config_for(preset_name: str, **changes: Any) -> TrainConfig:
    """The configuration of a preset, with changes. `shards` must be among them."""
    preset: Preset = PRESETS[preset_name]
    values = {
        "preset": preset_name,
        "unet": preset.unet,
        "diffusion": preset.diffusion,
        "optim": preset.optim,
        "horizontal_flip": preset.horizontal_flip,
        "steps": preset.steps,
    }
    return TrainConfig(**{**values, **changes})
