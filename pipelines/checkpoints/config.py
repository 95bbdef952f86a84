"""What is exported, as a value."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ddpm_core.configs import Weights
from ddpm_core.ranges import FilePath, Name
from pipelines.runtime.options import StorageOptions


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StorageOptions):
    """Which checkpoint to write for another program, and where."""

    run: Annotated[FilePath, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A training run, by its name, its MLflow run id or its folder; or one checkpoint, by its folder, its MLflow model id or
    models:/NAME@best-fid."""
    output: FilePath
    """The folder to write; a new one, or one that an export wrote."""
    checkpoint: Name = "latest"
    """Which of the run's: latest, or a step."""
    weights: Weights = "ema"
    """Averaged weights, as in the paper, or the last ones."""
    format: Literal["diffusers"] = "diffusers"
    """diffusers: what DDPMPipeline.from_pretrained reads."""
