"""Which checkpoints a person means by a run's name, its MLflow id or a path."""

from pathlib import Path

from ddpm_core.checkpoint import NAME, Checkpoint, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from pipelines.locations import Location, location
from pipelines.saving import saved_checkpoints
from pipelines.tracking import name_of_run


def find_checkpoints(run: str, steps_wanted: str, storage: Location, uri: str) -> tuple[str, tuple[Checkpoint, ...]]:
    """(the run's name, the checkpoints asked for).

    run: a name, folder or MLflow run id, or one checkpoint's folder. steps_wanted: all, latest, or steps such as
    1000,2000. InputError where there is no such run or step.
    """
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
            "an MLflow run id, or a checkpoint's folder"
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
