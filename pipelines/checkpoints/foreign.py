"""Weights from elsewhere, in the layout of diffusers, kept as a run of one checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint, write_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.interop import from_diffusers
from ddpm_core.protocol import fingerprint
from pipelines.runtime.chunks import content_sha256
from pipelines.runtime.layout import Run, Storage
from pipelines.runtime.locations import absolute, location

SCHEDULER = ("scheduler_config.json", "scheduler/scheduler_config.json", "../scheduler/scheduler_config.json")
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}  # theirs: ours
VARIANCES = {"fixed_large": "fixedlarge", "fixed_small": "fixedsmall"}


def import_weights(
    given: str, reference: str | None, storage: Storage[Path]
) -> tuple[Run[Path], tuple[Checkpoint, ...]]:
    """(the run, its checkpoint) of weights in the diffusers layout, kept from now on as a run of one step 0 in the storage.

    The process is that of a scheduler_config.json in or beside the folder, and the paper's without one. InputError where
    the weights are not the paper's network, or no reference says what to compare with.
    """
    folder = absolute(given, option="--weights")
    if reference is None:
        raise InputError(f"--weights {given!r} has no training set of its own: give --reference")
    network, weights = from_diffusers(folder)
    diffusion = scheduler_of(folder)
    name = f"{folder.name}-{fingerprint({'weights': content_sha256(weights), 'diffusion': asdict(diffusion)})}"
    run, folder = storage.run(name), storage.trainings / name
    if not (folder / checkpoint_name(0) / MANIFEST).is_file():
        config = {
            "preset": folder.name,
            "unet": asdict(network),
            "diffusion": asdict(diffusion),
            "shards": str(location(reference, option="--reference")),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, {"step": 0, "model": weights, "ema": weights, "optimizer": {}}, config, [])
    return run, (open_checkpoint(folder / checkpoint_name(0)),)


def scheduler_of(folder: Path) -> DiffusionConfig:
    """The process that weights in the diffusers layout were trained for. InputError where it has no counterpart here."""
    path = next((folder / place for place in SCHEDULER if (folder / place).is_file()), None)
    if path is None:
        return DiffusionConfig()
    try:
        values: Mapping[str, Any] = json.loads(path.read_text())
        return DiffusionConfig(
            schedule=SCHEDULES[values.get("beta_schedule", "linear")],  # type: ignore[arg-type]
            num_timesteps=int(values.get("num_train_timesteps", 1000)),
            beta_start=float(values.get("beta_start", 1e-4)),
            beta_end=float(values.get("beta_end", 0.02)),
            mean_type={"epsilon": "eps", "sample": "xstart", "v_prediction": "v"}[
                values.get("prediction_type", "epsilon")
            ],  # type: ignore[arg-type]
            var_type=VARIANCES[values.get("variance_type", "fixed_small")],  # type: ignore[arg-type]
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"scheduler {str(path)!r} says {error}, which has no counterpart here: remove it to take the paper's process"
        ) from error
