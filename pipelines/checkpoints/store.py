"""A run's checkpoints in its folder, local or in an object store: listed, committed, deleted.

Locally a checkpoint appears by a rename and disappears by one. In an object store its manifest is uploaded last and
deleted first. Either way a manifest under a final name means that the whole is there.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import (
    NAME,
    Checkpoint,
    checkpoint_name,
    list_checkpoints,
    open_checkpoint,
    write_checkpoint,
)
from ddpm_core.commit import MANIFEST, read_manifest, verify_files
from ddpm_core.errors import InputError
from pipelines.runtime.progress import Say
from pipelines.storage.locations import Location, committed_in, delete, is_there, upload_folder

Record = Mapping[str, Any]


def saved_steps(folder: Location) -> list[int]:
    """The steps of a run's finished checkpoints, ascending."""
    return sorted(int(match[1]) for name in committed_in(folder) if (match := NAME.fullmatch(name)))


def saved_checkpoints(folder: Location) -> list[Checkpoint]:
    """A run's finished checkpoints, by ascending step."""
    return list_checkpoints(folder, saved_steps(folder))


def made_at(checkpoint: Location) -> float:
    """When a checkpoint was finished, in seconds; 0 if it has been deleted meanwhile."""
    try:
        return float((checkpoint / MANIFEST).stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def newest_checkpoint(folder: Location, until: int) -> Checkpoint | None:
    """The last checkpoint up to step `until`; a longer run of the same configuration may have made later ones."""
    steps = [step for step in saved_steps(folder) if step <= until]
    return open_checkpoint(folder / checkpoint_name(steps[-1])) if steps else None


def set_aside_damaged(folder: Location, until: int, say: Say) -> None:
    """Take damaged checkpoints out of the way of an older whole one, from the newest up to step `until` on, and say so.

    A disk that was full or lost its power can leave a file of zeros behind a name that was renamed in time.
    """
    for step in reversed([step for step in saved_steps(folder) if step <= until]):
        target = folder / checkpoint_name(step)
        try:
            verify_files(target, read_manifest(target, what="checkpoint"), what="checkpoint")
            return
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError | ValueError | None):
                raise  # it could not be read, which says nothing of what it is
            aside = f"{target.name}.damaged-{uuid.uuid4().hex[:8]}"
            if isinstance(target, Path):
                target.rename(target.with_name(aside))
            else:  # nothing is renamed in an object store: without its manifest it is no checkpoint
                aside = target.name
                delete(target / MANIFEST)
            say(f"train: {error}; it is set aside as {aside}, and the run goes on from the one before")


def commit_snapshot(
    folder: Location, saved: Mapping[str, Any], config: Mapping[str, Any], history: Sequence[Record]
) -> None:
    """Commit a snapshot as folder/step-00001234. Raises OSError if that fails, with every other checkpoint left intact."""
    if isinstance(folder, Path):
        if not folder.is_dir():  # an unmounted disk, for instance: a folder made anew would hide that
            raise FileNotFoundError(errno.ENOENT, "the run's folder is gone", str(folder))
        write_checkpoint(folder, saved, config, history)
        return
    with tempfile.TemporaryDirectory(prefix=f"{staging_prefix(folder)}{os.getpid()}-") as temporary, store_errors():
        write_checkpoint(Path(temporary), saved, config, history)
        name = checkpoint_name(saved["step"])
        upload_folder(Path(temporary) / name, folder / name)


def commit_weights(folder: Location, saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Commit a snapshot that no training made, in a folder that is made if it is not there. Raises OSError if that fails."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    commit_snapshot(folder, saved, config, [])


def delete_checkpoint(folder: Location, step: int) -> None:
    """Delete a checkpoint. Whatever stops this, a reader finds it whole or not at all. Raises OSError if that fails."""
    target = folder / checkpoint_name(step)
    if isinstance(target, Path):
        discarded = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.del")
        with contextlib.suppress(FileNotFoundError):
            target.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)  # prune() tries again
        return
    with store_errors(), contextlib.suppress(FileNotFoundError):
        delete(target / MANIFEST)  # from here on it is none, although its files are there
        for path in target.fs.find(target.path):  # fs.rm would take a name with brackets for a pattern
            target.fs.rm_file(path)
        with contextlib.suppress(OSError):  # most stores have no folders
            target.fs.rmdir(target.path)


def staging_prefix(folder: Location) -> str:
    """What the temporary folders for uploads to `folder` are called, so that a later process knows a killed one's."""
    return f"ddpm-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}-"


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Every store raises its own errors: as OSError."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def discard_torn(folder: Location, before: int, whole: Sequence[int]) -> None:
    """Delete what interrupted deletions and uploads left of checkpoints before a step; `whole`: the steps to keep."""
    if isinstance(folder, Path):
        for discarded in folder.glob(".step-*.del"):
            shutil.rmtree(discarded, ignore_errors=True)
        return
    named = [int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    for torn in {number for number in named if number < before} - set(whole):
        if not is_there(folder / checkpoint_name(torn) / MANIFEST):  # an old listing may lack it
            delete_checkpoint(folder, torn)
