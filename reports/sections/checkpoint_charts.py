"""Charts of one protocol: what was measured of every checkpoint against the step, and along the chain of the best one."""

from collections.abc import Sequence

from ddpm_core.records import CI_HIGH, CI_LOW, KID, PRECISION, RECALL, STD, chain_path
from ddpm_core.verdicts import Verdict, known_interval
from reports.drawing import figures
from reports.drawing.elements import Chart
from reports.formatting import counted, number
from reports.records import artifacts
from reports.records.store import Series, Store
from reports.verdicts import paper
from reports.verdicts.comparison import reported_alike
from reports.verdicts.ranking import Entry, Ranking
from reports.verdicts.wording import metric_name


def ranking_charts(ranking: Ranking) -> tuple[Chart, ...]:
    """The distance, and the score if there is one, of every checkpoint of a protocol against the step; none if no run has
    two checkpoints."""
    runs = _by_run(ranking)
    drawn = runs[: figures.MAX_LINES]
    if ranking.best is None or all(len(entries) < 2 for entries in drawn):
        return ()
    batches = {entries[0].run.batch_size for entries in drawn}
    batch_size = batches.pop() if len(batches) == 1 else None
    distance = _distance_chart(ranking, ranking.best, drawn, len(runs), batch_size)
    score = _score_chart(ranking, drawn, batch_size)
    return (distance, score) if score else (distance,)


def _by_run(ranking: Ranking) -> list[list[Entry]]:
    """The entries of each run by step, the run with the lowest distance first."""
    runs: dict[str, list[Entry]] = {}
    for entry in ranking.entries:
        runs.setdefault(entry.run.run_id, []).append(entry)
    return [sorted(entries, key=lambda entry: entry.checkpoint.step) for entries in runs.values()]


def _distance_chart(
    ranking: Ranking, best: Entry, drawn: Sequence[Sequence[Entry]], runs: int, batch_size: int | None
) -> Chart:
    """The distances of the runs that are drawn, of `runs` in all."""
    name = metric_name(ranking.protocol.distance)
    lines = [
        figures.Line(
            label=entries[0].run.name,
            points=[
                figures.LinePoint(
                    entry.checkpoint.step,
                    entry.checkpoint.distance,
                    entry.checkpoint.interval,
                    ranking.verdict(entry) is Verdict.INDISTINGUISHABLE,
                )
                for entry in entries
            ],
        )
        for entries in drawn
    ]
    reported = reported_alike(best)
    lowest = f"lowest {number(best.checkpoint.distance)} at step {best.checkpoint.step:,}"
    close = ranking.count(Verdict.INDISTINGUISHABLE)
    undecided = f" {counted(close, 'checkpoint')} cannot be told apart from it." if close else ""
    svg = figures.by_step(
        f"distance-{ranking.protocol.fingerprint}",
        lines,
        metric=name,
        alt=f"{name} against training step for {counted(len(drawn), 'run')}: {lowest}.{undecided}",
        mark_lowest=True,
        batch_size=batch_size,
        beside=("the paper", reported.fid) if reported else None,
    )
    caption = (
        f"{name}, lower is better. Bars or bands: 95 % intervals of the mean {name} at {ranking.protocol.num_samples:,} samples "
        "of this training. Ring: the lowest; the shaded strip is its interval. "
        "Shaded points: checkpoints whose interval overlaps it, which cannot be told apart from the lowest."
    )
    if reported:
        caption += f" Dotted: the paper's {reported.fid} ({reported.place}), which was measured alike."
    if len(drawn) < runs:
        caption += f" Only the {len(drawn)} runs with the lowest values are drawn, of {runs:,}."
    if ranking.unranked:
        caption += " Points without a finite value are left out."
    return Chart(svg=svg, caption=caption)


def _score_chart(ranking: Ranking, drawn: Sequence[Sequence[Entry]], batch_size: int | None) -> Chart | None:
    """The scores of the runs that are drawn, None if there are none."""
    name = metric_name(ranking.protocol.score)
    scored = [[entry.checkpoint for entry in entries if entry.checkpoint.score is not None] for entries in drawn]
    measured = any(point.score_interval for points in scored for point in points)
    lines = []
    for entries, checkpoints in zip(drawn, scored, strict=True):
        points = [
            figures.LinePoint(point.step, point.score or 0.0, point.score_interval)
            if measured
            else _with_std(point.step, point.score or 0.0, point.score_std or 0.0)
            for point in checkpoints
        ]
        if points:
            lines.append(figures.Line(label=entries[0].run.name, points=points))
    if not lines:
        return None
    # The paper gives a score for CIFAR-10 alone.
    alike = ranking.best is not None and reported_alike(ranking.best) is paper.CIFAR10
    score = paper.SIMPLE.inception_score if alike else None
    svg = figures.by_step(
        f"score-{ranking.protocol.fingerprint}",
        lines,
        metric=name,
        alt=f"{name} against training step for {counted(len(lines), 'run')}.",
        batch_size=batch_size,
        beside=None if score is None else ("the paper", score),
    )
    reach = (
        "95 % intervals of its mean over splits; the table's ± is one standard deviation over them"
        if measured
        else "± one standard deviation over splits"
    )
    caption = f"{name}, higher is better. Bars or bands: {reach}."
    if score is not None:
        caption += f" Dotted: the paper's {score} (Table 1), which was measured alike."
    return Chart(svg=svg, caption=caption)


