"""One checkpoint measured with several samplers, against network calls, and with several lengths of its EMA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ddpm_core.protocol import Protocol
from ddpm_core.records import EMA_ERROR
from ddpm_core.verdicts import Verdict, verdict_beside
from reports.drawing import figures
from reports.drawing.elements import Chart, Column, Row, Table, numeric
from reports.formatting import NOT_MEASURED, count, counted, fixed
from reports.records.entities import ExperimentRecord
from reports.records.records import run_link
from reports.records.store import Store
from reports.sections.checkpoints import logged_value, mark_of
from reports.verdicts.ranking import Entry, Ranking, measured_most
from reports.verdicts.wording import decimals_of, interval_text, metric_name, sampler_words


@dataclass(frozen=True, kw_only=True)
class ChoiceSection:
    """One checkpoint under protocols that differ in one choice alone."""

    title: str
    charts: tuple[Chart, ...]
    table: Table


@dataclass(frozen=True)
class Measured:
    """The entries of one checkpoint under such protocols, the lowest distance first."""

    entries: Sequence[Entry]

    @property
    def best(self) -> Entry:
        return self.entries[0]

    @property
    def metric(self) -> str:
        return metric_name(self.best.evaluation.protocol.distance)

    @property
    def where(self) -> str:
        return f"step {self.best.checkpoint.step:,} of {self.best.run.name}"

    @property
    def key(self) -> str:
        """Of its figure."""
        return f"{self.best.run.run_id}-{self.best.evaluation.protocol.fingerprint}"

    def verdict(self, entry: Entry) -> Verdict:
        """How an entry stands to the best."""
        if entry is self.best:
            return Verdict.BEST
        return verdict_beside(self.best.checkpoint.interval, entry.checkpoint.interval)

    def section(self, charts: tuple[Chart, ...], table: Table) -> ChoiceSection:
        samples = self.best.evaluation.protocol.num_samples
        return ChoiceSection(title=f"{self.metric}, {samples:,} samples", charts=charts, table=table)

    def table(
        self,
        record: ExperimentRecord,
        caption: str,
        before: Mapping[Column, Sequence[str]],
        after: Mapping[Column, Sequence[str]],
    ) -> Table:
        """before, after: columns with their cells, on either side of the distance and its interval."""
        decimals = decimals_of(self.best)
        rows = []
        for place, entry in enumerate(self.entries):
            verdict = self.verdict(entry)
            cells = (
                *(column[place] for column in before.values()),
                fixed(entry.checkpoint.distance, decimals),
                interval_text(entry, decimals),
                *(column[place] for column in after.values()),
                str(verdict),
            )
            rows.append(Row(cells=cells, mark=mark_of(verdict), href=run_link(record, entry.evaluation.run_id)))
        return Table(
            caption=f"{caption} of {self.where}; all else of their protocols is equal",
            columns=(*before, *numeric(self.metric, "95 % interval"), *after, Column(title="Standing")),
            rows=tuple(rows),
            sortable=True,
        )


def sampler_sections(record: ExperimentRecord, rankings: Sequence[Ranking]) -> tuple[ChoiceSection, ...]:
    """Of each protocol without its sampler, the checkpoint that was measured with most of them; none if that is one."""
    return tuple(sampler_section(record, entries) for entries in measured_most(rankings, without_sampler))


def without_sampler(protocol: Protocol) -> Protocol:
    """What samplers must share to be compared: everything else."""
    return replace(protocol, sampler="ancestral", sampler_steps=1, spacing="uniform", eta=0.0, var_type=None)


def sampler_section(record: ExperimentRecord, entries: Sequence[Entry]) -> ChoiceSection:
    """entries: of one checkpoint, each measured with another sampler."""
    entries = sorted(entries, key=lambda entry: (entry.checkpoint.distance, entry.evaluation.protocol.sampler_steps))
    measured = Measured(entries)
    metric, where = measured.metric, measured.where
    lines: dict[str, list[figures.LinePoint]] = {}
    for entry in sorted(entries, key=lambda entry: entry.evaluation.protocol.sampler_steps):
        point, calls = entry.checkpoint, entry.evaluation.protocol.sampler_steps
        points = lines.setdefault(sampler_words(entry.evaluation.protocol), [])
        points.append(figures.LinePoint(calls, point.distance, point.interval))
    drawn = sorted(lines.items(), key=lambda line: -len(line[1]))[: figures.MAX_LINES]
    charts: tuple[Chart, ...] = ()
    if len({entry.evaluation.protocol.sampler_steps for entry in entries}) > 1:
        svg = figures.by_step(
            f"samplers-{measured.key}",
            [figures.Line(label=label, points=points) for label, points in drawn],
            metric=metric,
            alt=f"{metric} of {where} against network calls, for {counted(len(drawn), 'sampler')}.",
            axis="network calls",
        )
        caption = (
            f"{metric} of {where}, lower is better, against how often a sample calls the network. Bars: 95 % intervals."
        )
        if len(drawn) < len(lines):
            caption += f" Only the {len(drawn)} samplers with most points are drawn, of {len(lines)}."
        charts = (Chart(svg=svg, caption=caption),)
    protocols = [entry.evaluation.protocol for entry in entries]
    (calls_column,) = numeric("Network calls")
    columns = {
        Column(title="Sampler", linked=True): [sampler_words(protocol) for protocol in protocols],
        calls_column: [count(protocol.sampler_steps) for protocol in protocols],
    }
    return measured.section(charts, measured.table(record, "Samplers", columns, {}))


def ema_sections(store: Store, record: ExperimentRecord, rankings: Sequence[Ranking]) -> tuple[ChoiceSection, ...]:
    """Of each protocol without the length of its EMA, the checkpoint that was measured with most of them; none if that is one."""
    return tuple(ema_section(store, record, entries) for entries in measured_most(rankings, without_length))


def without_length(protocol: Protocol) -> Protocol:
    return replace(protocol, ema_length=None)


def length_of(entry: Entry) -> float | None:
    """Of an entry's EMA; None for the training's own, of a decay."""
    return entry.evaluation.protocol.ema_length


def ema_section(store: Store, record: ExperimentRecord, entries: Sequence[Entry]) -> ChoiceSection:
    """entries: of one checkpoint, each with another length, or the training's own EMA."""
    entries = sorted(entries, key=lambda entry: (entry.checkpoint.distance, length_of(entry) or 0.0))
    measured = Measured(entries)
    metric, where = measured.metric, measured.where
    points = sorted(
        figures.LinePoint(
            length,
            entry.checkpoint.distance,
            entry.checkpoint.interval,
            measured.verdict(entry) is Verdict.INDISTINGUISHABLE,
        )
        for entry in entries
        if (length := length_of(entry)) is not None
    )
    own = next((entry.checkpoint.distance for entry in entries if length_of(entry) is None), None)
    charts: tuple[Chart, ...] = ()
    if len(points) > 1:
        svg = figures.by_step(
            f"ema-{measured.key}",
            [figures.Line(label="chosen after the training", points=points)],
            metric=metric,
            alt=f"{metric} of {where} against the length of its EMA, for {len(points)} lengths.",
            mark_lowest=True,
            beside=None if own is None else ("the training's own EMA", own),
            axis="EMA length",
        )
        caption = (
            f"{metric} of {where}, lower is better, against the length of its EMA: the standard deviation of the averaged "
            "updates over their number. Bars: 95 % intervals. Ring: the lowest; the shaded strip is its interval, and "
            "shaded points cannot be told apart from it. Profile off by: how far the made profile is from the wanted one."
        )
        charts = (Chart(svg=svg, caption=caption),)
    lengths = ["the training's own" if (each := length_of(entry)) is None else f"{each:g}" for entry in entries]
    (error_column,) = numeric("Profile off by")
    table = measured.table(
        record,
        "Lengths of the EMA",
        {Column(title="EMA length", linked=True): lengths},
        {error_column: [error_words(store, entry) for entry in entries]},
    )
    return measured.section(charts, table)


def error_words(store: Store, entry: Entry) -> str:
    """How far the profile of an EMA that was made after the training is from the wanted one; nothing of the training's own."""
    if length_of(entry) is None:
        return ""
    error = logged_value(store, entry, EMA_ERROR)
    return NOT_MEASURED if error is None else f"{100.0 * error:.1f} %"
