"""What the nightly evaluation is asked."""

from dataclasses import dataclass, field, fields
from typing import Annotated, TypeVar

import tyro

from ddpm_core.configs import LATER, Method, Purpose, Spacing, identity
from ddpm_core.protocol import fingerprint
from ddpm_core.ranges import Count, FilePath, Name, Positive, Range
from pipelines.evaluate.config import EvaluateConfig

T = TypeVar("T")
Fixed = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]  # no option of the command line


@dataclass(frozen=True, kw_only=True)
class NightlyConfig(EvaluateConfig):
    """An evaluation of whatever has none yet, by a protocol that is quick enough for every checkpoint."""

    run: FilePath | None = None
    """Only this training, by its name; by default every training of the experiment but the trials of sweeps."""
    checkpoints: Fixed[str] = "all"
    weights: Fixed[str] = "ema"
    ema_length: Fixed[float | None] = field(default=None, metadata=LATER)
    noise: Fixed[Purpose] = "selection"
    samples: Positive[int] = 10_000
    """How many samples; the Frechet distance depends on it."""
    sampler: Method = "ddim"
    """ancestral (the paper's), ddim, dpmpp_2m, or dpmpp_2m_second_order, whose last step but one is of second order too."""
    sampler_steps: Positive[int] | None = 50
    """How many timesteps the sampler visits."""
    spacing: Spacing = "quadratic"
    """How those are spaced: uniform, quadratic, leading or logsnr."""
    pictures: Annotated[int, Range("a number from 0 to 64", low=0, high=64)] = 0
    """Rows of each picture of every checkpoint; 0 for none."""
    nearest: Count[int] = 0
    """For how many samples of every checkpoint to look up the nearest training images; 0 for none."""
    hours: Positive[float] = 8.0
    """How long to sample for; what is left then is for the next night."""
    gpu_hours: Positive[float] | None = None
    """The same, in hours of all workers together."""
    attempts: Positive[int] = 3
    """How often a checkpoint may fail before it is left alone, with an alarm."""
    worse_by: Positive[float] = 1.0
    """Raise an alarm if a checkpoint is worse than the one before it by more than so many intervals."""
    quiet_hours: Positive[float] = 24.0
    """Raise an alarm if a running training has made no checkpoint for so long."""
    alarm_command: Name | None = None
    """A command that gets new alarms as JSON on its standard input; logs show it, so put no secret into it. A URL in
    DDPM_ALARM_WEBHOOK gets the same by POST."""
    dry_run: bool = False
    """Print what would be evaluated, and end."""

    def check_subject(self) -> None:
        """Nothing to check: without --run, every training is evaluated."""

    @property
    def identity(self) -> str:
        """A fingerprint of what decides a checkpoint's result. Nights that share it share a ledger."""
        irrelevant = {"run", "workers", "cpus_per_worker", "storage", "tracking_uri", "experiment", "compile"}
        irrelevant |= {"report", "pictures", "nearest", "mode", "channels_last"}
        names = {field.name for field in fields(EvaluateConfig)} - irrelevant
        values = {name: value for name, value in identity(self).items() if name in names}
        return fingerprint({**values, "precision": self.network_precision})

    def evaluation(self, run: str) -> EvaluateConfig:
        """The evaluation of one training's checkpoints."""
        shared = {field.name: getattr(self, field.name) for field in fields(EvaluateConfig)}
        return EvaluateConfig(**{**shared, "run": run})
