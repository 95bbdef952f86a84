"""The report: MLflow records -> one HTML file that needs nothing beside itself, and its summaries."""

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ddpm_core.commit import write_text
from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from ddpm_core.records import ALARM_TAG, LOSS
from reports.records.entities import ExperimentRecord, TrainingRun
from reports.records.records import read_experiment
from reports.records.store import Store
from reports.sections import charts, samples, tables
from reports.sections.charts import Chart
from reports.sections.compression import CompressionSection, compression_section
from reports.sections.likelihoods import LikelihoodSection, likelihood_section
from reports.sections.making import Making, making_of
from reports.sections.memorization import memorization
from reports.sections.paper_tables import PaperTable, comparisons
from reports.sections.seeds import points_table
from reports.sections.training_curves import training_charts
from reports.summary import markdown, since_previous, summary, with_previous
from reports.verdicts import commands
from reports.verdicts.conclusions import Answer, answer, metric_name
from reports.verdicts.formatting import NOT_MEASURED, count, counted
from reports.verdicts.ranking import Ranking, rank
from reports.verdicts.sweeps import SweepResult, TrialRanking, analyse

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class ProtocolSection:
    """One protocol's results: nothing in it was measured under another."""

    title: str
    description: str
    charts: tuple[Chart, ...]
    further: tuple[Chart, ...]
    table: tables.Table


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    """A sweep: for each protocol the conclusion and the tables it is drawn from."""

    title: str
    charts: tuple[Chart, ...]
    rankings: tuple[tuple[str, tuple[tables.Table, ...]], ...]
    without: tables.Table | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the template sets."""

    experiment: str
    updated: str
    answer: Answer
    alarms: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    attention: tuple[str, ...]
    grid: samples.Shown | None
    progression: tuple[samples.Shown, ...]
    pictures: tuple[samples.Shown, ...]
    pictures_step: int
    pictures_command: str
    memorization: tuple[str, ...]
    protocols: tuple[ProtocolSection, ...]
    training: tuple[Chart, ...]
    paper: tuple[PaperTable, ...]
    likelihood: LikelihoodSection
    compression: CompressionSection
    sweeps: tuple[SweepSection, ...]
    making: Making


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A report for people, and what report.json says of it."""

    report: Report
    facts: dict[str, object]


