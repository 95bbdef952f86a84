"""Records -> tables of text, ready to be set. Whatever is missing says so in its cell."""

from dataclasses import dataclass

from ddpm_core.records import INFINITY, KID, PRECISION, RECALL
from reports.records.store import Store
from reports.verdicts.conclusions import interval_text, metric_name
from reports.verdicts.formatting import NOT_MEASURED, count, decimals_for, fixed, number, shortened
from reports.verdicts.ranking import Entry, Ranking, Verdict
from reports.verdicts.sweeps import SweepResult, TrialRanking

SHOWN_ROWS = 200
SHOWN = 10  # of what is told in sentences
NOT_RECORDED = "not recorded"
# Beside distance and score: metric -> title; {} is the distance's name.
_FURTHER = {INFINITY: "{} at n → ∞", KID: "KID", PRECISION: "Precision", RECALL: "Recall"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """`numeric` aligns right; `wraps` lets long text take several lines, where other cells stay on one."""

    title: str
    numeric: bool = False
    wraps: bool = False

    @property
    def css(self) -> str:
        return "n" if self.numeric else "w" if self.wraps else ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The first cell is the row's header. `mark` is "best", "close" or "" and sets the row's look."""

    cells: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """`omitted` counts the rows that there are besides. A reader may sort a `sortable` one by any column."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    omitted: int = 0
    sortable: bool = False


def ranking_table(store: Store, ranking: Ranking, name_runs: bool) -> Table:
    """The checkpoints of one protocol, the lowest distance first. `name_runs` adds the run each belongs
    to."""
    protocol = ranking.protocol
    best = ranking.best
    decimals = _decimals(best)
    # Only as many rows as are set: an experiment may hold tens of thousands of checkpoints.
    entries = [*ranking.entries[:SHOWN_ROWS], *ranking.unranked[: max(0, SHOWN_ROWS - len(ranking.entries))]]
    scored = any(entry.checkpoint.score is not None for entry in entries)
    names = {
        metric: protocol.distance + INFINITY if metric == INFINITY else protocol.metric(metric) for metric in _FURTHER
    }
    further = [metric for metric in _FURTHER if any(names[metric] in entry.evaluation.metrics for entry in entries)]
    columns = [
        Column(title="Rank", numeric=True),
        Column(title="Step", numeric=True),
        Column(title=metric_name(protocol.distance), numeric=True),
        Column(title="95 % interval", numeric=True),
        Column(title="Standing"),
        *([Column(title=metric_name(protocol.score), numeric=True)] if scored else []),
        *(Column(title=_FURTHER[metric].format(metric_name(protocol.distance)), numeric=True) for metric in further),
        *([Column(title="Run")] if name_runs else []),
        Column(title="Images seen", numeric=True),
    ]

    def value(entry: Entry, metric: str) -> float | None:
        if names[metric] not in entry.evaluation.metrics:
            return None
        return store.history(entry.evaluation.run_id, names[metric]).at(entry.checkpoint.step)

    known = {metric: [found for entry in entries if (found := value(entry, metric))] for metric in further}
    digits = {
        metric: decimals if metric == INFINITY else decimals_for(max(map(abs, values), default=0.1))
        for metric, values in known.items()
    }

    def row(place: str, entry: Entry) -> Row:
        verdict = ranking.verdict(entry)
        cells = [
            place,
            count(entry.checkpoint.step),
            fixed(entry.checkpoint.distance, decimals),
            interval_text(entry, decimals),
            str(verdict),
            *([score_text(entry)] if scored else []),
            *(fixed(value(entry, metric), digits[metric]) for metric in further),
            *([shortened(entry.run.name)] if name_runs else []),
            count(entry.images_seen) if entry.images_seen is not None else NOT_RECORDED,
        ]
        return Row(cells=tuple(cells), mark=_mark(verdict))

    finite = min(len(ranking.entries), SHOWN_ROWS)
    return Table(
        caption=f"Checkpoints by {metric_name(protocol.distance)} (protocol {protocol.fingerprint})",
        columns=tuple(columns),
        rows=tuple(row(count(n) if n <= finite else "–", entry) for n, entry in enumerate(entries, start=1)),
        omitted=len(ranking.entries) + len(ranking.unranked) - len(entries),
        sortable=True,
    )


def trial_table(trials: TrialRanking) -> Table:
    """The trials of a sweep that were measured under one protocol."""
    ranking = trials.ranking
    name = metric_name(ranking.protocol.distance)
    decimals = _decimals(ranking.best)
    rows = [
        Row(
            cells=(
                shortened(result.trial.label),
                count(result.entry.checkpoint.step),
                fixed(result.entry.checkpoint.distance, decimals),
                interval_text(result.entry, decimals),
                number(result.trial.prior_bpd, 3),
                str(ranking.verdict(result.entry)),
            ),
            mark=_mark(ranking.verdict(result.entry)),
        )
        for result in trials.results
    ]
    return Table(
        caption=f"Trials by {name} at their last evaluated step (protocol {ranking.protocol.fingerprint})",
        columns=(
            Column(title="Trial"),
            Column(title="Step", numeric=True),
            Column(title=name, numeric=True),
            Column(title="95 % interval", numeric=True),
            Column(title="L_T (bits/dim)", numeric=True),
            Column(title="Standing"),
        ),
        rows=tuple(rows[:SHOWN_ROWS]),
        omitted=max(0, len(rows) - SHOWN_ROWS),
        sortable=True,
    )


def trials_without_result(result: SweepResult) -> Table | None:
    """The trials that cannot be ranked and why; None if there are none."""
    rows = [
        Row(cells=(shortened(trial.label), count(trial.steps), number(trial.prior_bpd, 3), reason))
        for trial, reason in result.without
    ]
    if not rows:
        return None
    return Table(
        caption="Trials without a result",
        columns=(
            Column(title="Trial"),
            Column(title="Steps", numeric=True),
            Column(title="L_T (bits/dim)", numeric=True),
            Column(title="Why", wraps=True),
        ),
        rows=tuple(rows[:SHOWN_ROWS]),
        omitted=max(0, len(rows) - SHOWN_ROWS),
        sortable=True,
    )


def score_text(entry: Entry) -> str:
    """The score with its spread over splits."""
    point = entry.checkpoint
    if point.score is None:
        return NOT_MEASURED
    decimals = 2 if point.score_std is None else decimals_for(point.score, 0, 2 * point.score_std)
    return fixed(point.score, decimals) + ("" if point.score_std is None else f" ± {fixed(point.score_std, decimals)}")


def _decimals(best: Entry | None) -> int:
    """The decimals of a whole column: those the best row deserves."""
    if best is None:
        return 0
    return decimals_for(best.checkpoint.distance, best.checkpoint.low, best.checkpoint.high)


def _mark(verdict: Verdict) -> str:
    return {Verdict.BEST: "best", Verdict.INDISTINGUISHABLE: "close"}.get(verdict, "")
