"""Which checkpoint is best, and which cannot be told apart from it. Only results of the same protocol are
ever compared: there is one ranking per protocol fingerprint."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from ddpm_core.protocol import Protocol
from ddpm_core.verdicts import intervals_overlap
from reports.records.entities import Checkpoint, Evaluation, TrainingRun


class Verdict(StrEnum):
    """How a checkpoint stands to the best one of its protocol."""

    BEST = "best"
    INDISTINGUISHABLE = "not distinguishable"
    HIGHER = "higher"
    NO_INTERVAL = "no interval, cannot be told"
    NOT_FINITE = "not a finite number"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A measured checkpoint and where it came from."""

    run: TrainingRun
    evaluation: Evaluation
    checkpoint: Checkpoint

    @property
    def images_seen(self) -> int | None:
        return self.run.images_seen(self.checkpoint.step)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Every checkpoint measured under one protocol, the lowest distance first; `unranked` have no finite
    value."""

    protocol: Protocol
    entries: tuple[Entry, ...]
    unranked: tuple[Entry, ...] = ()

    @property
    def best(self) -> Entry | None:
        return self.entries[0] if self.entries else None

    def verdict(self, entry: Entry) -> Verdict:
        best = self.best
        if best is None or not math.isfinite(entry.checkpoint.distance):
            return Verdict.NOT_FINITE
        if entry is best:
            return Verdict.BEST
        overlap = intervals_overlap(best.checkpoint.interval, entry.checkpoint.interval)
        if overlap is None:
            return Verdict.NO_INTERVAL
        return Verdict.INDISTINGUISHABLE if overlap else Verdict.HIGHER

    def count(self, verdict: Verdict) -> int:
        return sum(self.verdict(entry) is verdict for entry in self.entries)


def rank(runs: Iterable[TrainingRun]) -> tuple[Ranking, ...]:
    """One ranking per protocol. First the one to lead the report: against the training set, FID before other distances, on
    the samples that checkpoints are chosen by, then the most samples, then the most checkpoints; ties by fingerprint, so
    that the order never depends on the store's."""
    measured: dict[str, dict[tuple[str, int], Entry]] = {}
    protocols: dict[str, Protocol] = {}
    for run in runs:
        for evaluation in run.evaluations:
            mark = evaluation.protocol.fingerprint
            protocols[mark] = evaluation.protocol
            group = measured.setdefault(mark, {})
            for checkpoint in evaluation.checkpoints:
                # A checkpoint evaluated twice under one protocol counts once, as measured last.
                group[run.run_id, checkpoint.step] = Entry(run=run, evaluation=evaluation, checkpoint=checkpoint)
    rankings = []
    for mark, group in measured.items():
        finite = [entry for entry in group.values() if math.isfinite(entry.checkpoint.distance)]
        finite.sort(key=lambda entry: (entry.checkpoint.distance, entry.checkpoint.step, entry.run.run_id))
        rankings.append(
            Ranking(
                protocol=protocols[mark],
                entries=tuple(finite),
                unranked=tuple(e for e in group.values() if not math.isfinite(e.checkpoint.distance)),
            )
        )
    return tuple(sorted(rankings, key=_lead))


def measured_again(best: Entry, rankings: Iterable[Ranking]) -> Entry | None:
    """The same checkpoint under the same protocol but for samples that it was not chosen by."""
    wanted = replace(best.evaluation.protocol, purpose="report")
    for ranking in rankings:
        if ranking.protocol == wanted and best.evaluation.protocol != wanted:
            for entry in ranking.entries:
                if (entry.run.run_id, entry.checkpoint.step) == (best.run.run_id, best.checkpoint.step):
                    return entry
    return None


def _lead(ranking: Ranking) -> tuple[bool, bool, bool, bool, int, int, str]:
    protocol = ranking.protocol
    return (
        not ranking.entries,
        protocol.against != "train",
        protocol.distance != "fid",
        protocol.purpose != "selection",
        -protocol.num_samples,
        -len(ranking.entries),
        protocol.fingerprint,
    )
