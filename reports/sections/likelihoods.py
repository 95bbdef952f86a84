"""Bits per dimension: what was measured, Fig. 5 and Table 4 of the paper. Measurements of different images, terms or weights
never share a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reports.drawing import figures
from reports.drawing.elements import SHOWN_ROWS, Chart, Column, Row, Table, numeric
from reports.formatting import NOT_MEASURED, count, counted, fixed, number
from reports.records.entities import BitsPerDim, ExperimentRecord, LikelihoodRecord, RateDistortionCurves, RunRecord
from reports.records.records import run_link
from reports.sections import commands
from reports.verdicts import paper
from reports.verdicts.comparison import cifar10_likelihood, data_of, is_of_training, is_of_whole_cifar10

RATE, DISTORTION = "rate (bits/dim)", "distortion (RMSE)"
STEPS_SENT = "steps sent, T\N{NO-BREAK SPACE}−\N{NO-BREAK SPACE}t\N{NO-BREAK SPACE}+\N{NO-BREAK SPACE}1"
DRAWN_POINTS = 300  # of a curve, about one a pixel
STEEP = 20  # timesteps at the end that are all drawn, for the rate rises steeply


@dataclass(frozen=True, kw_only=True)
class LikelihoodSection:
    """`missing` is the command that would measure the curves, or those of the paper's images; empty if they are there."""

    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    rate_distortion: Table | None
    missing: str


def likelihood_section(record: ExperimentRecord, lead: RunRecord) -> LikelihoodSection:
    """Every likelihood of the experiment, and the rate-distortion curves of the leading run."""
    chosen = _with_curves(lead)
    on_cifar = data_of(lead) is paper.CIFAR10
    curves = chosen[1].curves if chosen else None
    images = _images(*chosen) if chosen else "the test set"
    # The paper's points are of the CIFAR-10 test set: they stand beside the same measurement only.
    beside = on_cifar and (chosen is None or chosen == cifar10_likelihood(lead, of_training=False))
    options = ("--data", "CIFAR10_TEST_SHARDS") if on_cifar else ()
    return LikelihoodSection(
        tables=_tables(record),
        charts=_figure_5(curves, images, beside) if curves else (),
        rate_distortion=_table_4(curves, images, beside) if curves or on_cifar else None,
        missing="" if curves and (beside or not on_cifar) else commands.likelihood(lead, *options),
    )


def _with_curves(run: RunRecord) -> tuple[LikelihoodRecord, BitsPerDim] | None:
    """The run's measurement to draw: the whole test set's before others, then the most images, then the newest."""
    pairs = [(likelihood, result) for likelihood in run.likelihoods for result in likelihood.results if result.curves]
    if not pairs:
        return None
    return max(pairs, key=lambda pair: (not is_of_training(run, pair[0]), pair[0].images, pair[1].step))


def _images(likelihood: LikelihoodRecord, result: BitsPerDim) -> str:
    return f"{counted(likelihood.images, 'image')} of {likelihood.data}, step {result.step:,}"


def _tables(record: ExperimentRecord) -> tuple[Table, ...]:
    """A table for each protocol that was measured."""
    groups: dict[str, list[tuple[RunRecord, LikelihoodRecord]]] = {}
    for run in record.runs:
        for likelihood in run.likelihoods:
            if likelihood.results:
                groups.setdefault(likelihood.fingerprint, []).append((run, likelihood))
    return tuple(_table(record, group) for group in groups.values())


def _table(record: ExperimentRecord, group: Sequence[tuple[RunRecord, LikelihoodRecord]]) -> Table:
    """The measurements under one protocol, the lowest first."""
    pairs = [(run, result) for run, likelihood in group for result in likelihood.results]
    pairs.sort(key=lambda pair: (math.isnan(pair[1].bpd), pair[1].bpd, pair[1].step))
    rows = [Row(cells=_cells(run, result), href=run_link(record, run.run_id)) for run, result in pairs[:SHOWN_ROWS]]
    if len(pairs) > 1 and math.isfinite(pairs[0][1].bpd):
        rows[0] = replace(rows[0], mark="best")
    if is_of_whole_cifar10(*group[0]) and group[0][1].strata is None:
        rows.append(Row(cells=_papers(of_training=is_of_training(*group[0]))))
    titles = ("Bits/dim", "95 % interval", "Rate L₁ + … + L_T", "Distortion L₀", "L_T", "RMSE (0..255)")
    return Table(
        caption=_caption(*group[0]),
        columns=(Column(title="Run", linked=True), *numeric("Step", *titles)),
        rows=tuple(rows),
        omitted=max(0, len(pairs) - SHOWN_ROWS),
        sortable=True,
    )