def build_report(
    tracking_uri: str, experiment: str, output: Path, *, run: str | None = None, watts: float | None = None
) -> Path:
    """Write the report of one experiment to `output` (an .html file) and return it; beside it, under the same name, the
    summaries .json (see report.schema.json) and .md.

    `run` keeps it to one training run or sweep, by name or MLflow id; `watts` is what a device draws, for the energy.
    Reads MLflow only, and the .json that is there already, for what changed. Each file appears whole or not at all, the
    .json last. The same records give the same bytes.

    Raises InputError for a tracking store, experiment or run that does not exist, an experiment without a training
    run, or an output that is no .html file.
    """
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise InputError(f"Output {output} is not the name of an .html file; give one, for example report.html.")
    store = Store(tracking_uri)
    composed = compose(store, read_experiment(store, experiment, run), watts)
    facts = with_previous(composed.facts, output.with_suffix(".json"))
    write_text(output, render(composed.report, since_previous(facts)))
    write_text(output.with_suffix(".md"), markdown(facts, output.name))
    write_text(output.with_suffix(".json"), json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return output


def compose(store: Store, record: ExperimentRecord, watts: float | None = None) -> Composed:
    """Everything the report says and shows, in order."""
    rankings = rank(record.runs)
    leading = rankings[0] if rankings else None
    best = leading.best if leading else None
    lead = best.run if best else record.runs[-1]
    drawn = charts.drawn_runs(record, lead, rankings)
    said = answer(record, rankings)
    attention, alarms = _attention(record), _alarms(record)
    beside = comparisons(record.runs, rankings, lead)
    sweeps = tuple(_sweep_section(analyse(sweep, record)) for sweep in record.sweeps)
    step, pictures = samples.process_pictures(store, leading) if leading else (0, ())
    report = Report(
        experiment=record.name if record.only is None else f"{record.name}, {record.only}",
        updated=f"{record.updated:%Y-%m-%d %H:%M} UTC" if record.updated else "an unknown time",
        answer=said,
        alarms=alarms,
        facts=_facts(record, rankings, lead),
        attention=attention,
        grid=samples.best_grid(store, best) if best else None,
        progression=samples.progression(store, best) if best else (),
        pictures=pictures,
        pictures_step=step,
        pictures_command=commands.evaluate(lead, "--pictures 8", "--nearest 1000"),
        memorization=memorization(store, leading) if leading else (),
        protocols=tuple(_protocol_section(store, ranking) for ranking in rankings),
        training=training_charts(store, drawn, of=sum(not run.foreign for run in record.runs)) if drawn else (),
        paper=beside,
        likelihood=likelihood_section(record, lead),
        compression=compression_section(lead),
        sweeps=sweeps,
        making=making_of(store, record, lead, [ranking.protocol for ranking in rankings], watts),
    )
    conclusions = {sweep.title: tuple(conclusion for conclusion, _ in sweep.rankings) for sweep in sweeps}
    return Composed(report=report, facts=summary(record, rankings, said, alarms, attention, beside, conclusions))


def render(report: Report, since: str = "") -> str:
    """The page. Everything from MLflow is escaped; a name the template does not know is an error. The one script that may
    run is the page's own, named by its hash."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("report.html.j2").render(
        report=report, since=since, script=Markup(script), script_hash=f"sha256-{digest}"
    )


def _protocol_section(store: Store, ranking: Ranking) -> ProtocolSection:
    protocol = ranking.protocol
    runs = {entry.run.run_id for entry in (*ranking.entries, *ranking.unranked)}
    return ProtocolSection(
        title=_title(protocol),
        description=protocol.describe(),
        charts=charts.ranking_charts(ranking),
        further=charts.further_charts(store, ranking),
        table=tables.ranking_table(store, ranking, name_runs=len(runs) > 1),
    )


def _title(protocol: Protocol) -> str:
    purpose = ", measured again on fresh samples" if protocol.purpose == "report" else ""
    return f"{metric_name(protocol.distance)}, {protocol.num_samples:,} samples{purpose}"


def _sweep_section(result: SweepResult) -> SweepSection:
    trials = result.sweep.trials
    seeds_vary = len({trial.point for trial in trials}) < len(trials)
    note = (
        "" if seeds_vary else "Each setting was trained once: the intervals hold no variation between training seeds."
    )
    return SweepSection(
        title=result.sweep.name,
        charts=charts.schedule_charts(result.sweep.schedules, result.sweep.run_id),
        rankings=tuple(_sweep_ranking(trials) for trials in result.rankings),
        without=tables.trials_without_result(result),
        note=note if result.rankings else "",
    )


def _sweep_ranking(trials: TrialRanking) -> tuple[str, tuple[tables.Table, ...]]:
    over_seeds, each = points_table(trials), tables.trial_table(trials)
    return trials.conclusion, (over_seeds, each) if over_seeds else (each,)


def _facts(record: ExperimentRecord, rankings: tuple[Ranking, ...], lead: TrainingRun) -> tuple[tuple[str, str], ...]:
    best = rankings[0].best if rankings else None
    data = "not recorded"
    if lead.card:
        data = lead.card.name + (f", {counted(lead.card.images, 'image')}" if lead.card.images is not None else "")
    measured = sum(len(ranking.entries) + len(ranking.unranked) for ranking in rankings)
    return (
        ("Training data", data),
        *([("Images seen at that step", count(best.images_seen))] if best else []),
        ("Training runs", count(sum(not run.foreign for run in record.runs))),
        ("Checkpoint results", count(measured) if measured else NOT_MEASURED),
    )


def _alarms(record: ExperimentRecord) -> tuple[str, ...]:
    """What the nightly evaluation warned of, of trainings and of their checkpoints."""
    found = [
        (run.name, text)
        for run in record.runs
        for text in (run.tags.get(ALARM_TAG, ""), *(evaluation.alarm for evaluation in run.evaluations))
    ]
    return tuple(f"{name}: {text}" for name, text in found if text)


def _attention(record: ExperimentRecord) -> tuple[str, ...]:
    """What went wrong, before anyone relies on the numbers."""
    found = list(record.remarks)
    for run in record.runs:
        if run.status in ("FAILED", "KILLED") and not run.foreign:
            found.append(f"Training run {run.name} {'failed' if run.status == 'FAILED' else 'was killed'}.")
        if LOSS in run.latest and not abs(run.latest[LOSS]) < float("inf"):
            found.append(f"The last loss of {run.name} is not a finite number.")
        for evaluation in run.evaluations:
            if not evaluation.checkpoints:
                found.append(f"An evaluation of {run.name} ({evaluation.run_id}) has no result.")
            elif evaluation.status in ("FAILED", "KILLED"):
                found.append(f"An evaluation of {run.name} ({evaluation.run_id}) did not end well: some are missing.")
    if len(found) > tables.SHOWN:
        found[tables.SHOWN :] = [f"And {len(found) - tables.SHOWN:,} more of the kind."]
    return tuple(found)
