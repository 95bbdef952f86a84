"""Which figures of results a report shows, of which runs, and what each says in words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ddpm_core.records import KID, PRECISION, RECALL, STD, chain_path
from reports.drawing import figures
from reports.records import artifacts
from reports.records.entities import ExperimentRecord, Schedule, TrainingRun
from reports.records.store import Store
from reports.verdicts.conclusions import metric_name
from reports.verdicts.formatting import counted, listed, number
from reports.verdicts.ranking import Entry, Ranking, Verdict


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure and its caption. `svg` is markup that this package made; every word in it is escaped."""

    svg: Markup
    caption: str


def ranking_charts(ranking: Ranking) -> tuple[Chart, ...]:
    """The distance, and the score if there is one, of every checkpoint of a protocol against the step; none where
    no run has two checkpoints."""
    shown, runs = _by_run(ranking)
    if ranking.best is None or all(len(group) < 2 for group in shown):
        return ()
    protocol = ranking.protocol
    batches = {group[0].run.batch_size for group in shown}
    batch_size = batches.pop() if len(batches) == 1 else None
    name = metric_name(protocol.distance)
    best = ranking.best
    lines = [
        figures.Line(
            label=group[0].run.name,
            steps=[entry.checkpoint.step for entry in group],
            values=[entry.checkpoint.distance for entry in group],
            lows=[entry.checkpoint.low for entry in group],
            highs=[entry.checkpoint.high for entry in group],
            close=[ranking.verdict(entry) is Verdict.INDISTINGUISHABLE for entry in group],
        )
        for group in shown
    ]
    some = f" Only the {len(shown)} runs with the lowest values are drawn, of {runs:,}." if len(shown) < runs else ""
    lowest = f"lowest {number(best.checkpoint.distance)} at step {best.checkpoint.step:,}"
    close = ranking.count(Verdict.INDISTINGUISHABLE)
    told = f" {counted(close, 'checkpoint')} cannot be told apart from it." if close else ""
    missing = " Points without a finite value are left out." if ranking.unranked else ""
    svg = figures.by_step(
        f"distance-{protocol.fingerprint}",
        lines,
        metric=name,
        alt=f"{name} against training step for {counted(len(shown), 'run')}: {lowest}.{told}",
        best="min",
        batch_size=batch_size,
    )
    caption = (
        f"{name}, lower is better. Bars or bands: 95 % intervals. Ring: the lowest; the shaded strip is its interval. "
        f"Shaded points: checkpoints whose interval overlaps it, which cannot be told apart from the lowest.{some}{missing}"
    )
    score = _score_chart(ranking, shown, batch_size)
    return (Chart(svg=Markup(svg), caption=caption), *([score] if score else []))


def further_charts(store: Store, ranking: Ranking) -> tuple[Chart, ...]:
    """What looks at single features, of the best checkpoint's run: KID, precision and recall against the step; and how
    the distance of predicted images falls along the chain of the best checkpoint."""
    best, protocol = ranking.best, ranking.protocol
    if best is None:
        return ()
    evaluation, run = best.evaluation, best.run
    charts = []

    def line(metric: str, label: str) -> figures.Line | None:
        name = protocol.metric(metric)
        if name not in evaluation.metrics:
            return None
        series = store.history(evaluation.run_id, name)
        if len(series.steps) < 2:
            return None
        spread = store.history(evaluation.run_id, name + STD) if name + STD in evaluation.metrics else None
        pairs = [
            (value, spread.at(step) if spread else None)
            for step, value in zip(series.steps, series.values, strict=True)
        ]
        return figures.Line(
            label=label,
            steps=series.steps,
            values=series.values,
            lows=[None if std is None else value - std for value, std in pairs],
            highs=[None if std is None else value + std for value, std in pairs],
        )

    kid = line(KID, "KID")
    both = [found for metric in (PRECISION, RECALL) if (found := line(metric, metric)) is not None]
    for key, lines, metric, caption in (
        (
            "kid",
            [kid] if kid else [],
            "KID",
            f"Kernel distance of {run.name}, lower is better; ± one standard deviation over subsets.",
        ),
        (
            "pr",
            both,
            "fraction",
            f"Precision (samples that look like data) and recall (data that samples cover) of {run.name}.",
        ),
    ):
        if lines:
            svg = figures.by_step(
                f"{key}-{protocol.fingerprint}",
                lines,
                metric=metric,
                alt=f"{caption} Against training step.",
                small=True,
            )
            charts.append(Chart(svg=Markup(svg), caption=caption))
    chain = chain_chart(store, best)
    return (*charts, *([chain] if chain else []))


