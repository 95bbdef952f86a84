"""The checkpoints of one protocol: charts, and a table with the lowest distance first."""

from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_core.protocol import Protocol
from ddpm_core.records import CI_HIGH, CI_LOW, INFINITY, KID, PRECISION, RECALL, ranking_link
from ddpm_core.verdicts import Verdict, known_interval
from reports.drawing.elements import SHOWN_ROWS, Chart, Column, Row, Table
from reports.formatting import NOT_RECORDED, count, decimals_for, fixed, shortened
from reports.records.entities import ExperimentRecord
from reports.records.records import run_link
from reports.records.store import Store, public_uri
from reports.sections.checkpoint_charts import further_charts, ranking_charts
from reports.verdicts.ranking import Entry, Ranking
from reports.verdicts.wording import decimals_of, interval_text, metric_name, sampler_words, score_text

EXTRAPOLATION = (
    "At n → ∞: the intercept of a line in 1/n, ± its 95 % interval over the seeds at this n. Neither knows of the term in "
    "1/n², for which the intercept is too low, by 8 % of what it corrects at 50,000 samples of 2,048 alike features, by more at "
    "fewer"
)
# Beside distance and score: metric -> title; {} is the distance's name.
_FURTHER = {INFINITY: "{} at n → ∞", KID: "KID", PRECISION: "Precision", RECALL: "Recall"}


@dataclass(frozen=True, kw_only=True)
class ProtocolSection:
    """One protocol's results: nothing in it was measured under another. link: to them in MLflow's UI, empty if it has none."""

    title: str
    description: str
    charts: tuple[Chart, ...]
    further: tuple[Chart, ...]
    table: Table
    link: str


def protocol_sections(
    store: Store, record: ExperimentRecord, rankings: Sequence[Ranking]
) -> tuple[ProtocolSection, ...]:
    titles = section_titles([ranking.protocol for ranking in rankings])
    return tuple(protocol_section(store, record, *each) for each in zip(rankings, titles, strict=True))


def section_titles(protocols: Sequence[Protocol]) -> list[str]:
    """What each is called, by its sampler and the length of its EMA too if others would be called the same."""

    def named(protocol: Protocol) -> str:
        purpose = ", measured again on fresh samples" if protocol.purpose == "report" else ""
        return f"{metric_name(protocol.distance)}, {protocol.num_samples:,} samples{purpose}"

    def sampler(protocol: Protocol) -> str:
        return f"{sampler_words(protocol)}, {protocol.sampler_steps:,} steps"

    def length(protocol: Protocol) -> str:
        return "the training's own EMA" if protocol.ema_length is None else f"EMA length {protocol.ema_length:g}"

    titles = []
    for protocol in protocols:
        alike = [other for other in protocols if named(other) == named(protocol)]
        choices = [words(protocol) for words in (sampler, length) if len({words(other) for other in alike}) > 1]
        titles.append(", ".join([named(protocol), *choices]))
    return titles


def protocol_section(store: Store, record: ExperimentRecord, ranking: Ranking, title: str) -> ProtocolSection:
    protocol = ranking.protocol
    name = protocol.distance + INFINITY
    extrapolated = any(name in entry.evaluation.metrics for entry in (*ranking.entries, *ranking.unranked))
    return ProtocolSection(
        title=title,
        # Not in the table's caption, which a phone shows as far as it shows the table.
        description=f"{protocol.describe()}. {EXTRAPOLATION}" if extrapolated else protocol.describe(),
        charts=ranking_charts(ranking),
        further=further_charts(store, ranking),
        table=ranking_table(store, record, ranking),
        link=ranking_link(public_uri(record.tracking_uri), record.experiment_id, protocol.fingerprint)
        if store.has_ranking(record.experiment_id, protocol.fingerprint)
        else "",
    )


