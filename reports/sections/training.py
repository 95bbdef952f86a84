"""The curves of training: what was logged every so many steps, of the leading run beside a few others."""

import math
from collections.abc import Sequence

from ddpm_core import records as names
from ddpm_core.verdicts import listed
from reports.drawing import figures
from reports.drawing.elements import Chart
from reports.formatting import counted, number
from reports.records.entities import ExperimentRecord, RunRecord
from reports.records.store import Series, Store
from reports.verdicts.ranking import Ranking

# metric, its axis, whether that may be logarithmic, and what it is
_CURVES = (
    (names.LOSS, "training loss", True, "Training loss."),
    (names.GRAD_NORM, "gradient norm", True, "Norm of the gradient, before the clip."),
    (names.PARAM_NORM, "parameter norm", False, "Norm of the parameters."),
    (names.LEARNING_RATE, "learning rate", False, "Learning rate."),
    (names.IMAGES_PER_SECOND, "images a second", False, "Images a second, all workers together."),
    (names.UTILISATION, "utilisation", False, "Model FLOPs done over those that the device can do."),
    (names.DATA_WAIT_SHARE, "share of time", False, "Share of worker 0's time spent waiting for data."),
    (names.MEMORY_GIB, "memory (GiB)", False, "The most memory that worker 0 ever held."),
)
_QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")


def training_charts(
    store: Store, record: ExperimentRecord, lead: RunRecord, rankings: Sequence[Ranking]
) -> tuple[Chart, ...]:
    """The training curves of the leading run, then of others by rank, then of the newest; the loss first."""
    entries = (entry.run for ranking in rankings for entry in ranking.entries)
    order = [lead, *entries, *reversed(record.runs)]
    trained = {run.run_id: run for run in order if not run.foreign}
    drawn = list(trained.values())[: figures.MAX_LINES]
    charts: list[Chart] = []
    for metric, axis, log, what in _CURVES:
        series = [(run.name, store.training_history(run.run_id, metric)) for run in drawn if metric in run.latest]
        finite = [pair for pair in series if any(map(math.isfinite, pair[1].values))]
        if not finite:
            continue
        first = not charts
        alt = f"{what} Against training step for {counted(len(finite), 'run')}: {_ends(finite)}."
        svg = figures.curve(f"training-{metric}", finite, metric=axis, alt=alt, log=log, small=not first)
        caption = f"{what} {_legend(drawn, len(trained))}" if first else what
        charts.append(Chart(svg=svg, caption=caption + _not_finite(series)))
        if metric == names.LOSS and (quarters := _quarters(store, drawn[0])):
            charts.append(quarters)
    return tuple(charts)


def _quarters(store: Store, run: RunRecord) -> Chart | None:
    """The leading run's loss by quarter of the timesteps: small t weighs on details, large t on the whole picture."""
    series = [
        (f"t in the {name}", store.training_history(run.run_id, names.loss_quarter(place)))
        for place, name in enumerate(_QUARTERS, start=1)
        if names.loss_quarter(place) in run.latest
    ]
    finite = [pair for pair in series if any(map(math.isfinite, pair[1].values))]
    if not finite:
        return None
    svg = figures.curve(
        "training-quarters",
        finite,
        metric="training loss",
        alt=f"Training loss of {run.name} by quarter of t: {_ends(finite)}.",
        raw=False,
    )
    caption = (
        f"Loss by quarter of the timesteps, of {run.name}; running medians. Small t are the last steps of sampling."
    )
    return Chart(svg=svg, caption=caption + _not_finite(series))


def _legend(drawn: Sequence[RunRecord], runs: int) -> str:
    """What the lines of the first chart are, of `runs` runs in all."""
    whose = f" of {drawn[0].name}" if len(drawn) > 1 else ""
    some = f" {len(drawn)} of {runs} runs are drawn." if len(drawn) < runs else ""
    return f"Faint: raw values{whose}; line: running median.{some}"


def _ends(series: Sequence[tuple[str, Series]]) -> str:
    """Where each line starts and ends."""
    return listed([f"{name} from {number(points.values[0])} to {number(points.values[-1])}" for name, points in series])


def _not_finite(series: Sequence[tuple[str, Series]]) -> str:
    """How many values are missing from the lines."""
    missing = sum(not math.isfinite(value) for _, points in series for value in points.values)
    return f" {counted(missing, 'value')} not finite and left out." if missing else ""