def _caption(run: RunRecord, likelihood: LikelihoodRecord) -> str:
    """What one protocol's numbers depend on."""
    strata = likelihood.strata
    terms = "all terms of the bound" if strata is None else f"L₀ and {strata:,} drawn terms, an estimate"
    which = "the training set" if is_of_training(run, likelihood) else "not the training set"
    weights = "EMA" if likelihood.weights == "ema" else likelihood.weights
    return (
        f"Negative log-likelihood on {counted(likelihood.images, 'image')} of {likelihood.data} ({which}), {weights} weights, "
        f"{terms} (protocol {likelihood.fingerprint})"
    )


def _cells(run: RunRecord, result: BitsPerDim) -> tuple[str, ...]:
    return (
        run.name,
        count(result.step),
        f"≤ {_bits(result.bpd)}" if math.isfinite(result.bpd) else _bits(result.bpd),
        NOT_MEASURED if result.low is None else f"{_bits(result.low)} to {_bits(result.high)}",
        _bits(result.rate),
        _bits(result.distortion),
        _bits(result.prior),
        fixed(result.rmse, 3),
    )


def _papers(*, of_training: bool) -> tuple[str, ...]:
    """The paper's cells of that table, measured alike; it gives the parts of the bound for the test set alone."""
    row = paper.SIMPLE
    if of_training:
        return ("the paper, L_simple", "–", f"≤ {row.nll_train}", "–", "–", "–", "–", "–")
    prior = f"about {number(paper.CIFAR10_PRIOR_BPD, 1)}"
    parts = (paper.CIFAR10_RATE, paper.CIFAR10_DISTORTION, prior, paper.CIFAR10_RMSE)
    return ("the paper, L_simple", "–", f"≤ {row.nll}", "–", *map(str, parts))


def _bits(value: float | None) -> str:
    """Bits/dim with four decimals, or, for an L_T that these would show as 0, with three digits."""
    return number(value, 3) if value is not None and 0 < abs(value) < 1e-3 else fixed(value, 4)


def _figure_5(curves: RateDistortionCurves, images: str, beside: bool) -> tuple[Chart, ...]:
    """Fig. 5: distortion and rate against the steps that were sent, and against each other; `beside` the paper's."""
    T = curves.num_timesteps
    places = sorted({round(i * (T - 1) / DRAWN_POINTS) for i in range(DRAWN_POINTS + 1)} | set(range(min(T, STEEP))))
    rows = paper.TABLE_4 if beside and T == paper.SAMPLER_STEPS else ()
    axes = (STEPS_SENT, RATE, DISTORTION)
    ours = [(T - curves.t[place] + 1, curves.rate[place], curves.rmse[place]) for place in places]
    papers = [(row.steps_sent, row.rate, row.rmse) for row in rows]
    charts = []
    for name, i, j in (("distortion", 0, 2), ("rate", 0, 1), ("both", 1, 2)):
        x, y = axes[i], axes[j]
        lines = [figures.Relation(label="ours", points=[(point[i], point[j]) for point in ours])]
        if papers:
            paper_points = [(point[i], point[j]) for point in papers]
            lines.append(figures.Relation(label="paper", points=paper_points, marks=True))
        alt = f"{y} against {x}, {images}; the values stand in the table."
        caption = f"{y[0].upper()}{y[1:]} against {x}{'; crosses: Table 4 of the paper' if rows else ''}."
        charts.append(Chart(svg=figures.relation(f"rd-{name}", lines, x=x, y=y, alt=alt), caption=caption))
    return tuple(charts)


def _table_4(curves: RateDistortionCurves | None, images: str, beside: bool) -> Table:
    """Table 4 beside ours; without the paper's columns for other data, tenths of T for another T."""
    T = curves.num_timesteps if curves else paper.SAMPLER_STEPS
    beside = beside and T == paper.SAMPLER_STEPS
    papers = {row.steps_sent: row for row in paper.TABLE_4}
    rows = []
    for steps in sorted({max(1, T * tenths // 10) for tenths in range(1, 11)}, reverse=True):
        rate, rmse = (fixed(value, 5) for value in (curves.after(steps) if curves else (None, None)))
        row = papers[steps] if beside else None
        values = (fixed(row.rate, 5), rate, fixed(row.rmse, 5), rmse) if row else (rate, rmse)
        rows.append(Row(cells=(count(steps), *values)))
    titles = (
        ("Rate, paper", "Rate, ours", "RMSE, paper", "RMSE, ours") if beside else ("Rate (bits/dim)", "RMSE (0..255)")
    )
    caption = "Table 4 of the paper beside ours" if beside else "Rate and distortion, as in Table 4"
    return Table(caption=f"{caption}: {images}", columns=numeric("Steps sent, T − t + 1", *titles), rows=tuple(rows))
