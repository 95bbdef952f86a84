"""Weights from and for other programs, in the layout of Hugging Face diffusers."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint, write_checkpoint
from ddpm_core.commit import MANIFEST, write_json
from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.interop import from_diffusers, to_diffusers
from ddpm_core.protocol import fingerprint
from pipelines.checkpoints.config import ExportConfig
from pipelines.checkpoints.select import find_checkpoints
from pipelines.runtime.chunks import content_sha256
from pipelines.runtime.layout import Run, Storage, local_storage
from pipelines.runtime.locations import absolute, location
from pipelines.tracking.uri import tracking_uri

INDEX = "model_index.json"  # of a pipeline
SCHEDULER = ("scheduler_config.json", "scheduler/scheduler_config.json", "../scheduler/scheduler_config.json")
# What diffusers calls things, and what Ho's code does.
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
VARIANCES = {"fixed_large": "fixedlarge", "fixed_small": "fixedsmall"}
PREDICTIONS = {"epsilon": "eps", "sample": "xstart", "v_prediction": "v"}


def import_weights(
    given: str, reference: str | None, storage: Storage[Path]
) -> tuple[Run[Path], tuple[Checkpoint, ...]]:
    """(the run, its checkpoint) of weights in the diffusers layout, kept from now on as a run of one step 0 in the storage.

    The process is that of a scheduler_config.json in or beside the folder, and the paper's without one. Raises InputError if
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
    """The process that weights in the diffusers layout were trained for. Raises InputError if it has no counterpart here."""
    path = next((folder / place for place in SCHEDULER if (folder / place).is_file()), None)
    if path is None:
        return DiffusionConfig()
    try:
        values: Mapping[str, Any] = json.loads(path.read_text())
        if values.get("trained_betas") is not None:
            raise ValueError("trained_betas")
        return DiffusionConfig(
            schedule=SCHEDULES[values.get("beta_schedule", "linear")],  # type: ignore[arg-type]
            num_timesteps=int(values.get("num_train_timesteps", 1000)),
            beta_start=float(values.get("beta_start", 1e-4)),
            beta_end=float(values.get("beta_end", 0.02)),
            mean_type=PREDICTIONS[values.get("prediction_type", "epsilon")],  # type: ignore[arg-type]
            var_type=VARIANCES[values.get("variance_type", "fixed_small")],  # type: ignore[arg-type]
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"scheduler {str(path)!r} says {error}, which has no counterpart here: remove it to take the paper's process"
        ) from error


def export_checkpoint(config: ExportConfig) -> Path:
    """Write a checkpoint as a pipeline of diffusers; its folder. Raises InputError if that has no counterpart there.

    model_index.json comes last, so that a pipeline is whole or none.
    """
    storage = local_storage(config.storage)
    run, chosen = find_checkpoints(config.run, config.checkpoint, storage, tracking_uri(config, storage))
    if len(chosen) != 1:
        raise InputError(
            f"--checkpoint {config.checkpoint} of run {run.name!r} is {len(chosen)} checkpoints: give one step"
        )
    output, (checkpoint,) = absolute(config.output, option="--output"), chosen
    if output.is_dir() and any(output.iterdir()) and not (output / INDEX).is_file():
        raise InputError(f"--output is {str(output)!r}, a folder with other files in it: give a new or empty one")
    scheduler = scheduler_config(checkpoint.diffusion_config())
    (output / INDEX).unlink(missing_ok=True)
    to_diffusers(output / "unet", checkpoint.unet_config(), checkpoint.weights(config.weights))
    write_json(output / "scheduler" / "scheduler_config.json", scheduler)
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    write_json(output / INDEX, {"_class_name": "DDPMPipeline", **parts})
    return output


def scheduler_config(diffusion: DiffusionConfig) -> dict[str, Any]:
    """The scheduler_config.json of a process. A schedule that diffusers has no name for is given by its betas. Raises
    InputError for a variance or prediction that it does not have."""
    schedules, variances, predictions = (
        {here: there for there, here in names.items()} for names in (SCHEDULES, VARIANCES, PREDICTIONS)
    )
    if diffusion.var_type not in variances or diffusion.mean_type not in predictions:
        raise InputError(
            f"the process predicts {diffusion.mean_type!r} with variance {diffusion.var_type!r}, which diffusers does not "
            f"have: export one that predicts {', '.join(predictions)} with {' or '.join(variances)}"
        )
    named = diffusion.schedule in schedules
    return {
        "_class_name": "DDPMScheduler",
        "beta_schedule": schedules[diffusion.schedule] if named else "linear",
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "clip_sample": True,
        "num_train_timesteps": diffusion.num_timesteps,
        "prediction_type": predictions[diffusion.mean_type],
        "trained_betas": None if named else diffusion.betas().tolist(),
        "variance_type": variances[diffusion.var_type],
    }
