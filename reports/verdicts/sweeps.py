"""A sweep's trials beside their results, and what they say together.

Trials measured under different protocols are never compared. A trial counts by its last evaluated checkpoint, not by its
luckiest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ddpm_core import verdicts
from ddpm_core.verdicts import Measurement, Standing
from reports.formatting import fixed
from reports.records.entities import EvaluationRecord, ExperimentRecord, RunRecord, SweepRecord, TrialRecord
from reports.verdicts.ranking import Entry, Ranking
from reports.verdicts.wording import metric_name


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial and the checkpoint that it counts by."""

    trial: TrialRecord
    entry: Entry

    @property
    def measurement(self) -> Measurement:
        checkpoint = self.entry.checkpoint
        return Measurement(self.trial.point, checkpoint.distance, checkpoint.interval)


@dataclass(frozen=True, kw_only=True)
class TrialRanking:
    """The trials of one protocol, the lowest distance first; `recorded` is the sweep's own conclusion, if it is of these."""

    results: tuple[TrialResult, ...]
    recorded: str = ""

    @property
    def ranking(self) -> Ranking:
        entries = tuple(result.entry for result in self.results)
        return Ranking(protocol=entries[0].evaluation.protocol, entries=entries)

    @property
    def measurements(self) -> list[Measurement]:
        return [result.measurement for result in self.results]

    @property
    def standings(self) -> list[Standing]:
        """The points over their seeds, the lowest mean first."""
        return verdicts.standings(self.measurements)

    @property
    def conclusion(self) -> str:
        """Which point wins and how sure that is: the sweep's own words, which know the paper's choice, or the same without."""
        if self.recorded:
            return self.recorded
        comparisons = verdicts.compare_with_best(self.standings, self.measurements)
        name = metric_name(self.ranking.protocol.distance)
        return verdicts.conclude(self.standings, comparisons, name) + _steps_caveat(self.results)


@dataclass(frozen=True, kw_only=True)
class SweepAnalysis:
    """A sweep's trials by protocol; `without` are those that have no finite result, each with the reason."""

    sweep: SweepRecord
    rankings: tuple[TrialRanking, ...]
    without: tuple[tuple[TrialRecord, str], ...]


def analyse(sweep: SweepRecord, record: ExperimentRecord) -> SweepAnalysis:
    """Join the trials of a sweep with the training runs and evaluations of the experiment."""
    evaluated = {evaluation.run_id: (run, evaluation) for run in record.runs for evaluation in run.evaluations}
    by_protocol: dict[str, list[TrialResult]] = {}
    without: list[tuple[TrialRecord, str]] = []
    for trial in sweep.trials:
        reason = _unusable(trial, evaluated)
        if reason:
            without.append((trial, reason))
            continue
        run, evaluation = evaluated[str(trial.evaluation_run_id)]
        entry = Entry(run=run, evaluation=evaluation, checkpoint=evaluation.checkpoints[-1])
        by_protocol.setdefault(evaluation.protocol.fingerprint, []).append(TrialResult(trial=trial, entry=entry))
    recorded = sweep.conclusion if len(by_protocol) == 1 else ""
    rankings = [
        TrialRanking(
            results=tuple(sorted(results, key=lambda result: (result.entry.checkpoint.distance, result.trial.label))),
            recorded=recorded,
        )
        for _, results in sorted(by_protocol.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return SweepAnalysis(sweep=sweep, rankings=tuple(rankings), without=tuple(without))


def _steps_caveat(results: tuple[TrialResult, ...]) -> str:
    steps = sorted({result.entry.checkpoint.step for result in results})
    if len(steps) == 1:
        return ""
    return (
        f". The trials were measured at different steps ({steps[0]:,} to {steps[-1]:,}), "
        "so the difference is not that of the settings alone"
    )


def _unusable(trial: TrialRecord, evaluated: Mapping[str, tuple[RunRecord, EvaluationRecord]]) -> str:
    """Why a trial cannot be ranked, empty if it can."""
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