def ranking_table(store: Store, record: ExperimentRecord, ranking: Ranking) -> Table:
    """The checkpoints of one protocol, the lowest distance first, with the run of each if there are several."""
    protocol = ranking.protocol
    decimals = decimals_of(ranking.best) if ranking.best else 0
    # Only as many rows as are set: an experiment may hold tens of thousands of checkpoints.
    ranked = ranking.entries[:SHOWN_ROWS]
    entries = [*ranked, *ranking.unranked[: SHOWN_ROWS - len(ranked)]]
    verdicts = [ranking.verdict(entry) for entry in entries]
    columns = [
        (Column(title="Rank", numeric=True), [*map(count, range(1, len(ranked) + 1)), *["–"] * len(entries)]),
        (Column(title="Step", numeric=True), [count(entry.checkpoint.step) for entry in entries]),
        (
            Column(title=metric_name(protocol.distance), numeric=True),
            [fixed(entry.checkpoint.distance, decimals) for entry in entries],
        ),
        (Column(title="95 % interval", numeric=True), [interval_text(entry, decimals) for entry in entries]),
        (Column(title="Standing"), [str(verdict) for verdict in verdicts]),
    ]
    if any(entry.checkpoint.score is not None for entry in entries):
        scores = [score_text(entry) for entry in entries]
        columns.append((Column(title=metric_name(protocol.score), numeric=True), scores))
    columns += _further_columns(store, protocol, entries, decimals)
    if len({entry.run.run_id for entry in (*ranking.entries, *ranking.unranked)}) > 1:
        columns.append((Column(title="Run", linked=True), [shortened(entry.run.name) for entry in entries]))
    images = [NOT_RECORDED if entry.images_seen is None else count(entry.images_seen) for entry in entries]
    columns.append((Column(title="Images seen", numeric=True), images))
    cells = zip(*(texts[: len(entries)] for _, texts in columns), strict=True)
    return Table(
        caption=f"Checkpoints by {metric_name(protocol.distance)} (protocol {protocol.fingerprint})",
        columns=tuple(column for column, _ in columns),
        rows=tuple(
            Row(cells=row, mark=mark_of(verdict), href=run_link(record, entry.run.run_id))
            for row, verdict, entry in zip(cells, verdicts, entries, strict=True)
        ),
        omitted=len(ranking.entries) + len(ranking.unranked) - len(entries),
        sortable=True,
    )


def mark_of(verdict: Verdict) -> str:
    return {Verdict.BEST: "best", Verdict.INDISTINGUISHABLE: "close"}.get(verdict, "")


def _further_columns(
    store: Store, protocol: Protocol, entries: Sequence[Entry], decimals: int
) -> list[tuple[Column, list[str]]]:
    """(column, its cells) of each metric beside distance and score that was logged for one of the entries."""
    columns = []
    for metric, title in _FURTHER.items():
        name = protocol.distance + INFINITY if metric == INFINITY else protocol.metric(metric)
        if not any(name in entry.evaluation.metrics for entry in entries):
            continue
        values = [logged_value(store, entry, name) for entry in entries]
        largest = max((abs(value) for value in values if value), default=0.1)
        digits = decimals if metric == INFINITY else decimals_for(largest)
        texts = [fixed(value, digits) for value in values]
        if metric == INFINITY:  # those of the others are drawn
            texts = [_with_reach(store, entry, name, text, digits) for entry, text in zip(entries, texts, strict=True)]
        columns.append((Column(title=title.format(metric_name(protocol.distance)), numeric=True), texts))
    return columns


def _with_reach(store: Store, entry: Entry, name: str, text: str, digits: int) -> str:
    """A value ± how far its interval reaches to either side, if that was logged."""
    interval = known_interval(logged_value(store, entry, name + CI_LOW), logged_value(store, entry, name + CI_HIGH))
    return text if interval is None else f"{text} ± {fixed((interval[1] - interval[0]) / 2, digits)}"


def logged_value(store: Store, entry: Entry, name: str) -> float | None:
    """A metric of an entry, None if it was not logged."""
    evaluation = entry.evaluation
    return store.history(evaluation.run_id, name).at(entry.checkpoint.step) if name in evaluation.metrics else None
