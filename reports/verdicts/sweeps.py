"""A sweep's trials beside their results, and what they say together. Trials measured under different
protocols are never compared; a trial counts by its last evaluated checkpoint, not by its luckiest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from reports.records.entities import Evaluation, ExperimentRecord, Sweep, TrainingRun, Trial
from reports.verdicts.conclusions import metric_name
from reports.verdicts.formatting import decimals_for, fixed, listed, number
from reports.verdicts.ranking import Entry, Ranking, intervals_overlap


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    trial: Trial
    entry: Entry


@dataclass(frozen=True, kw_only=True)
class TrialRanking:
    """The trials of one protocol, the lowest distance first, and the conclusion as a sentence."""

    results: tuple[TrialResult, ...]
    conclusion: str

    @property
    def ranking(self) -> Ranking:
        entries = tuple(result.entry for result in self.results)
        return Ranking(protocol=entries[0].evaluation.protocol, entries=entries)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """`without` are the trials that have no finite result, each with the reason."""

    sweep: Sweep
    rankings: tuple[TrialRanking, ...]
    without: tuple[tuple[Trial, str], ...]


def analyse(sweep: Sweep, record: ExperimentRecord) -> SweepResult:
    """Join the trials of a sweep with the training runs and evaluations of the experiment."""
    evaluated = {evaluation.run_id: (run, evaluation) for run in record.runs for evaluation in run.evaluations}
    of_protocol: dict[str, list[TrialResult]] = {}
    without: list[tuple[Trial, str]] = []
    for trial in sweep.trials:
        reason = _unusable(trial, evaluated)
        if reason:
            without.append((trial, reason))
            continue
        run, evaluation = evaluated[str(trial.evaluation_run_id)]
        entry = Entry(run=run, evaluation=evaluation, checkpoint=evaluation.checkpoints[-1])
        of_protocol.setdefault(evaluation.protocol.fingerprint, []).append(TrialResult(trial=trial, entry=entry))
    rankings = []
    for _, found in sorted(of_protocol.items(), key=lambda item: (-len(item[1]), item[0])):
        results = tuple(sorted(found, key=lambda result: (result.entry.checkpoint.distance, result.trial.label)))
        rankings.append(TrialRanking(results=results, conclusion=conclude(results)))
    if sweep.conclusion and len(rankings) == 1:  # it knows of seeds and of the paper
        rankings = [replace(rankings[0], conclusion=sweep.conclusion)]
    return SweepResult(sweep=sweep, rankings=tuple(rankings), without=tuple(without))


def conclude(results: tuple[TrialResult, ...]) -> str:
    """Which trial has the lower distance, by how much, and whether the intervals tell the first two apart."""
    first = results[0]
    name = metric_name(first.entry.evaluation.protocol.distance)
    if len(results) == 1:
        return f"Only {first.trial.label} was measured under this protocol: there is nothing to compare it with."
    second = results[1]
    low, high = first.entry.checkpoint, second.entry.checkpoint
    gap = high.distance - low.distance
    share = f" ({number(100 * gap / high.distance, 2)} %)" if high.distance > 0 else ""
    digits = decimals_for(low.distance, low.low, low.high)
    if gap == 0:
        return f"{first.trial.label} and {second.trial.label} have the same {name}."
    degree = "lower" if len(results) == 2 else "lowest"
    text = f"{first.trial.label} has the {degree} {name}, {fixed(gap, digits)}{share} below {second.trial.label}"
    overlap = intervals_overlap(low, high)
    if overlap is None:
        text += "; without both intervals it is not known whether that tells them apart."
    elif overlap:
        text += "; the intervals overlap, so this sweep does not tell them apart."
    else:
        text += "; the intervals do not overlap, so this sweep tells them apart."
    if overlap and len(results) > 2:
        close = [r.trial.label for r in results[2:] if intervals_overlap(low, r.entry.checkpoint)]
        text += f" Nor does it for {listed(close)}." if close else ""
    return text + _steps_caveat(results)


def _steps_caveat(results: tuple[TrialResult, ...]) -> str:
    steps = sorted({result.entry.checkpoint.step for result in results})
    if len(steps) == 1:
        return ""
    return (
        f" The trials were measured at different steps ({steps[0]:,} to {steps[-1]:,}), "
        "so the difference is not that of the settings alone."
    )


def _unusable(trial: Trial, evaluated: Mapping[str, tuple[TrainingRun, Evaluation]]) -> str:
    if trial.status != "finished":
        return f"{trial.status}: {trial.reason}" if trial.reason else trial.status
    if trial.evaluation_run_id is None:
        return "not measured"
    if trial.evaluation_run_id not in evaluated:
        return "not measured: its evaluation is not in this experiment or cannot be read"
    checkpoints = evaluated[trial.evaluation_run_id][1].checkpoints
    if not checkpoints:
        return "not measured: its evaluation has no result yet"
    if not math.isfinite(checkpoints[-1].distance):
        return f"measured as {fixed(checkpoints[-1].distance, 0)}"
    return ""
