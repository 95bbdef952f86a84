"""The curves of training: what was logged every so many steps, of the leading run beside a few others."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from ddpm_core.records import (
    DATA_WAIT_SHARE,
    GRAD_NORM,
    IMAGES_PER_SECOND,
    LEARNING_RATE,
    LOSS,
    MEMORY_GIB,
    PARAM_NORM,
    UTILISATION,
    loss_quarter,
)
from reports.drawing import figures
from reports.records.entities import TrainingRun
from reports.records.store import Series, Store
from reports.sections.charts import Chart
from reports.verdicts.formatting import counted, listed, number

# metric, its axis, whether that may be logarithmic, and what it is
_CURVES = (
    (LOSS, "training loss", True, "Training loss."),
    (GRAD_NORM, "gradient norm", True, "Norm of the gradient, before the clip."),
    (PARAM_NORM, "parameter norm", False, "Norm of the parameters."),
    (LEARNING_RATE, "learning rate", False, "Learning rate."),
    (IMAGES_PER_SECOND, "images a second", False, "Images a second, all workers together."),
    (UTILISATION, "utilisation", False, "Model FLOPs done over those that the device can do."),
    (DATA_WAIT_SHARE, "share of time", False, "Share of worker 0's time spent waiting for data."),
    (MEMORY_GIB, "memory (GiB)", False, "The most memory that worker 0 ever held."),
)
_QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")


def training_charts(store: Store, runs: Sequence[TrainingRun], of: int) -> tuple[Chart, ...]:
    """The training curves of the given runs (the first one leads), of `of` runs in all; loss first."""
    some = f" {len(runs)} of {of} runs are drawn." if len(runs) < of else ""
    raw = f"Faint: raw values{' of ' + runs[0].name if len(runs) > 1 else ''}; line: running median.{some}"
    charts: list[Chart] = []
    for metric, axis, log, what in _CURVES:
        series = [(run.name, store.history(run.run_id, metric)) for run in runs if metric in run.latest]
        finite = [pair for pair in series if any(map(math.isfinite, pair[1].values))]
        if not finite:
            continue
        ends = listed([_ends(*pair) for pair in finite])
        alt = f"{what} Against training step for {counted(len(finite), 'run')}: {ends}."
        first = not charts
        svg = figures.curve(f"training-{metric}", finite, metric=axis, alt=alt, log=log, small=not first)
        caption = f"{what} {raw}" if first else what
        charts.append(Chart(svg=Markup(svg), caption=caption + _broken(series)))
        if metric == LOSS and (quarters := _quarters(store, runs[0])):
            charts.append(quarters)
    return tuple(charts)


def _quarters(store: Store, run: TrainingRun) -> Chart | None:
    """The leading run's loss by quarter of the timesteps: small t weighs on details, large t on the whole picture."""
    series = [
        (f"t in the {name}", store.history(run.run_id, loss_quarter(place)))
        for place, name in enumerate(_QUARTERS, start=1)
        if loss_quarter(place) in run.latest
    ]
    finite = [pair for pair in series if any(map(math.isfinite, pair[1].values))]
    if not finite:
        return None
    ends = listed([_ends(*pair) for pair in finite])
    svg = figures.curve(
        "training-quarters",
        finite,
        metric="training loss",
        alt=f"Training loss of {run.name} by quarter of t: {ends}.",
        raw=False,
    )
    caption = (
        f"Loss by quarter of the timesteps, of {run.name}; running medians. Small t are the last steps of sampling."
    )
    return Chart(svg=Markup(svg), caption=caption + _broken(series))


def _ends(name: str, series: Series) -> str:
    return f"{name} from {number(series.values[0])} to {number(series.values[-1])}"


def _broken(series: Sequence[tuple[str, Series]]) -> str:
    bad = sum(not math.isfinite(value) for _, points in series for value in points.values)
    return f" {counted(bad, 'value')} not finite and left out." if bad else ""
