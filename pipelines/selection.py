"""Which checkpoints a person means by a run's name, its MLflow id or a path."""

from pathlib import Path

from ddpm_core.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from pipelines.tracking import name_of_run


def find_checkpoints(run: str, steps_wanted: str, storage: Path, uri: str) -> tuple[str, tuple[Checkpoint, ...]]:
    """(the run's name, the checkpoints asked for).

    run: a name, folder or MLflow run id, or one checkpoint's folder. steps_wanted: all, latest, or steps such as
    1000,2000. InputError where there is no such run or step.
    """
    given = Path(run).expanduser()
    if (given / MANIFEST).is_file():
        return given.resolve().parent.name, (open_checkpoint(given.resolve()),)
    candidates = [given, storage / "train" / run]
    tracked = name_of_run(uri, run)
    if tracked is not None:
        candidates.append(storage / "train" / tracked)
    folder = next((path for path in candidates if any(path.glob("step-*"))), None)
    if folder is None:
        known = sorted(path.name for path in (storage / "train").glob("*") if path.is_dir())
        raise InputError(
            f"run {run!r} is not known: give one of those in {str(storage / 'train')!r} ({', '.join(known) or 'none'}), "
            "an MLflow run id, or a checkpoint's folder"
        )
    found = list_checkpoints(folder.resolve())
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
    return folder.resolve().name, tuple(found)
