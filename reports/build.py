"""The report: MLflow records -> one HTML file that needs nothing beside itself."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ddpm_core.commit import write_text
from ddpm_core.errors import InputError
from reports import charts, samples, tables
from reports.conclusions import Answer, answer, metric_name
from reports.entities import ExperimentRecord, TrainingRun
from reports.formatting import NOT_MEASURED, count, counted
from reports.making import Making, making_of, protocol_table
from reports.ranking import Ranking, rank
from reports.records import read_experiment
from reports.store import Store
from reports.sweeps import SweepResult, analyse

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class ProtocolSection:
    """One protocol's results: nothing in it was measured under another."""

    title: str
    description: str
    charts: tuple[charts.Chart, ...]
    table: tables.Table
    protocol: tables.Table


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    title: str
    charts: tuple[charts.Chart, ...]
    rankings: tuple[tuple[str, tables.Table], ...]  # the conclusion, and the table it is drawn from
    without: tables.Table | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the template sets."""

    experiment: str
    updated: str
    answer: Answer
    facts: tuple[tuple[str, str], ...]
    attention: tuple[str, ...]
    grid: samples.Shown | None
    progression: tuple[samples.Shown, ...]
    protocols: tuple[ProtocolSection, ...]
    training: tuple[charts.Chart, ...]
    sweeps: tuple[SweepSection, ...]
    making: Making


def build_report(tracking_uri: str, experiment: str, output: Path) -> Path:
    """Write the report of one experiment to `output` (an .html file) and return it.

    Reads MLflow only. The file appears whole or not at all. The same records give the same bytes.

    Raises InputError for a tracking store or experiment that does not exist, an experiment without a training
    run, or an output that is no .html file.
    """
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise InputError(f"Output {output} is not the name of an .html file; give one, for example report.html.")
    store = Store(tracking_uri)
    html = render(compose(store, read_experiment(store, experiment)))
    write_text(output, html)
    return output


def compose(store: Store, record: ExperimentRecord) -> Report:
    """Everything the report says and shows, in order."""
    rankings = rank(record.runs)
    best = rankings[0].best if rankings else None
    lead = best.run if best else record.runs[-1]
    drawn = charts.drawn_runs(record, lead, rankings)
    return Report(
        experiment=record.name,
        updated=f"{record.updated:%Y-%m-%d %H:%M} UTC" if record.updated else "an unknown time",
        answer=answer(record, rankings),
        facts=_facts(record, rankings, lead),
        attention=_attention(record),
        grid=samples.best_grid(store, best) if best else None,
        progression=samples.progression(store, best) if best else (),
        protocols=tuple(_protocol_section(ranking) for ranking in rankings),
        training=charts.training_charts(store, drawn, of=len(record.runs)),
        sweeps=tuple(_sweep_section(analyse(sweep, record)) for sweep in record.sweeps),
        making=making_of(store, record, lead),
    )


def render(report: Report) -> str:
    """The page. Everything from MLflow is escaped; a name the template does not know is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(report=report)


def _protocol_section(ranking: Ranking) -> ProtocolSection:
    protocol = ranking.protocol
    runs = {entry.run.run_id for entry in (*ranking.entries, *ranking.unranked)}
    return ProtocolSection(
        title=f"{metric_name(protocol.distance)}, {protocol.num_samples:,} samples",
        description=protocol.describe(),
        charts=charts.ranking_charts(ranking),
        table=tables.ranking_table(ranking, name_runs=len(runs) > 1),
        protocol=protocol_table(protocol),
    )


def _sweep_section(result: SweepResult) -> SweepSection:
    seeds_vary = any("seed" in trial.values for trial in result.sweep.trials)
    note = (
        "" if seeds_vary else "Each setting was trained once: the intervals hold no variation between training seeds."
    )
    return SweepSection(
        title=result.sweep.name,
        charts=charts.schedule_charts(result.sweep.schedules, result.sweep.run_id),
        rankings=tuple((trials.conclusion, tables.trial_table(trials)) for trials in result.rankings),
        without=tables.trials_without_result(result),
        note=note if result.rankings else "",
    )


def _facts(record: ExperimentRecord, rankings: tuple[Ranking, ...], lead: TrainingRun) -> tuple[tuple[str, str], ...]:
    best = rankings[0].best if rankings else None
    data = "not recorded"
    if lead.card:
        data = lead.card.name + (f", {counted(lead.card.images, 'image')}" if lead.card.images is not None else "")
    measured = sum(len(ranking.entries) + len(ranking.unranked) for ranking in rankings)
    return (
        ("Training data", data),
        *([("Images seen at that step", count(best.images_seen))] if best else []),
        ("Training runs", count(len(record.runs))),
        ("Checkpoint results", count(measured) if measured else NOT_MEASURED),
    )


def _attention(record: ExperimentRecord) -> tuple[str, ...]:
    """What went wrong, before anyone relies on the numbers."""
    found = list(record.remarks)
    for run in record.runs:
        if run.status in ("FAILED", "KILLED"):
            found.append(f"Training run {run.name} {'failed' if run.status == 'FAILED' else 'was killed'}.")
        if "loss" in run.latest and not abs(run.latest["loss"]) < float("inf"):
            found.append(f"The last loss of {run.name} is not a finite number.")
        for evaluation in run.evaluations:
            if not evaluation.checkpoints:
                found.append(f"An evaluation of {run.name} ({evaluation.run_id}) has no result.")
            elif evaluation.status in ("FAILED", "KILLED"):
                found.append(f"An evaluation of {run.name} ({evaluation.run_id}) did not end well: some are missing.")
    if len(found) > tables.SHOWN:
        found[tables.SHOWN :] = [f"And {len(found) - tables.SHOWN:,} more of the kind."]
    return tuple(found)
