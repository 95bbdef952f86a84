"""Which checkpoint bears the name of the best, under one protocol.

A registered model stands for an experiment, a data set and a protocol, so that nothing else is ever compared under its
aliases. The alias of the best moves to the checkpoint with the lowest distance if that one's interval lies below that of the
checkpoint it points at, or if it is an earlier step of the same training and no worse; else the noise of two nights would
move it to and fro. It starts anew if its checkpoint is deleted.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from ddpm_core.records import CODE_VERSION_TAG, DATA_TAG, PATH_TAG, PROTOCOL_TAG, RUN_TAG, STEP_TAG
from ddpm_core.verdicts import intervals_overlap
from pipelines.checkpoints.retention import MARK, mark_best, unmark
from pipelines.checkpoints.store import made_at
from pipelines.evaluate.driver import Evaluator
from pipelines.evaluate.evaluation import Evaluation, describe_distance, describe_values, read_evaluation
from pipelines.runtime.progress import Say
from pipelines.storage.layout import Storage
from pipelines.storage.locations import Location, is_there, location
from pipelines.tracking.origin import code_version
from pipelines.tracking.registry import Registry
from pipelines.tracking.tracker import Tracker

NOT_IN_NAMES = re.compile(r"[/:']")  # MLflow takes none of them in a model's name or in a search for it


@dataclass(frozen=True)
class Candidate:
    """A measured checkpoint that is still there."""

    evaluator: Evaluator
    evaluation: Evaluation

    @property
    def run(self) -> str:
        return self.evaluator.subject.run.name

    @property
    def folder(self) -> Location:
        """The folder of its training's checkpoints."""
        return self.evaluator.subject.run.folder

    @property
    def path(self) -> Location:
        return self.folder / self.evaluation.folder.name

    @property
    def identity(self) -> dict[str, str]:
        """The tags by which its model version is known again."""
        return {RUN_TAG: self.run, STEP_TAG: str(self.evaluation.step)}


@dataclass(frozen=True)
class Champion:
    """The checkpoint that an alias of a registered model points at. before: what it pointed at if it moved, empty if it is
    new, None if it did not move. again: the checkpoint's evaluation on samples that it was not chosen by."""

    model: str
    alias: str
    evaluator: Evaluator
    checkpoint: Checkpoint
    evaluation: Evaluation
    before: str | None
    again: Evaluation | None = None

    @property
    def run(self) -> str:
        return self.evaluator.subject.run.name

    def describe(self) -> str:
        """The champion in a sentence."""
        moved = "" if self.before is None else f" (moved from {self.before})" if self.before else " (new)"
        shown = self.again or self.evaluation
        noise = "on samples it was not chosen by" if self.again else "on the samples it was chosen by"
        return (
            f"models:/{self.model}@{self.alias} is step {self.evaluation.step:,} of {self.run}{moved}, with "
            f"{describe_values(shown.values, shown.protocol)} {noise}; protocol {self.evaluation.protocol.fingerprint}: "
            f"{self.evaluation.protocol.describe()}"
        )


def mark_lowest(evaluator: Evaluator, evaluations: Sequence[Evaluation]) -> None:
    """Have a training keep its best checkpoint, by evaluations of one protocol whose checkpoints are there. What an alias may
    come to point at must not be deleted before the night is over."""
    finite = [evaluation for evaluation in evaluations if math.isfinite(evaluation.distance)]
    if finite:
        best = min(finite, key=lambda evaluation: (evaluation.distance, evaluation.step))
        mark_best(evaluator.subject.run.folder, best.step, f"lowest-{best.protocol.fingerprint}{MARK}")


