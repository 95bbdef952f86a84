"""A sweep: what it concludes under each protocol, its trials, the spread between seeds, and the schedules it compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ddpm_core.verdicts import distances_by_point, listed
from reports.drawing import figures
from reports.drawing.elements import Chart, Column, Row, Table, long_table, numeric
from reports.formatting import count, decimals_for, fixed, number, shortened, typeset
from reports.records.entities import ExperimentRecord, ScheduleCurves
from reports.records.records import run_link
from reports.sections.checkpoints import mark_of
from reports.verdicts.sweeps import SweepAnalysis, TrialRanking
from reports.verdicts.wording import decimals_of, interval_text, metric_name

_CURVES: tuple[tuple[Literal["betas", "alphas_cumprod", "log_snr"], str, str], ...] = (
    ("betas", "β_t", "the variance of the noise that step t adds"),
    ("alphas_cumprod", "ᾱ_t", "the share of the image's variance that is left at step t"),
    ("log_snr", "log-SNR", "log(ᾱ_t / (1 − ᾱ_t)), natural logarithm"),
)


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    """A sweep: for each protocol the conclusion and the tables it is drawn from, and the trials without a result."""

    title: str
    charts: tuple[Chart, ...]
    rankings: tuple[tuple[str, tuple[Table, ...]], ...]
    without: Table | None
    note: str


def sweep_section(record: ExperimentRecord, analysis: SweepAnalysis) -> SweepSection:
    sweep = analysis.sweep
    once = len({trial.point for trial in sweep.trials}) == len(sweep.trials)
    note = "Each setting was trained once: the intervals hold no variation between training seeds."
    return SweepSection(
        title=sweep.name,
        charts=schedule_charts(sweep.schedules, sweep.run_id),
        rankings=tuple((typeset(trials.conclusion), _tables(record, trials)) for trials in analysis.rankings),
        without=trials_without_result(analysis),
        note=note if once and analysis.rankings else "",
    )


def _tables(record: ExperimentRecord, trials: TrialRanking) -> tuple[Table, ...]:
    over_seeds, each = points_table(trials), trial_table(record, trials)
    return (over_seeds, each) if over_seeds else (each,)


def points_table(trials: TrialRanking) -> Table | None:
    """Mean, standard deviation and range over seeds, a row a point, the lowest mean first; None if no point has two
    seeds."""
    standings, distances = trials.standings, distances_by_point(trials.measurements)
    if all(standing.seeds < 2 for standing in standings):
        return None
    protocol = trials.ranking.protocol
    name = metric_name(protocol.distance)
    lowest, highest = ({point: end(values) for point, values in distances.items()} for end in (min, max))
    best = standings[0]
    digits = decimals_for(best.mean, lowest[best.point], highest[best.point])
    rows = [
        Row(
            cells=(
                standing.point,
                f"{standing.seeds}",
                fixed(standing.mean, digits),
                "one seed" if standing.std is None else fixed(standing.std, digits),
                f"{fixed(lowest[standing.point], digits)} to {fixed(highest[standing.point], digits)}",
            ),
            mark="best" if standing is best else "",
        )
        for standing in standings
    ]
    return Table(
        caption=f"Settings by mean {name} over seeds (protocol {protocol.fingerprint})",
        columns=(Column(title="Setting"), *numeric("Seeds", f"Mean {name}", "Std over seeds", "Range")),
        rows=tuple(rows),
        sortable=True,
    )


def trial_table(record: ExperimentRecord, trials: TrialRanking) -> Table:
    """The trials of a sweep that were measured under one protocol."""
    ranking = trials.ranking
    name = metric_name(ranking.protocol.distance)
    decimals = decimals_of(trials.results[0].entry)
    rows = []
    for result in trials.results:
        verdict = ranking.verdict(result.entry)
        cells = (
            shortened(result.trial.label),
            count(result.entry.checkpoint.step),
            fixed(result.entry.checkpoint.distance, decimals),
            interval_text(result.entry, decimals),
            number(result.trial.prior_bpd, 3),
            str(verdict),
        )
        rows.append(Row(cells=cells, mark=mark_of(verdict), href=run_link(record, result.entry.run.run_id)))
    return long_table(
        f"Trials by {name} at their last evaluated step (protocol {ranking.protocol.fingerprint})",
        (
            Column(title="Trial", linked=True),
            *numeric("Step", name, "95 % interval", "L_T (bits/dim)"),
            Column(title="Standing"),
        ),
        rows,
    )


def trials_without_result(analysis: SweepAnalysis) -> Table | None:
    """The trials that cannot be ranked and why; None if there are none."""
    rows = [
        Row(cells=(shortened(trial.label), count(trial.steps), number(trial.prior_bpd, 3), reason))
        for trial, reason in analysis.without
    ]
    if not rows:
        return None
    columns = (Column(title="Trial"), *numeric("Steps", "L_T (bits/dim)"), Column(title="Why", wraps=True))
    return long_table("Trials without a result", columns, rows)


def schedule_charts(schedules: Mapping[str, ScheduleCurves], sweep_run_id: str) -> tuple[Chart, ...]:
    """Noise added, signal left, and the log signal-to-noise ratio, of every schedule of a sweep against t."""
    if not schedules:
        return ()
    drawn = listed(list(schedules)[: figures.MAX_LINES])
    charts = []
    for quantity, symbol, meaning in _CURVES:
        svg = figures.schedule_curves(
            f"{quantity}-{sweep_run_id}",
            schedules,
            quantity=quantity,
            symbol=symbol,
            alt=f"{symbol} against t for {drawn}.",
        )
        charts.append(Chart(svg=svg, caption=f"{symbol}: {meaning}."))
    return tuple(charts)
