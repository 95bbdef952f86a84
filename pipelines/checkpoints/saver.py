"""Checkpoints saved by a thread of their own, while the training goes on."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import snapshot
from ddpm_core.commit import remove_leftovers
from ddpm_core.errors import InputError
from ddpm_core.training import TrainState
from pipelines.checkpoints.retention import prune
from pipelines.checkpoints.store import Record, commit_snapshot, saved_steps, staging_prefix
from pipelines.storage.lease import is_alive
from pipelines.storage.locations import Location


class Saver:
    """Saves a run's checkpoints in a thread of its own, one at a time, and deletes those that need not stay.

    folder: the run's, which is there already. keep_last, keep_every: the newest so many stay, and those whose step is a
    multiple; so does the one that mark_best() named. last_good: the step of the newest finished checkpoint, None if there is
    none. The CPU's memory holds one copy of the state for as long as the Saver lives.
    """

    def __init__(self, folder: Location, *, keep_last: int, keep_every: int | None = None) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._saved: dict[str, Any] | None = None
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        if isinstance(folder, Path):
            remove_leftovers(folder)
        else:
            prefix = staging_prefix(folder)
            for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
                process = left.name.removeprefix(prefix).partition("-")[0]
                if not (process.isdecimal() and is_alive(int(process))):  # what another saver is writing stays
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

        Waits for the save before it. Raises InputError if that one failed; nothing is saved then.
        """
        self._wait()
        self._saved = snapshot(state, self._saved)
        self._pending = self._thread.submit(self._write, self._saved, dict(config), list(history))

    def close(self) -> None:
        """Wait for the save under way. Raises InputError if it failed."""
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
