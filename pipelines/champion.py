"""Which checkpoint bears the name of the best, under one protocol.

The alias moves to the checkpoint with the lowest distance where that one's interval lies below that of the alias's, or
where it is an earlier step of the same training and no worse; else two nights' noise would move it to and fro. It starts
anew where the protocol changed or the alias's checkpoint is gone.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_core.checkpoint import Checkpoint, open_checkpoint
from pipelines.evaluate import keep_best
from pipelines.evaluator import Evaluator
from pipelines.locations import Location
from pipelines.progress import Say
from pipelines.registry import Registry
from pipelines.results import Evaluation, describe_values
from pipelines.saving import ALIAS, made_at, mark_best, unmark
from pipelines.tracking import Tracker, code_version

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
        return self.evaluator.name

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
    if new.interval is None or old.interval is None:
        return new.distance < old.distance
    return new.interval[1] < old.interval[0]


def crown(tracker: Tracker, experiment: str, groups: Sequence[Sequence[Measured]], say: Say) -> list[Champion]:
    """Have the aliases point at the best and the newest checkpoint of each group, whose evaluations share a protocol and
    whose checkpoints are still there."""
    groups = [group for group in groups if group]
    names = [NO_NAME.sub("-", f"{experiment}-{group[0][1].protocol.reference}") for group in groups]
    shared = Counter(names)
    champions = []
    for name, group in zip(names, groups, strict=True):
        protocol = group[0][1].protocol
        if shared[name] > 1:  # two protocols never share an alias
            name = f"{name}-{protocol.fingerprint[:6]}"
        registry = Registry(tracker.client, name)
        alias = f"best-{protocol.distance.replace('_', '-')}"
        finite = [each for each in group if math.isfinite(each[1].distance)]
        if finite:
            champions.append(_crown(registry, alias, finite, say))
        newest = max(group, key=lambda each: made_at(_path(each)))
        _point(registry, "newest", newest)  # MLflow keeps "latest" for itself
    return champions


def _crown(registry: Registry, alias: str, group: Sequence[Measured], say: Say) -> Champion:
    best = min(group, key=lambda each: (each[1].distance, each[1].step))
    bearer = registry.tags(alias)
    held = [each for each in group if _identity(each).items() <= bearer.items()]
    if held and (held[0] is best or not replaces(best[1], held[0][1], held[0][0].name == best[0].name)):
        best = held[0]
        before = None
    else:
        before = f"step {int(bearer['ddpm.step']):,} of {bearer['ddpm.run']}" if bearer else ""
    _point(registry, alias, best)
    evaluator, evaluation = best
    for other in {each[0].name: each[0] for each in group}.values():
        folder = other.checkpoints[0].path.parent
        keep_best(other.folder(evaluation.protocol), folder, say)
        if other is evaluator:
            mark_best(folder, evaluation.step, ALIAS)
        else:
            unmark(folder, ALIAS)
    return Champion(registry.name, alias, evaluator, open_checkpoint(_path(best)), evaluation, before)


def _path(measured: Measured) -> Location:
    """Of the checkpoint itself."""
    evaluator, evaluation = measured
    return evaluator.checkpoints[0].path.parent / evaluation.folder.name


def _identity(measured: Measured) -> dict[str, str]:
    """By which a model version is known again."""
    evaluator, evaluation = measured
    return {
        "ddpm.run": evaluator.name,
        "ddpm.step": str(evaluation.step),
        "ddpm.protocol": evaluation.protocol.fingerprint,
    }


def _point(registry: Registry, alias: str, measured: Measured) -> None:
    evaluator, evaluation = measured
    run_id, model_id = evaluator.model(open_checkpoint(_path(measured)), evaluation.protocol)
    tags = {"ddpm.data": evaluation.protocol.reference, "ddpm.code_version": code_version()}
    registry.point(alias, model_id, run_id, {**_identity(measured), **tags})