def chain_chart(store: Store, entry: Entry) -> Chart | None:
    """The distance of the x_0 predicted along the chain (Fig. 10 of the paper), None where it was not measured."""
    content = store.artifact(entry.evaluation.run_id, chain_path(entry.checkpoint.step))
    try:
        points = artifacts.progress(json.loads(content or b"[]"))
    except artifacts.UNREADABLE:
        return None
    if len(points) < 2:
        return None
    name = metric_name(entry.evaluation.protocol.distance)
    first = points[0][0]
    svg = figures.relation(
        f"chain-{entry.evaluation.run_id}",
        [figures.Relation(label=name, x=[first - t for t, _ in points], y=[value for _, value in points])],
        x="diffusion steps undone",
        y=name,
        alt=f"{name} of predicted images along the chain: from {number(points[0][1])} to {number(points[-1][1])}.",
    )
    return Chart(
        svg=Markup(svg),
        caption=f"{name} of the x₀ predicted along the chain, at step {entry.checkpoint.step:,} (as Fig. 10 of the paper).",
    )


def schedule_charts(schedules: Mapping[str, Schedule], sweep_run_id: str) -> tuple[Chart, ...]:
    """Noise added, signal left, and the log signal-to-noise ratio, of every schedule of a sweep against t."""
    if not schedules:
        return ()
    shown = listed(list(schedules)[: figures.MAX_LINES])
    charts = []
    for quantity, symbol, meaning in (
        ("betas", "β_t", "the variance of the noise that step t adds"),
        ("alphas_cumprod", "ᾱ_t", "the share of the image's variance that is left at step t"),
        ("log_snr", "log-SNR", "log(ᾱ_t / (1 − ᾱ_t)), natural logarithm"),
    ):
        svg = figures.schedule_curves(
            f"{quantity}-{sweep_run_id}",
            schedules,
            quantity=quantity,
            symbol=symbol,
            alt=f"{symbol} against t for {shown}.",
        )
        charts.append(Chart(svg=Markup(svg), caption=f"{symbol}: {meaning}."))
    return tuple(charts)


def drawn_runs(record: ExperimentRecord, lead: TrainingRun, rankings: Sequence[Ranking]) -> list[TrainingRun]:
    """The runs whose training curves are drawn: the leading one, then by rank, then the newest."""
    order = [lead, *(entry.run for ranking in rankings for entry in ranking.entries), *reversed(record.runs)]
    return list({run.run_id: run for run in order if not run.foreign}.values())[: figures.MAX_LINES]


def _by_run(ranking: Ranking) -> tuple[list[list[Entry]], int]:
    """The entries of the runs that are drawn, each by step, and of how many runs they are."""
    runs: dict[str, list[Entry]] = {}
    for entry in ranking.entries:
        runs.setdefault(entry.run.run_id, []).append(entry)
    groups = list(runs.values())[: figures.MAX_LINES]
    return [sorted(group, key=lambda entry: entry.checkpoint.step) for group in groups], len(runs)


def _score_chart(ranking: Ranking, shown: Sequence[Sequence[Entry]], batch_size: int | None) -> Chart | None:
    name = metric_name(ranking.protocol.score)
    lines = []
    for group in shown:
        scored = [(e.checkpoint.step, e.checkpoint.score, e.checkpoint.score_std) for e in group]
        known = [(step, score, std or 0.0) for step, score, std in scored if score is not None]
        if known:
            lines.append(
                figures.Line(
                    label=group[0].run.name,
                    steps=[step for step, _, _ in known],
                    values=[score for _, score, _ in known],
                    lows=[score - std for _, score, std in known],
                    highs=[score + std for _, score, std in known],
                )
            )
    if not lines:
        return None
    svg = figures.by_step(
        f"score-{ranking.protocol.fingerprint}",
        lines,
        metric=name,
        alt=f"{name} against training step for {counted(len(lines), 'run')}.",
        batch_size=batch_size,
    )
    return Chart(
        svg=Markup(svg),
        caption=f"{name}, higher is better. Bars or bands: ± one standard deviation over splits.",
    )
