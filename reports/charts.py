"""Which figures a report shows, of which runs, and what each says in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports import figures
from reports.conclusions import metric_name
from reports.entities import ExperimentRecord, Schedule, TrainingRun
from reports.formatting import counted, listed, number
from reports.ranking import Entry, Ranking
from reports.store import Series, Store


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure and its caption. `svg` is markup that this package made; every word in it is escaped."""

    svg: Markup
    caption: str


def ranking_charts(ranking: Ranking) -> tuple[Chart, ...]:
    """The distance, and the score if there is one, of every checkpoint of a protocol against the step."""
    runs: dict[str, list[Entry]] = {}
    for entry in ranking.entries:
        runs.setdefault(entry.run.run_id, []).append(entry)
    shown = [sorted(group, key=lambda e: e.checkpoint.step) for group in list(runs.values())[: figures.MAX_LINES]]
    if not shown or ranking.best is None:
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
        )
        for group in shown
    ]
    some = (
        f" Only the {len(shown)} runs with the lowest values are drawn, of {len(runs):,}."
        if len(shown) < len(runs)
        else ""
    )
    lowest = f"lowest {number(best.checkpoint.distance)} at step {best.checkpoint.step:,}"
    missing = " Points without a finite value are left out." if ranking.unranked else ""
    charts = [
        Chart(
            svg=Markup(
                figures.by_step(
                    f"distance-{protocol.fingerprint}",
                    lines,
                    metric=name,
                    alt=f"{name} against training step for {counted(len(shown), 'run')}: {lowest}.",
                    best="min",
                    batch_size=batch_size,
                )
            ),
            caption=f"{name}, lower is better. Bars or bands: 95 % intervals. Ring: the lowest; the shaded "
            "strip is its interval, and a checkpoint whose interval reaches into it is not distinguishable "
            f"from it.{some}{missing}",
        )
    ]
    score = _score_chart(ranking, shown, batch_size)
    return (*charts, score) if score else tuple(charts)


def training_charts(store: Store, runs: Sequence[TrainingRun], of: int) -> tuple[Chart, ...]:
    """Loss, gradient norm and speed of the given runs (the first one leads), of `of` runs in all."""
    some = f" {len(runs)} of {of} runs are drawn." if len(runs) < of else ""
    raw = f"Faint: raw values{' of ' + runs[0].name if len(runs) > 1 else ''}; line: running median.{some}"
    charts: list[Chart] = []
    for metric, title, log in (
        ("loss", "training loss", True),
        ("grad_norm", "gradient norm", True),
        ("images_per_second", "images a second", False),
    ):
        series = [(run.name, store.history(run.run_id, metric)) for run in runs if metric in run.latest]
        finite = [pair for pair in series if any(abs(value) < float("inf") for value in pair[1].values)]
        if not finite:
            continue
        ends = listed([_ends(*pair) for pair in finite])
        alt = f"{title} against training step for {counted(len(finite), 'run')}: {ends}."
        small = bool(charts)
        svg = figures.curve(f"training-{metric}", finite, metric=title, alt=alt, log=log, small=small)
        lines = "Lines as in the first figure." if small else raw
        caption = f"{title[0].upper()}{title[1:]}. {lines}{_broken(series)}"
        charts.append(Chart(svg=Markup(svg), caption=caption))
    return tuple(charts)


def schedule_charts(schedules: Mapping[str, Schedule], sweep_run_id: str) -> tuple[Chart, ...]:
    """The signal that is left, and the log signal-to-noise ratio, of every schedule of a sweep against t."""
    if not schedules:
        return ()
    shown = listed(list(schedules)[: figures.MAX_LINES])
    charts = []
    for quantity, symbol, meaning in (
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
    return list({run.run_id: run for run in order}.values())[: figures.MAX_LINES]


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
        best="",
        batch_size=batch_size,
    )
    return Chart(
        svg=Markup(svg),
        caption=f"{name}, higher is better. Bars or bands: ± one standard deviation over splits.",
    )


def _ends(name: str, series: Series) -> str:
    return f"{name} from {number(series.values[0])} to {number(series.values[-1])}"


def _broken(series: Sequence[tuple[str, Series]]) -> str:
    bad = sum(not abs(value) < float("inf") for _, points in series for value in points.values)
    return f" {counted(bad, 'value')} not finite and left out." if bad else ""
