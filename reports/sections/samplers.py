"""What a sampler costs and gives: the distance of one checkpoint against network calls, for all samplers it was measured with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddpm_core.protocol import Protocol
from ddpm_core.verdicts import Verdict, verdict_beside
from reports.drawing import figures
from reports.drawing.elements import Chart, Column, Row, Table, numeric
from reports.formatting import count, counted, fixed
from reports.records.entities import ExperimentRecord
from reports.records.records import run_link
from reports.sections.checkpoints import mark_of
from reports.verdicts.ranking import Entry, Ranking, measured_most
from reports.verdicts.wording import decimals_of, interval_text, metric_name


@dataclass(frozen=True, kw_only=True)
class SamplerSection:
    """One checkpoint under protocols that differ in their sampler alone."""

    title: str
    charts: tuple[Chart, ...]
    table: Table


def sampler_sections(record: ExperimentRecord, rankings: Sequence[Ranking]) -> tuple[SamplerSection, ...]:
    """Of each protocol without its sampler, the checkpoint that was measured with most of them; none if that is one."""
    return tuple(sampler_section(record, entries) for entries in measured_most(rankings, without_sampler))


def without_sampler(protocol: Protocol) -> Protocol:
    """What samplers must share to be compared: everything else."""
    return replace(protocol, sampler="ancestral", sampler_steps=1, spacing="uniform", eta=0.0, var_type=None)


def sampler_section(record: ExperimentRecord, entries: Sequence[Entry]) -> SamplerSection:
    """entries: of one checkpoint, each measured with another sampler."""
    entries = sorted(entries, key=lambda entry: (entry.checkpoint.distance, entry.evaluation.protocol.sampler_steps))
    best = entries[0]
    metric = metric_name(best.evaluation.protocol.distance)
    where = f"step {best.checkpoint.step:,} of {best.run.name}"
    lines: dict[str, list[figures.LinePoint]] = {}
    for entry in sorted(entries, key=lambda entry: entry.evaluation.protocol.sampler_steps):
        point, calls = entry.checkpoint, entry.evaluation.protocol.sampler_steps
        points = lines.setdefault(sampler_words(entry.evaluation.protocol), [])
        points.append(figures.LinePoint(calls, point.distance, point.interval))
    drawn = sorted(lines.items(), key=lambda line: -len(line[1]))[: figures.MAX_LINES]
    charts: tuple[Chart, ...] = ()
    if len({entry.evaluation.protocol.sampler_steps for entry in entries}) > 1:
        svg = figures.by_step(
            f"samplers-{best.run.run_id}-{best.evaluation.protocol.fingerprint}",
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
    return SamplerSection(
        title=f"{metric}, {best.evaluation.protocol.num_samples:,} samples",
        charts=charts,
        table=sampler_table(record, entries, metric, where),
    )


def sampler_words(protocol: Protocol) -> str:
    """A sampler without the number of its steps."""
    eta = f", η {protocol.eta:g}" if protocol.sampler == "ddim" else ""
    variance = f", {protocol.var_type}" if protocol.var_type else ""
    return f"{protocol.sampler}{eta}{variance}, {protocol.spacing}"


def sampler_table(record: ExperimentRecord, entries: Sequence[Entry], metric: str, where: str) -> Table:
    """entries: the lowest distance first."""
    best, decimals = entries[0], decimals_of(entries[0])
    rows = []
    for entry in entries:
        protocol = entry.evaluation.protocol
        overlap = verdict_beside(best.checkpoint.interval, entry.checkpoint.interval)
        verdict = Verdict.BEST if entry is best else overlap
        cells = (
            sampler_words(protocol),
            count(protocol.sampler_steps),
            fixed(entry.checkpoint.distance, decimals),
            interval_text(entry, decimals),
            str(verdict),
        )
        rows.append(Row(cells=cells, mark=mark_of(verdict), href=run_link(record, entry.evaluation.run_id)))
    columns = (
        Column(title="Sampler", linked=True),
        *numeric("Network calls", metric, "95 % interval"),
        Column(title="Standing"),
    )
    return Table(
        caption=f"Samplers of {where}; all else of their protocols is equal",
        columns=columns,
        rows=tuple(rows),
        sortable=True,
    )