def update_alias(
    tracker: Tracker, experiment: str, storage: Storage, candidates: Sequence[Candidate], say: Say
) -> Champion | None:
    """Have the alias of the best point at the best of some checkpoints, measured under one protocol, and `newest` at the newest.
    The former, None if that alias stays at a checkpoint that is none of these."""
    protocol = candidates[0].evaluation.protocol
    model = NOT_IN_NAMES.sub("-", f"{experiment}-{protocol.reference}-{protocol.fingerprint[:6]}")
    registry = Registry(tracker.client, model)
    set_alias(registry, "newest", max(candidates, key=lambda each: made_at(each.path)))  # "latest" is MLflow's own
    finite = [each for each in candidates if math.isfinite(each.evaluation.distance)]
    if not finite:
        return None
    alias = f"best-{protocol.distance.replace('_', '-')}"
    present = registry.tags(alias)
    before = f"step {int(present[STEP_TAG]):,} of {present[RUN_TAG]}" if present else ""
    chosen, why = choose(finite, present, storage)
    if chosen is None:
        say(f"nightly: models:/{model}@{alias} stays at {before}, which is not among what was looked at")
        return None
    mark = f"alias-{protocol.fingerprint}{MARK}"
    mark_best(chosen.folder, chosen.evaluation.step, mark)  # before the alias moves: what it points at is always kept
    set_alias(registry, alias, chosen, why)
    for folder in {each.run: each.folder for each in candidates if each.run != chosen.run}.values():
        unmark(folder, mark)
    stayed = chosen.identity.items() <= present.items()
    checkpoint = open_checkpoint(chosen.path)
    return Champion(model, alias, chosen.evaluator, checkpoint, chosen.evaluation, None if stayed else before)


def choose(
    candidates: Sequence[Candidate], present: Mapping[str, str], storage: Storage
) -> tuple[Candidate | None, str]:
    """(what the alias of the best is to point at, None if it stays at a checkpoint that is not among the candidates; why it
    moves, empty if it stays). present: the tags of the version it points at, none if it is new."""
    best = min(candidates, key=lambda each: (each.evaluation.distance, each.evaluation.step))
    if not present:
        return best, "it has the lowest distance of the first that were measured under this protocol"
    for holder in candidates:
        if holder.identity.items() <= present.items():
            why = replaces(best.evaluation, holder.evaluation, same_run=best.run == holder.run)
            return (best, why) if why else (holder, "")
    if is_deleted(present[PATH_TAG]):
        return best, "the checkpoint before it was deleted"
    holds = result_of(storage, present, best.evaluation.protocol)  # of a training that was not looked at
    if holds is None or holds.distance <= best.evaluation.distance:
        return None, ""
    why = replaces(best.evaluation, holds, same_run=False)
    return (best, why) if why else (None, "")


def replaces(new: Evaluation, old: Evaluation, same_run: bool) -> str:
    """Why the alias moves from one checkpoint to another of a lower or equal distance, empty if it does not."""
    numbers = f"{describe_distance(new)} against {describe_distance(old)}"
    if same_run and new.step < old.step:
        return f"it is an earlier step of the same training and no worse: {numbers}"
    overlap = intervals_overlap(new.interval, old.interval)
    if overlap is None:
        return f"its distance is lower: {numbers}" if new.distance < old.distance else ""
    return "" if overlap else f"its interval lies below: {numbers}"


def is_deleted(path: str) -> bool:
    """Whether a checkpoint is known to be deleted: its training's folder is there, and it is not."""
    try:
        checkpoint = location(path, option="the model's path")
        return checkpoint.parent.is_dir() and not is_there(checkpoint / MANIFEST)
    except Exception:  # every store raises its own: not known, then
        return False


def result_of(storage: Storage, version: Mapping[str, str], protocol: Protocol) -> Evaluation | None:
    """The result of a checkpoint in this storage, by the tags of its model version; None if it cannot be read."""
    folder = storage.run(version[RUN_TAG]).results(protocol.fingerprint)
    try:
        return read_evaluation(folder / checkpoint_name(int(version[STEP_TAG])))
    except InputError:
        return None


def set_alias(registry: Registry, alias: str, candidate: Candidate, why: str = "") -> None:
    """Have an alias point at a checkpoint's model, with what it stands for as tags. why: as its version and the one that it
    leaves say, if it moves and that is worth saying."""
    protocol = candidate.evaluation.protocol
    run_id, model_id = candidate.evaluator.records.model(open_checkpoint(candidate.path), protocol)
    tags = {
        **candidate.identity,
        PROTOCOL_TAG: protocol.fingerprint,
        DATA_TAG: protocol.reference,
        PATH_TAG: str(candidate.path),
        CODE_VERSION_TAG: code_version(),
    }
    what = f"step {candidate.evaluation.step:,} of {candidate.run}"
    registry.set_alias(alias, model_id, run_id, tags, (what, why) if why else None)
