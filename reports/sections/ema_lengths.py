"""The distance of one checkpoint against the length of its EMA, chosen after the training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddpm_core.protocol import Protocol
from ddpm_core.records import EMA_ERROR
from ddpm_core.verdicts import Verdict, verdict_beside
from reports.drawing import figures
from reports.drawing.elements import Chart, Column, Row, Table, numeric
from reports.formatting import NOT_MEASURED, fixed
from reports.records.entities import ExperimentRecord
from reports.records.records import run_link
from reports.records.store import Store
from reports.sections.checkpoints import mark_of
from reports.verdicts.ranking import Entry, Ranking, measured_most
from reports.verdicts.wording import decimals_of, interval_text, metric_name


@dataclass(frozen=True, kw_only=True)
class EmaSection:
    """One checkpoint under protocols that differ in the length of its EMA alone."""

    title: str
    charts: tuple[Chart, ...]
    table: Table


def ema_sections(store: Store, record: ExperimentRecord, rankings: Sequence[Ranking]) -> tuple[EmaSection, ...]:
    """Of each protocol without a length, the checkpoint that was measured with most of them; none if that is one."""
    return tuple(ema_section(store, record, entries) for entries in measured_most(rankings, without_length))


def without_length(protocol: Protocol) -> Protocol:
    return replace(protocol, ema_length=None)


def length_of(entry: Entry) -> float | None:
    """Of an entry's EMA; None for the training's own, of a decay."""
    return entry.evaluation.protocol.ema_length


def ema_section(store: Store, record: ExperimentRecord, entries: Sequence[Entry]) -> EmaSection:
    """entries: of one checkpoint, each with another length, or the training's own EMA."""
    entries = sorted(entries, key=lambda entry: (entry.checkpoint.distance, length_of(entry) or 0.0))
    best = entries[0]
    metric = metric_name(best.evaluation.protocol.distance)
    where = f"step {best.checkpoint.step:,} of {best.run.name}"
    points = sorted(
        figures.LinePoint(
            length,
            entry.checkpoint.distance,
            entry.checkpoint.interval,
            standing(best, entry) is Verdict.INDISTINGUISHABLE,
        )
        for entry in entries
        if (length := length_of(entry)) is not None
    )
    own = next((entry.checkpoint.distance for entry in entries if length_of(entry) is None), None)
    charts: tuple[Chart, ...] = ()
    if len(points) > 1:
        svg = figures.by_step(
            f"ema-{best.run.run_id}-{best.evaluation.protocol.fingerprint}",
            [figures.Line(label="chosen after the training", points=points)],
            metric=metric,
            alt=f"{metric} of {where} against the length of its EMA, for {len(points)} lengths.",
            mark_lowest=True,
            beside=None if own is None else ("the training's own EMA", own),
            axis="EMA length",
        )
        caption = (
            f"{metric} of {where}, lower is better, against the length of its EMA: the standard deviation of the averaged "
            "updates over their number. Bars: 95 % intervals. Ring: the lowest length; shaded: what cannot be told apart."
        )
        charts = (Chart(svg=svg, caption=caption),)
    return EmaSection(
        title=f"{metric}, {best.evaluation.protocol.num_samples:,} samples",
        charts=charts,
        table=ema_table(store, record, entries, metric, where),
    )


def standing(best: Entry, entry: Entry) -> Verdict:
    return Verdict.BEST if entry is best else verdict_beside(best.checkpoint.interval, entry.checkpoint.interval)


def ema_table(store: Store, record: ExperimentRecord, entries: Sequence[Entry], metric: str, where: str) -> Table:
    """entries: the lowest distance first."""
    best, decimals = entries[0], decimals_of(entries[0])
    rows = []
    for entry in entries:
        length, verdict = length_of(entry), standing(best, entry)
        error = None
        if EMA_ERROR in entry.evaluation.metrics:
            error = store.history(entry.evaluation.run_id, EMA_ERROR).at(entry.checkpoint.step)
        cells = (
            "the training's own" if length is None else f"{length:g}",
            fixed(entry.checkpoint.distance, decimals),
            interval_text(entry, decimals),
            "" if length is None else NOT_MEASURED if error is None else f"{error:.1%}",
            str(verdict),
        )
        rows.append(Row(cells=cells, mark=mark_of(verdict), href=run_link(record, entry.evaluation.run_id)))
    columns = (
        Column(title="EMA length", linked=True),
        *numeric(metric, "95 % interval", "Profile off by"),
        Column(title="Standing"),
    )
    return Table(
        caption=f"Lengths of the EMA of {where}; all else of their protocols is equal",
        columns=columns,
        rows=tuple(rows),
        sortable=True,
    )
