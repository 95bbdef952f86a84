"""Which checkpoint is best, and which cannot be told apart from it.

Only results of the same protocol are ever compared: there is one ranking for each protocol's fingerprint.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ddpm_core.protocol import Protocol
from ddpm_core.verdicts import Verdict, verdict_beside
from reports.records.entities import CheckpointRecord, EvaluationRecord, RunRecord


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A measured checkpoint and where it came from."""

    run: RunRecord
    evaluation: EvaluationRecord
    checkpoint: CheckpointRecord

    @property
    def images_seen(self) -> int | None:
        """Images that the training has drawn up to the checkpoint."""
        return self.run.images_seen(self.checkpoint.step)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Every checkpoint measured under one protocol, the lowest distance first; `unranked` have no finite value."""

    protocol: Protocol
    entries: tuple[Entry, ...]
    unranked: tuple[Entry, ...] = ()

    @property
    def best(self) -> Entry | None:
        """The lowest distance, None if no value is finite."""
        return self.entries[0] if self.entries else None

    def verdict(self, entry: Entry) -> Verdict:
        """How one of these entries stands to the best."""
        best = self.best
        if best is None or not math.isfinite(entry.checkpoint.distance):
            return Verdict.NOT_FINITE
        if entry is best:
            return Verdict.BEST
        return verdict_beside(best.checkpoint.interval, entry.checkpoint.interval)

    def count(self, verdict: Verdict) -> int:
        return sum(self.verdict(entry) is verdict for entry in self.entries)


def rank(runs: Iterable[RunRecord]) -> tuple[Ranking, ...]:
    """One ranking for each protocol, first the one to choose by: against the training set, FID before other distances, on
    the samples that checkpoints are chosen by, then the most samples, then the most checkpoints, then the training's own EMA
    before others by their length; ties by fingerprint, so that the order never depends on the store's."""
    by_protocol: dict[Protocol, dict[tuple[str, int], Entry]] = {}
    for run in runs:
        # A checkpoint that was evaluated twice under one protocol counts as it was measured last.
        for evaluation in sorted(run.evaluations, key=lambda evaluation: evaluation.started):
            entries = by_protocol.setdefault(evaluation.protocol, {})
            for checkpoint in evaluation.checkpoints:
                entries[run.run_id, checkpoint.step] = Entry(run=run, evaluation=evaluation, checkpoint=checkpoint)
    rankings = [_ranking(protocol, entries.values()) for protocol, entries in by_protocol.items()]
    return tuple(sorted(rankings, key=_precedence))


def measured_again(best: Entry, rankings: Iterable[Ranking]) -> Entry | None:
    """The same checkpoint under the same protocol but for samples that it was not chosen by."""
    fresh = replace(best.evaluation.protocol, purpose="report")
    if fresh == best.evaluation.protocol:
        return None
    entries = (entry for ranking in rankings if ranking.protocol == fresh for entry in ranking.entries)
    same = (best.run.run_id, best.checkpoint.step)
    return next((entry for entry in entries if (entry.run.run_id, entry.checkpoint.step) == same), None)


def measured_most(rankings: Iterable[Ranking], without: Callable[[Protocol], Protocol]) -> list[list[Entry]]:
    """Of the protocols that are equal but for what `without` takes out, the entries of the checkpoint that was measured under
    most of them, the later one if two were; none of what was measured under one alone."""
    groups: dict[Protocol, dict[tuple[str, int], list[Entry]]] = {}
    for ranking in rankings:
        rest = without(ranking.protocol)
        for entry in ranking.entries:
            groups.setdefault(rest, {}).setdefault((entry.run.run_id, entry.checkpoint.step), []).append(entry)
    chosen = (
        max(group.values(), key=lambda entries: (len(entries), entries[0].checkpoint.step)) for group in groups.values()
    )
    return [entries for entries in chosen if len(entries) > 1]


def _ranking(protocol: Protocol, entries: Iterable[Entry]) -> Ranking:
    ranked: list[Entry] = []
    unranked: list[Entry] = []
    for entry in entries:
        (ranked if math.isfinite(entry.checkpoint.distance) else unranked).append(entry)
    ranked.sort(key=lambda entry: (entry.checkpoint.distance, entry.checkpoint.step, entry.run.run_id))
    return Ranking(protocol=protocol, entries=tuple(ranked), unranked=tuple(unranked))


def _precedence(ranking: Ranking) -> tuple[bool, bool, bool, bool, int, int, float, str]:
    """A key to sort rankings by; those without a finite value come last."""
    protocol = ranking.protocol
    return (
        not ranking.entries,
        protocol.against != "train",
        protocol.distance != "fid",
        protocol.purpose != "selection",
        -protocol.num_samples,
        -len(ranking.entries),
        protocol.ema_length or 0.0,
        protocol.fingerprint,
    )