def further_charts(store: Store, ranking: Ranking) -> tuple[Chart, ...]:
    """What looks at single features, of the best checkpoint's run: KID, precision and recall against the step; and how the
    distance of predicted images falls along the chain of the best checkpoint."""
    best = ranking.best
    if best is None:
        return ()
    kernel = _feature_chart(
        store,
        best,
        {KID: "KID"},
        name="kid",
        axis="KID",
        caption=f"Kernel distance of {best.run.name}, lower is better; {_kid_reach(best)}.",
    )
    fractions = _feature_chart(
        store,
        best,
        {PRECISION: "precision", RECALL: "recall"},
        name="pr",
        axis="fraction",
        caption=f"Precision (samples that look like data) and recall (data that samples cover) of {best.run.name}."
        + _fractions_reach(best),
    )
    return tuple(chart for chart in (kernel, fractions, chain_chart(store, best)) if chart is not None)


def _feature_chart(
    store: Store, best: Entry, metrics: dict[str, str], *, name: str, axis: str, caption: str
) -> Chart | None:
    """Metrics (and their labels) of the best checkpoint's evaluation against the step; None if none was logged twice."""
    protocol = best.evaluation.protocol
    lines = [line for metric, label in metrics.items() if (line := _feature_line(store, best, metric, label))]
    if not lines:
        return None
    svg = figures.by_step(
        f"{name}-{protocol.fingerprint}", lines, metric=axis, alt=f"{caption} Against training step.", small=True
    )
    return Chart(svg=svg, caption=caption)


def _feature_line(store: Store, best: Entry, metric: str, label: str) -> figures.Line | None:
    """A metric with its interval, or if none was logged with ± its standard deviation, if that was."""
    evaluation = best.evaluation
    name = evaluation.protocol.metric(metric)
    if name not in evaluation.metrics:
        return None
    series = store.history(evaluation.run_id, name)
    if len(series.steps) < 2:
        return None
    if _has_interval(best, metric):
        low, high = (store.history(evaluation.run_id, name + end) for end in (CI_LOW, CI_HIGH))
        points = [
            figures.LinePoint(step, value, known_interval(low.at(step), high.at(step)))
            for step, value in zip(series.steps, series.values, strict=True)
        ]
        return figures.Line(label=label, points=points)
    spread = store.history(evaluation.run_id, name + STD) if name + STD in evaluation.metrics else Series()
    pairs = zip(series.steps, series.values, strict=True)
    return figures.Line(label=label, points=[_with_std(step, value, spread.at(step)) for step, value in pairs])


def _has_interval(best: Entry, metric: str) -> bool:
    """Whether the best checkpoint's evaluation has both ends of a metric's interval."""
    name = best.evaluation.protocol.metric(metric)
    return {name + CI_LOW, name + CI_HIGH} <= best.evaluation.metrics


def _kid_reach(best: Entry) -> str:
    if _has_interval(best, KID):
        return (
            "95 % intervals of its mean at this number of samples, of this training and against these reference images"
        )
    return "± one standard deviation over subsets, which is no error of their mean"


def _fractions_reach(best: Entry) -> str:
    if not _has_interval(best, PRECISION):
        return ""
    if _has_interval(best, RECALL):
        return " 95 % intervals of their means at this number of samples, against these reference images."
    return " 95 % intervals of the precision; recall has none."


def _with_std(step: int, value: float, std: float | None) -> figures.LinePoint:
    """A point ± its standard deviation, if that is known."""
    interval = None if std is None else known_interval(value - std, value + std)
    return figures.LinePoint(step, value, interval)


def chain_chart(store: Store, entry: Entry) -> Chart | None:
    """The distance of the x_0 predicted along the chain (Fig. 10 of the paper), None if it was not measured."""
    path = chain_path(entry.checkpoint.step)
    points = artifacts.read(store, entry.evaluation.run_id, path, artifacts.chain) or ()
    if len(points) < 2:
        return None
    name = metric_name(entry.evaluation.protocol.distance)
    first = points[0][0]
    svg = figures.relation(
        f"chain-{entry.evaluation.run_id}",
        [figures.Relation(label=name, points=[(first - t, value) for t, value in points])],
        x="diffusion steps undone",
        y=name,
        alt=f"{name} of predicted images along the chain: from {number(points[0][1])} to {number(points[-1][1])}.",
    )
    caption = (
        f"{name} of the x₀ predicted along the chain, at step {entry.checkpoint.step:,} (as Fig. 10 of the paper)."
    )
    return Chart(svg=svg, caption=caption)
