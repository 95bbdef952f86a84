"""Which checkpoints a person means by a run's name, an MLflow id, a path, or weights from elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import NAME, Checkpoint, checkpoint_name, open_checkpoint, write_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.interop import from_diffusers
from ddpm_core.protocol import fingerprint
from pipelines.checkpoints.saver import saved_checkpoints
from pipelines.evaluate.config import EvaluateConfig
from pipelines.runtime.chunks import content_sha256
from pipelines.runtime.locations import Location, absolute, location
from pipelines.tracking.queries import name_of_run, path_of_model
from pipelines.tracking.uri import default_uri

SCHEDULER = ("scheduler_config.json", "scheduler/scheduler_config.json", "../scheduler/scheduler_config.json")
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}  # theirs: ours
VARIANCES = {"fixed_large": "fixedlarge", "fixed_small": "fixedsmall"}


def chosen_checkpoints(config: EvaluateConfig) -> tuple[str, tuple[Checkpoint, ...]]:
    """(the run's name, the checkpoints) that a configuration asks for. InputError where there are none."""
    storage = absolute(config.storage, option="--storage")
    if config.foreign:
        return import_weights(config.weights, config.reference, storage)
    return find_checkpoints(config.run or "", config.checkpoints, storage, config.tracking_uri or default_uri(storage))


def find_checkpoints(run: str, steps_wanted: str, storage: Location, uri: str) -> tuple[str, tuple[Checkpoint, ...]]:
    """(the run's name, the checkpoints asked for).

    run: a name, folder or MLflow run id, or one checkpoint's folder, MLflow model id or models:/NAME@alias. steps_wanted:
    all, latest, or steps such as 1000,2000. InputError where there is no such run or step.
    """
    if run.startswith(("m-", "models:/")):
        path = path_of_model(uri, run)
        if path is None and run.startswith("models:/"):
            raise InputError(
                f"model {run!r} is not known to MLflow: give models:/NAME@alias of a model that the nightly evaluation "
                "registered, or a run"
            )
        run = path or run
    given = location(run, option="--run") if "://" in run else Path(run).expanduser().resolve()
    if (given / MANIFEST).is_file():
        return given.parent.name, (open_checkpoint(given),)
    candidates = [given, storage / "train" / run]
    tracked = name_of_run(uri, run)
    if tracked is not None:
        candidates.append(storage / "train" / tracked)
    folder = next((path for path in candidates if path.is_dir() and is_run(path)), None)
    if folder is None:
        runs = storage / "train"
        known = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
        raise InputError(
            f"run {run!r} is not known: give one of those in {str(runs)!r} ({', '.join(known) or 'none'}), "
            "an MLflow run or model id, or a checkpoint's folder"
        )
    found = saved_checkpoints(folder)
    if not found:
        raise InputError(f"run {run!r} has no finished checkpoint yet: train on, or wait for the first")
    if steps_wanted == "latest":
        found = found[-1:]
    elif steps_wanted != "all":
        try:
            steps = {int(step) for step in steps_wanted.split(",")}
        except ValueError:
            raise InputError(
                f"--checkpoints is {steps_wanted!r}: give all, latest, or steps such as 1000,2000"
            ) from None
        there = {checkpoint.step for checkpoint in found}
        if steps - there:
            raise InputError(
                f"run {run!r} has no checkpoint at step {min(steps - there)}: it has "
                f"{', '.join(map(str, sorted(there)))}"
            )
        found = [checkpoint for checkpoint in found if checkpoint.step in steps]
    return folder.name, tuple(found)


def is_run(folder: Location) -> bool:
    """Whether a folder holds checkpoints, finished or not."""
    return any(NAME.fullmatch(path.name) for path in folder.iterdir())


def import_weights(given: str, reference: str | None, storage: Path) -> tuple[str, tuple[Checkpoint, ...]]:
    """(name, the checkpoint) of weights in the diffusers layout, kept from now on as a run of one step 0 in the storage.

    The process is that of a scheduler_config.json in or beside the folder, and the paper's without one. InputError where
    the weights are not the paper's network, or no reference says what to compare with.
    """
    folder = absolute(given, option="--weights")
    if reference is None:
        raise InputError(f"--weights {given!r} has no training set of its own: give --reference")
    network, weights = from_diffusers(folder)
    diffusion = scheduler_of(folder)
    name = f"{folder.name}-{fingerprint({'weights': content_sha256(weights), 'diffusion': asdict(diffusion)})}"
    run = storage / "train" / name
    if not (run / checkpoint_name(0) / MANIFEST).is_file():
        config = {
            "preset": folder.name,
            "unet": asdict(network),
            "diffusion": asdict(diffusion),
            "shards": str(location(reference, option="--reference")),
        }
        run.mkdir(parents=True, exist_ok=True)
        write_checkpoint(run, {"step": 0, "model": weights, "ema": weights, "optimizer": {}}, config, [])
    return name, (open_checkpoint(run / checkpoint_name(0)),)


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
