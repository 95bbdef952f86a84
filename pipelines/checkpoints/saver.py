"""Checkpoints written while the training goes on, on a local file system or in an object store, and which of them stay.

Locally a checkpoint appears by a rename and disappears by one. In an object store its manifest is uploaded last and
deleted first. Either way a manifest under a final name means that the whole is there.
"""

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import (
    NAME,
    Checkpoint,
    checkpoint_name,
    list_checkpoints,
    list_steps,
    open_checkpoint,
    snapshot,
    write_checkpoint,
)
from ddpm_core.commit import MANIFEST, remove_leftovers
from ddpm_core.errors import InputError
from ddpm_core.training import TrainState
from pipelines.runtime.locations import Location, commit_json, forget_listings

BEST = "best.json"  # in a run's folder: {"step": N}
MARK = ".mark.json"  # ends the names of others, of what nightly evaluations hold on to, one file a reason and protocol
Record = Mapping[str, Any]


def saved_steps(folder: Location) -> list[int]:
    """The steps of a run's finished checkpoints, ascending."""
    forget_listings(folder)
    return list_steps(folder)


def saved_checkpoints(folder: Location) -> list[Checkpoint]:
    """A run's finished checkpoints, by ascending step."""
    forget_listings(folder)
    return list_checkpoints(folder)


def made_at(checkpoint: Location) -> float:
    """When a checkpoint was finished, in seconds; 0 where it has been deleted meanwhile."""
    try:
        return float((checkpoint / MANIFEST).stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def newest_checkpoint(folder: Location, until: int) -> Checkpoint | None:
    """The last checkpoint up to step `until`; a longer run of the same configuration may have made later ones."""
    steps = [step for step in saved_steps(folder) if step <= until]
    return open_checkpoint(folder / checkpoint_name(steps[-1])) if steps else None


def mark_best(folder: Location, step: int, mark: str = BEST) -> None:
    """Have the run keep its checkpoint at `step` as the best, in place of the one that bore the mark before. InputError
    where it has been deleted already, with the earlier mark left as it is."""
    if step not in saved_steps(folder):
        raise InputError(
            f"the checkpoint at step {step} of {str(folder)!r} is the best, but it is no longer there: have the run keep "
            "more (--keep-last, --keep-every), or evaluate sooner"
        )
    commit_json(folder / mark, {"step": step})


def unmark(folder: Location, mark: str) -> None:
    """Have the run keep no checkpoint for the sake of a mark."""
    target = folder / mark
    with contextlib.suppress(FileNotFoundError):
        if isinstance(target, Path):
            target.unlink()
        else:
            target.fs.rm_file(target.path)


def marked_steps(folder: Location) -> set[int]:
    """The steps of the checkpoints that bear a mark. InputError where one cannot be read."""
    steps = set()
    forget_listings(folder)
    # A glob would take a folder's name with brackets for a pattern.
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != BEST and not path.name.endswith(MARK):
            continue
        try:
            steps.add(int(json.loads(path.read_text(encoding="utf-8"))["step"]))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"the mark {str(path)!r} is damaged ({error}): delete it and evaluate the run again"
            ) from error
    return steps


def to_delete(steps: Sequence[int], keep_last: int, keep_every: int | None, marked: Collection[int]) -> list[int]:
    """The steps that are neither among the last `keep_last`, nor a multiple of `keep_every`, nor marked; ascending."""
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep_last is {keep_last}, keep_every {keep_every}: give positive numbers")
    kept = {*marked, *sorted(steps)[-keep_last:], *(step for step in steps if keep_every and step % keep_every == 0)}
    return sorted(set(steps) - kept)


def commit_snapshot(
    folder: Location, saved: Mapping[str, Any], config: Mapping[str, Any], history: Sequence[Record]
) -> None:
    """Commit a snapshot as folder/step-00001234. OSError where that fails, with every other checkpoint left intact."""
    if isinstance(folder, Path):
        if not folder.is_dir():  # an unmounted disk, for instance: a folder made anew would hide that
            raise FileNotFoundError(errno.ENOENT, "the run's folder is gone", str(folder))
        write_checkpoint(folder, saved, config, history)
        return
    with tempfile.TemporaryDirectory(prefix=_staging(folder)) as temporary, _store_errors():
        local = write_checkpoint(Path(temporary), saved, config, history)
        target = folder / local.path.name
        _take_manifest_away(target)  # of an earlier one of this step, before its files are replaced
        for name in [*local.files, MANIFEST]:
            target.fs.put_file(str(local.path / name), (target / name).path)


