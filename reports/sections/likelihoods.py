"""Bits per dimension: what was measured, Fig. 5 and Table 4. Measurements of different images, terms or weights never share
a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports.drawing import figures
from reports.records.entities import BitsPerDim, ExperimentRecord, Likelihood, RateDistortion, TrainingRun
from reports.sections.charts import Chart
from reports.sections.tables import SHOWN_ROWS, Column, Row, Table
from reports.verdicts import commands, paper
from reports.verdicts.comparison import coded, data_of, is_of_training
from reports.verdicts.formatting import NOT_MEASURED, count, counted, fixed, number


@dataclass(frozen=True, kw_only=True)
class LikelihoodSection:
    """`missing` is the command that would fill what is not there."""

    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    rate_distortion: Table | None
    missing: str


def likelihood_section(record: ExperimentRecord, lead: TrainingRun) -> LikelihoodSection:
    """Every likelihood of the experiment, and the rate-distortion curves of the leading run."""
    groups: dict[str, list[tuple[TrainingRun, Likelihood]]] = {}
    for run in record.runs:
        for measured in run.likelihoods:
            if measured.results:
                groups.setdefault(measured.fingerprint, []).append((run, measured))
    chosen = _with_curves(lead)
    on_cifar = data_of(lead) is paper.CIFAR10
    options = ("--data", "CIFAR10_TEST_SHARDS") if on_cifar else ()
    curves = chosen[1].curves if chosen else None
    # The paper's points are of the CIFAR-10 test set: they stand beside the same measurement only.
    beside = on_cifar and (chosen is None or chosen == coded(lead, of_training=False))
    what = _what(*chosen) if chosen else "the test set"
    return LikelihoodSection(
        tables=tuple(_table(group) for group in groups.values()),
        charts=_panels(curves, what, beside) if curves else (),
        rate_distortion=_table_4(curves, what, beside) if curves or on_cifar else None,
        missing=commands.likelihood(lead, *options) if curves is None or on_cifar > beside else "",
    )


def _with_curves(run: TrainingRun) -> tuple[Likelihood, BitsPerDim] | None:
    """The run's measurement to draw: the whole test set's before others, then the most images, then the newest."""
    found = [(measured, result) for measured in run.likelihoods for result in measured.results if result.curves]
    if not found:
        return None
    return max(found, key=lambda pair: (not is_of_training(run, pair[0]), pair[0].images, pair[1].step))


def _what(measured: Likelihood, result: BitsPerDim) -> str:
    return f"{counted(measured.images, 'image')} of {measured.data}, step {result.step:,}"


def _table(group: Sequence[tuple[TrainingRun, Likelihood]]) -> Table:
    run, first = group[0]
    terms = "all terms of the bound" if first.strata is None else f"L₀ and {first.strata:,} drawn terms, an estimate"
    which = "the training set" if is_of_training(run, first) else "not the training set"
    pairs = [(run, result) for run, measured in group for result in measured.results]
    pairs.sort(key=lambda pair: (math.isnan(pair[1].bpd), pair[1].bpd, pair[1].step))

    def bits(value: float | None) -> str:
        return NOT_MEASURED if value is None else number(value, 3) if 0 < abs(value) < 1e-3 else fixed(value, 4)

    rows = tuple(
        Row(
            cells=(
                run.name,
                count(result.step),
                f"≤ {bits(result.bpd)}" if math.isfinite(result.bpd) else bits(result.bpd),
                NOT_MEASURED if result.low is None else f"{bits(result.low)} to {bits(result.high)}",
                bits(result.rate),
                bits(result.distortion),
                bits(result.prior),
                fixed(result.rmse, 3),
            ),
            mark="best" if place == 0 and len(pairs) > 1 and math.isfinite(result.bpd) else "",
        )
        for place, (run, result) in enumerate(pairs[:SHOWN_ROWS])
    )
    return Table(
        caption=(
            f"Negative log-likelihood on {counted(first.images, 'image')} of {first.data} ({which}), "
            f"{'EMA' if first.weights == 'ema' else first.weights} weights, {terms} (protocol {first.fingerprint})"
        ),
        columns=(
            Column(title="Run"),
            Column(title="Step", numeric=True),
            Column(title="Bits/dim", numeric=True),
            Column(title="95 % interval", numeric=True),
            Column(title="Rate L₁ + … + L_T", numeric=True),
            Column(title="Distortion L₀", numeric=True),
            Column(title="L_T", numeric=True),
            Column(title="RMSE (0..255)", numeric=True),
        ),
        rows=rows,
        omitted=len(pairs) - len(rows),
        sortable=True,
    )


def _panels(curves: RateDistortion, what: str, beside: bool) -> tuple[Chart, ...]:
    """Fig. 5: distortion and rate against the steps that were sent, and against each other."""
    T = curves.num_timesteps
    # At most about one point a pixel; the ends are kept, where the rate rises steeply.
    places = sorted({round(i * (T - 1) / 300) for i in range(301)} | set(range(min(T, 20))))
    sent = [float(T - curves.t[place] + 1) for place in places]
    rate, rmse = ([values[place] for place in places] for values in (curves.rate, curves.rmse))
    theirs = paper.TABLE_4 if beside and T == paper.SAMPLER_STEPS else ()
    paper_sent = [float(row.steps_sent) for row in theirs]
    paper_rate, paper_rmse = [row.rate for row in theirs], [row.rmse for row in theirs]
    distortion, bits, steps = "distortion (RMSE)", "rate (bits/dim)", "steps sent, T − t + 1"
    charts = []
    for key, x, y, ours, paper_points in (
        ("distortion", steps, distortion, (sent, rmse), (paper_sent, paper_rmse)),
        ("rate", steps, bits, (sent, rate), (paper_sent, paper_rate)),
        ("both", bits, distortion, (rate, rmse), (paper_rate, paper_rmse)),
    ):
        lines = [figures.Relation(label="ours", x=ours[0], y=ours[1])]
        if theirs:
            lines.append(figures.Relation(label="paper", x=paper_points[0], y=paper_points[1], marks=True))
        svg = figures.relation(
            f"rd-{key}", lines, x=x, y=y, alt=f"{y} against {x}, {what}; the values stand in the table."
        )
        caption = f"{y[0].upper()}{y[1:]} against {x}{'; crosses: Table 4 of the paper' if theirs else ''}."
        charts.append(Chart(svg=Markup(svg), caption=caption))
    return tuple(charts)


def _table_4(curves: RateDistortion | None, what: str, beside: bool) -> Table:
    """Table 4 beside ours; without the paper's columns for other data, tenths of T for another T."""
    T = curves.num_timesteps if curves else paper.SAMPLER_STEPS
    beside = beside and T == paper.SAMPLER_STEPS
    theirs = {row.steps_sent: row for row in paper.TABLE_4}
    rows = []
    for steps in sorted({max(1, T * tenths // 10) for tenths in range(1, 11)}, reverse=True):
        rate, rmse = curves.after(steps) if curves else (None, None)
        ours = (fixed(rate, 5), fixed(rmse, 5))
        row = theirs.get(steps)
        cells = (fixed(row.rate, 5), ours[0], fixed(row.rmse, 5), ours[1]) if beside and row else ours
        rows.append(Row(cells=(count(steps), *cells)))
    titles = (
        ("Rate, paper", "Rate, ours", "RMSE, paper", "RMSE, ours") if beside else ("Rate (bits/dim)", "RMSE (0..255)")
    )
    return Table(
        caption=f"Table 4 of the paper beside ours: {what}"
        if beside
        else f"Rate and distortion, as in Table 4: {what}",
        columns=(Column(title="Steps sent, T − t + 1", numeric=True), *(Column(title=t, numeric=True) for t in titles)),
        rows=tuple(rows),
    )
