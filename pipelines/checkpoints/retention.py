"""Which of a run's checkpoints stay: the newest, those at regular steps, and those that bear a mark."""

import contextlib
from collections.abc import Collection, Sequence

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.errors import InputError
from ddpm_core.ranges import Count
from pipelines.checkpoints.averages import keep_averages
from pipelines.checkpoints.store import delete_checkpoint, discard_torn, saved_steps, store_errors
from pipelines.storage.locations import Location, commit_json, delete, entries

BEST = "best.json"  # in a run's folder: {"step": N}
MARK = ".mark.json"  # ends the names of other marks: those of nightly evaluations, one file a reason and protocol


class Mark(TypedDict):
    """What a mark holds."""

    step: Count[int]


def mark_best(folder: Location, step: int, mark: str = BEST) -> None:
    """Have the run keep its checkpoint at `step` as the best, in place of the one that bore the mark before. Raises InputError
    if it has been deleted already, with the earlier mark left as it is."""
    if step not in saved_steps(folder):
        raise InputError(
            f"the checkpoint at step {step} of {str(folder)!r} is the best, but it is no longer there: have the run keep "
            "more (--keep-last, --keep-every), or evaluate sooner"
        )
    commit_json(folder / mark, {"step": step})


def unmark(folder: Location, mark: str) -> None:
    """Have the run keep no checkpoint for the sake of a mark."""
    delete(folder / mark)


def marked_steps(folder: Location) -> set[int]:
    """The steps of the checkpoints that bear a mark. Raises InputError if one cannot be read."""
    steps = set()
    for path in entries(folder):  # a glob would take a folder's name with brackets for a pattern
        if path.name != BEST and not path.name.endswith(MARK):
            continue
        with contextlib.suppress(FileNotFoundError):
            mark = typed.read_json(path, Mark, what="the mark", advice="delete it and evaluate the run again")
            steps.add(mark["step"])
    return steps


def to_delete(steps: Sequence[int], keep_last: int, keep_every: int | None, marked: Collection[int]) -> list[int]:
    """The steps that are neither among the last `keep_last`, nor a multiple of `keep_every`, nor marked; ascending."""
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep_last is {keep_last}, keep_every {keep_every}: give positive numbers")
    kept = {*marked, *sorted(steps)[-keep_last:], *(step for step in steps if keep_every and step % keep_every == 0)}
    return sorted(set(steps) - kept)


def prune(folder: Location, step: int, keep_last: int, keep_every: int | None) -> None:
    """Delete the checkpoints before `step` that need not stay, but for averages that EMA of any length is made of, and what
    interrupted deletions and uploads left there.
    Those after it are a longer run's, which counts them itself. Raises OSError if that fails."""
    with store_errors():
        steps = [saved for saved in saved_steps(folder) if saved <= step]
        discard_torn(folder, step, steps)
        gone = to_delete(steps, keep_last, keep_every, marked_steps(folder))
        keep_averages(folder, steps, gone)
        for old in gone:
            delete_checkpoint(folder, old)