def delete_checkpoint(folder: Location, step: int) -> None:
    """Delete a checkpoint. Whatever stops this, a reader finds it whole or not at all. OSError where that fails."""
    target = folder / checkpoint_name(step)
    if isinstance(target, Path):
        discarded = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.del")
        with contextlib.suppress(FileNotFoundError):
            target.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)  # prune() tries again
        return
    with _store_errors(), contextlib.suppress(FileNotFoundError):
        forget_listings(target)
        _take_manifest_away(target)
        for path in target.fs.find(target.path):  # fs.rm would take a name with brackets for a pattern
            target.fs.rm_file(path)
        with contextlib.suppress(OSError):  # most stores have no folders
            target.fs.rmdir(target.path)


def _staging(folder: Location) -> str:
    """What the temporary folders for uploads to `folder` are called, so that a later process knows a killed one's."""
    return f"ddpm-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}-"


def _take_manifest_away(target: Any) -> None:
    """From here on an object store's checkpoint is not one, although its files are there."""
    with contextlib.suppress(FileNotFoundError):
        target.fs.rm_file((target / MANIFEST).path)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Every store raises its own errors: as OSError."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def prune(folder: Location, step: int, keep_last: int, keep_every: int | None) -> None:
    """Delete the checkpoints before `step` that need not stay, and what interrupted deletions and uploads left there.
    Those after it are a longer run's, which counts them itself. OSError where that fails."""
    with _store_errors():
        steps = [saved for saved in saved_steps(folder) if saved <= step]
        if isinstance(folder, Path):
            for discarded in folder.glob(".step-*.del"):
                shutil.rmtree(discarded, ignore_errors=True)
        else:
            named = [int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
            for torn in {number for number in named if number < step} - set(steps):
                delete_checkpoint(folder, torn)
        for old in to_delete(steps, keep_last, keep_every, marked_steps(folder)):
            delete_checkpoint(folder, old)


class Saver:
    """Saves a run's checkpoints in a thread of its own, one at a time, and deletes those that need not stay.

    folder: the run's, which is there already.

    keep_last, keep_every: the newest so many stay, and those whose step is a multiple; so does the one that mark_best()
    named. The CPU's memory holds one copy of the state for as long as the Saver lives.

    seconds_blocked: how long the last save() held its caller up. last_good: the step of the newest finished checkpoint,
    None where there is none.
    """

    def __init__(self, folder: Location, *, keep_last: int, keep_every: int | None = None) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.seconds_blocked = 0.0
        self._saved: dict[str, Any] | None = None
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        if isinstance(folder, Path):
            remove_leftovers(folder)
        else:
            for left in Path(tempfile.gettempdir()).glob(f"{_staging(folder)}*"):
                shutil.rmtree(left, ignore_errors=True)
        self.last_good = max(saved_steps(folder), default=None)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close()
        except InputError:
            if kind is None:  # else the error that ended the training is the one to show
                raise

    def save(self, state: TrainState, config: Mapping[str, Any], history: Sequence[Record]) -> None:
        """Copy `state` and return; the copy is then written and the older checkpoints pruned. history: all records of
        the run so far, which nobody changes any more.

        Waits for the save before it. InputError where that one failed; nothing is saved then.
        """
        started = time.monotonic()
        try:
            self._wait()
            self._saved = snapshot(state, self._saved)
            self._pending = self._thread.submit(self._write, self._saved, dict(config), list(history))
        finally:
            self.seconds_blocked = time.monotonic() - started

    def close(self) -> None:
        """Wait for the save under way. InputError where it failed."""
        self._thread.shutdown(wait=True)
        self._wait()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, saved: Mapping[str, Any], config: Mapping[str, Any], history: Sequence[Record]) -> None:
        step = int(saved["step"])
        doing = f"save step {step:,}"
        try:
            commit_snapshot(self.folder, saved, config, history)
            self.last_good = step
            doing = "delete older checkpoints"
            prune(self.folder, step, self.keep_last, self.keep_every)
        except OSError as error:
            good = "there is no good checkpoint yet"
            if self.last_good is not None:
                good = f"the last good checkpoint is step {self.last_good:,}"
            reason = str(error) or type(error).__name__
            raise InputError(
                f"run {str(self.folder)!r} could not {doing} ({reason}); {good}: make room or repair the storage, then "
                "give the same command again"
            ) from error
