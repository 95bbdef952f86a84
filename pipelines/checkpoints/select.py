"""Which checkpoints a person means by a run's name, an MLflow id or a path."""

from collections.abc import Sequence

from ddpm_core.checkpoint import NAME, Checkpoint, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError, did_you_mean
from pipelines.checkpoints.store import saved_checkpoints
from pipelines.runtime.recipe import RECIPE
from pipelines.storage.layout import Run, Storage, by_prefix
from pipelines.storage.locations import Location, entries, location
from pipelines.tracking.queries import name_of_run, path_of_model


def find_checkpoints(name: str, steps: str, storage: Storage, uri: str) -> tuple[Run, tuple[Checkpoint, ...]]:
    """(the run, its checkpoints that are asked for, by ascending step).

    name: a run's name, folder or MLflow run id, or one checkpoint's folder, MLflow model id or models:/NAME@alias. steps:
    all, latest, or steps such as 1000,2000. Raises InputError if there is no such run or step.
    """
    if name.startswith(("m-", "models:/")):
        path = path_of_model(uri, name)
        if path is None and name.startswith("models:/"):
            raise InputError(
                f"model {name!r} is not known to MLflow: give models:/NAME@alias of a model that the nightly evaluation "
                "registered, or a run"
            )
        name = name if path is None else str(place_of_model(name, path, storage))
    given = location(name, option="--run")
    if (given / MANIFEST).is_file():
        return storage.run(given.parent.name, given.parent), (open_checkpoint(given),)
    run = find_run(name, given, storage, uri)
    return run, choose_steps(name, saved_checkpoints(run.folder), steps)


def place_of_model(model: str, recorded: str, storage: Storage) -> Location:
    """Where the checkpoint of a model lies: where MLflow recorded it, or in this storage, if that was moved here from there and
    the records are a server's. Raises InputError if neither is there."""
    place = location(recorded, option="--run")
    here = storage.trainings / place.parent.name / place.name
    for candidate in (place, here):
        if candidate.exists():
            return candidate
    raise InputError(
        f"model {model!r} lies in {recorded!r} by MLflow's records, where nothing is, and not in {str(here)!r} either: give the "
        "--storage that holds it, or a checkpoint's folder"
    )


def find_checkpoint(name: str, step: str, storage: Storage, uri: str) -> tuple[Run, Checkpoint]:
    """(the run, its one checkpoint that is asked for), as `find_checkpoints`. Raises InputError if `step` names several."""
    run, chosen = find_checkpoints(name, step, storage, uri)
    if len(chosen) != 1:
        raise InputError(f"--checkpoint {step} of run {run.name!r} is {len(chosen)} checkpoints: give one step")
    return run, chosen[0]


def find_run(name: str, given: Location, storage: Storage, uri: str) -> Run:
    """The run of a name, of how its name or fingerprint begins, of an MLflow run id, or that lies at the path `given`. Raises
    InputError if there is none, or several."""
    candidates = [storage.run(given.name, given)]
    runs = storage.trainings
    known = [path.name for path in entries(runs) if path.is_dir()]
    if "/" not in name:  # else it would be a path, perhaps out of the storage
        names = [name] if name in known else [name_of_run(uri, name), by_prefix(name, known, "run")]
        candidates += [storage.run(each) for each in names if each is not None]
    for run in candidates:
        begun = [path.name for path in entries(run.folder)]
        if RECIPE in begun or any(map(NAME.fullmatch, begun)):
            return run
    raise InputError(
        f"run {name!r} is not known{did_you_mean(name, known)}: give one of those in {str(runs)!r} "
        f"({', '.join(known) or 'none'}), an MLflow run or model id, or a checkpoint's folder"
    )


def choose_steps(name: str, saved: Sequence[Checkpoint], steps: str) -> tuple[Checkpoint, ...]:
    """Those of a run's checkpoints that `steps` names: all, latest, or steps such as 1000,2000. Raises InputError if one
    is not there."""
    if not saved:
        raise InputError(f"run {name!r} has no finished checkpoint yet: train on, or wait for the first")
    if steps == "all":
        return tuple(saved)
    if steps == "latest":
        return (saved[-1],)
    try:
        wanted = {int(step) for step in steps.split(",")}
    except ValueError:
        raise InputError(f"--checkpoints is {steps!r}: give all, latest, or steps such as 1000,2000") from None
    missing = wanted - {checkpoint.step for checkpoint in saved}
    if missing:
        near = min((checkpoint.step for checkpoint in saved), key=lambda step: abs(step - min(missing)))
        raise InputError(
            f"run {name!r} has no checkpoint at step {min(missing)}: it has "
            f"{', '.join(str(checkpoint.step) for checkpoint in saved)} (did you mean {near}?)"
        )
    return tuple(checkpoint for checkpoint in saved if checkpoint.step in wanted)
