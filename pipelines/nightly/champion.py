"""Which checkpoint bears the name of the best, under one protocol.

A registered model stands for an experiment, a data set and a protocol, so that nothing else is ever compared under its
aliases. The best one's alias moves to the checkpoint with the lowest distance where that one's interval lies below that of
the alias's, or where it is an earlier step of the same training and no worse; else two nights' noise would move it to and
fro. It starts anew where the alias's checkpoint is gone.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from ddpm_core.verdicts import intervals_overlap
from pipelines.checkpoints.retention import MARK, mark_best, unmark
from pipelines.checkpoints.store import made_at
from pipelines.evaluate.driver import Evaluator
from pipelines.evaluate.evaluation import Evaluation, describe_values, read_evaluation
from pipelines.runtime.layout import Storage
from pipelines.runtime.locations import Location, location
from pipelines.runtime.progress import Say
from pipelines.tracking.registry import Registry
from pipelines.tracking.tracker import Tracker, code_version

NO_NAME = re.compile(r"[/:]")  # what MLflow takes in no model's name
Measured = tuple[Evaluator, Evaluation]


@dataclass(frozen=True)
class Champion:
    """The checkpoint that an alias of a registered model points at. before: what it pointed at, where it moved, empty where
    there was none. again: its evaluation on samples that it was not chosen by."""

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
        """In a sentence."""
        moved = "" if self.before is None else f" (moved from {self.before})" if self.before else " (new)"
        chosen = self.again or self.evaluation
        noise = "on samples it was not chosen by" if self.again else "on the samples it was chosen by"
        return (
            f"models:/{self.model}@{self.alias} is step {self.evaluation.step:,} of {self.run}{moved}, with "
            f"{describe_values(chosen.values, chosen.protocol)} {noise}; protocol {self.evaluation.protocol.fingerprint}: "
            f"{self.evaluation.protocol.describe()}"
        )


def replaces(new: Evaluation, old: Evaluation, same_run: bool) -> bool:
    """Whether the alias moves from one checkpoint to another of a lower or equal distance."""
    if same_run and new.step < old.step:
        return True
    overlap = intervals_overlap(new.interval, old.interval)
    return new.distance < old.distance if overlap is None else not overlap


def hold(evaluator: Evaluator, kept: Sequence[Evaluation]) -> None:
    """Have a training keep the best of its checkpoints that are there, by evaluations of one protocol. What an alias may
    come to point at must not be deleted before the night is over."""
    finite = [evaluation for evaluation in kept if math.isfinite(evaluation.distance)]
    if finite:
        best = min(finite, key=lambda evaluation: (evaluation.distance, evaluation.step))
        mark_best(_folder(evaluator), best.step, f"lowest-{best.protocol.fingerprint}{MARK}")


def crown(
    tracker: Tracker, experiment: str, storage: Storage[Path], group: Sequence[Measured], say: Say
) -> Champion | None:
    """Have the aliases point at the best and at the newest checkpoint of some that are there, measured under one protocol;
    the best, None where that is none of these. Beside them stands what the alias points at already."""
    protocol = group[0][1].protocol
    name = NO_NAME.sub("-", f"{experiment}-{protocol.reference}-{protocol.fingerprint[:6]}")
    registry = Registry(tracker.client, name)
    alias = f"best-{protocol.distance.replace('_', '-')}"
    newest = max(group, key=lambda each: made_at(_path(each)))
    _point(registry, "newest", newest)  # MLflow keeps "latest" for itself
    finite = [each for each in group if math.isfinite(each[1].distance)]
    if not finite:
        return None
    best = min(finite, key=lambda each: (each[1].distance, each[1].step))
    bearer = registry.tags(alias)
    before: str | None = f"step {int(bearer['ddpm.step']):,} of {bearer['ddpm.run']}" if bearer else ""
    held = next((each for each in finite if _identity(each).items() <= bearer.items()), None)
    if held is not None:
        if held is best or not replaces(best[1], held[1], held[0].subject.run.name == best[0].subject.run.name):
            best, before = held, None
    elif bearer and not _is_gone(bearer["ddpm.path"]):  # of a training that was not looked at
        theirs = _elsewhere(storage, bearer, protocol)
        if theirs is None or theirs.distance <= best[1].distance or not replaces(best[1], theirs, same_run=False):
            say(f"nightly: models:/{name}@{alias} stays at {before}, which is not among what was looked at")
            return None
    evaluator, evaluation = best
    mark = f"alias-{protocol.fingerprint}{MARK}"
    mark_best(_folder(evaluator), evaluation.step, mark)  # before the alias: what that points at is always kept
    _point(registry, alias, best)
    for other in {each[0].subject.run.name: each[0] for each in group}.values():
        if other is not evaluator:
            unmark(_folder(other), mark)
    return Champion(name, alias, evaluator, open_checkpoint(_path(best)), evaluation, before)


def _is_gone(path: str) -> bool:
    """Whether a checkpoint is known to be deleted: its training's folder is there, and it is not."""
    try:
        checkpoint = location(path, option="the model's path")
        return checkpoint.parent.is_dir() and not (checkpoint / MANIFEST).is_file()
    except Exception:  # every store raises its own: not known, then
        return False


def _elsewhere(storage: Storage[Path], bearer: dict[str, str], protocol: Protocol) -> Evaluation | None:
    """The result of a checkpoint of another training in the same storage, None where it cannot be read."""
    folder = storage.run(bearer["ddpm.run"]).results(protocol.fingerprint)
    try:
        return read_evaluation(folder / checkpoint_name(int(bearer["ddpm.step"])))
    except InputError:
        return None


def _folder(evaluator: Evaluator) -> Location:
    """Of a training's checkpoints."""
    return evaluator.subject.run.folder


def _path(measured: Measured) -> Location:
    """Of the checkpoint itself."""
    evaluator, evaluation = measured
    return _folder(evaluator) / evaluation.folder.name


def _identity(measured: Measured) -> dict[str, str]:
    """By which a model version is known again."""
    evaluator, evaluation = measured
    return {"ddpm.run": evaluator.subject.run.name, "ddpm.step": str(evaluation.step)}


def _point(registry: Registry, alias: str, measured: Measured) -> None:
    evaluator, evaluation = measured
    run_id, model_id = evaluator.records.model(open_checkpoint(_path(measured)), evaluation.protocol)
    tags = {
        "ddpm.protocol": evaluation.protocol.fingerprint,
        "ddpm.data": evaluation.protocol.reference,
        "ddpm.path": str(_path(measured)),
        "ddpm.code_version": code_version(),
    }
    registry.set_alias(alias, model_id, run_id, {**_identity(measured), **tags})
