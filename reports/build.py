"""The report: MLflow records -> one HTML file that needs nothing beside itself, and its summaries."""

import base64
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ddpm_core.commit import write_text
from ddpm_core.errors import InputError
from ddpm_core.records import DEVICE_TAG
from reports.drawing.elements import Absence, Chart, Illustration
from reports.formatting import NOT_MEASURED, NOT_RECORDED, count, counted
from reports.records.entities import ExperimentRecord, RunRecord
from reports.records.records import is_served, read_experiment, run_link
from reports.records.store import Store
from reports.sections import commands, samples
from reports.sections.checkpoints import ProtocolSection, protocol_sections
from reports.sections.choices import ChoiceSection, ema_sections, sampler_sections
from reports.sections.compression import CompressionSection, compression_section
from reports.sections.likelihoods import LikelihoodSection, likelihood_section
from reports.sections.making import Making, making_section
from reports.sections.paper_tables import PaperTable, paper_tables
from reports.sections.sweeps import SweepSection, sweep_section
from reports.sections.training import training_charts
from reports.summary import markdown, since_previous, summarise, with_previous
from reports.verdicts.conclusions import Answer, alarms, answer, attention
from reports.verdicts.ranking import Entry, Ranking, rank
from reports.verdicts.sweeps import analyse

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Fact:
    """A label and its value, which leads to an address if it has one."""

    label: str
    value: str
    href: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the template sets, in the order of the page."""

    experiment: str
    updated: str
    local: bool
    alarms: tuple[str, ...]
    answer: Answer
    facts: tuple[Fact, ...]
    grid: Illustration | None
    attention: tuple[str, ...]
    protocols: tuple[ProtocolSection, ...]
    samplers: tuple[ChoiceSection, ...]
    ema_lengths: tuple[ChoiceSection, ...]
    training: tuple[Chart, ...]
    progression: tuple[Illustration, ...]
    pictures: tuple[Illustration, ...]
    pictures_step: int
    memorization: tuple[str, ...]
    paper: tuple[PaperTable, ...]
    likelihood: LikelihoodSection
    compression: CompressionSection
    sweeps: tuple[SweepSection, ...]
    making: Making
    absent: tuple[Absence, ...] = ()


def build_report(
    tracking_uri: str, experiment: str, output: Path, *, run: str | None = None, watts: float | None = None
) -> Path:
    """Write the report of one experiment to `output` (an .html file) and return it; beside it, under the same name, the
    summaries .json (see report.schema.json) and .md.

    `run` limits it to one training run or sweep, by name or MLflow id; `watts` is what a device draws, for the energy.
    Reads MLflow only, and the .json that is there already, for what changed. Each file appears whole or not at all, the
    .json last. The same records give the same bytes.

    Raises InputError for a tracking store, experiment or run that does not exist, an experiment without a training
    run, or an output that is no .html file.
    """
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise InputError(f"Output {output} is not the name of an .html file; give one, for example report.html.")
    store = Store(tracking_uri)
    record = read_experiment(store, experiment, run)
    rankings = rank(record.runs)
    report = compose(store, record, rankings, watts)
    conclusions = {sweep.title: [conclusion for conclusion, _ in sweep.rankings] for sweep in report.sweeps}
    summary = summarise(
        record,
        rankings,
        report.answer,
        alarms=report.alarms,
        attention=report.attention,
        tables=report.paper,
        conclusions=conclusions,
    )
    facts = with_previous(summary, output.with_suffix(".json"))
    write_text(output, render(report, since_previous(facts)))
    write_text(output.with_suffix(".md"), markdown(facts, output.name))
    write_text(output.with_suffix(".json"), json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return output


def compose(
    store: Store, record: ExperimentRecord, rankings: tuple[Ranking, ...], watts: float | None = None
) -> Report:
    """Everything the report says and shows. The run with the best checkpoint leads it, else the newest."""
    leading = rankings[0] if rankings else None
    best = leading.best if leading else None
    lead = best.run if best else record.runs[-1]
    step, pictures = samples.process_pictures(store, leading) if leading else (0, ())
    report = Report(
        experiment=record.name if record.only is None else f"{record.name}, {record.only}",
        updated=f"{record.updated:%Y-%m-%d %H:%M} UTC" if record.updated else "an unknown time",
        local=not is_served(record),
        alarms=alarms(record),
        answer=answer(record, rankings),
        facts=_facts(record, rankings, lead, best),
        grid=samples.best_grid(store, best) if best else None,
        attention=attention(record),
        protocols=protocol_sections(store, record, rankings),
        samplers=sampler_sections(record, rankings),
        ema_lengths=ema_sections(store, record, rankings),
        training=training_charts(store, record, lead, rankings),
        progression=samples.progression(store, best) if best else (),
        pictures=pictures,
        pictures_step=step,
        memorization=samples.memorization(store, leading) if leading else (),
        paper=paper_tables(record.runs, rankings, lead),
        likelihood=likelihood_section(record, lead),
        compression=compression_section(lead),
        sweeps=tuple(sweep_section(record, analyse(sweep, record)) for sweep in record.sweeps),
        making=making_section(store, record, lead, [ranking.protocol for ranking in rankings], watts),
    )
    return replace(report, absent=_absent(report, lead))


def _absent(report: Report, lead: RunRecord) -> tuple[Absence, ...]:
    """What the page has nothing of, in its order. A lone command stands for all that it makes."""
    likelihood, making = report.likelihood, report.making
    pictured = commands.evaluate(lead, "--pictures 8", "--nearest 1000")
    no_number = "they are of CIFAR-10 and LSUN, and have no number for the data of the leading run"
    rates = "Rate and distortion" + (" of the whole test set, as the paper's" if likelihood.charts else "")
    lines = (
        (report.protocols, "Checkpoints", "none of this experiment has been evaluated", commands.evaluate(lead)),
        (report.training, "Training curves", "no loss, gradient norm or speed was logged", ""),
        (report.progression, "Samples by training step", "no sample grid was stored", ""),
        (report.pictures, "Chains, latents and interpolations", "no picture of them was stored", pictured),
        (report.memorization, "Copies of training images", "no nearest neighbours were looked up", pictured),
        (report.paper, "The paper's tables", no_number, ""),
        (likelihood.tables, "Likelihood", "no bits/dim were measured", likelihood.missing or commands.likelihood(lead)),
        (not (likelihood.tables and likelihood.missing), rates, "not measured", likelihood.missing),
        (report.compression.table, "Compression", "no images were coded", report.compression.missing),
        (report.sweeps, "Sweep", "none was run in this experiment", ""),
        (making.card, "Data card", "none was recorded", ""),
        (making.sheet, "Contact sheet of the training data", "none was recorded", ""),
    )
    return tuple(Absence(what=what, why=why, command=command) for there, what, why, command in lines if not there)


def _facts(
    record: ExperimentRecord, rankings: tuple[Ranking, ...], lead: RunRecord, best: Entry | None
) -> tuple[Fact, ...]:
    """What stands below the answer."""
    data = NOT_RECORDED
    if lead.card:
        data = lead.card.name + (f", {counted(lead.card.images, 'image')}" if lead.card.images is not None else "")
    measured = sum(len(ranking.entries) + len(ranking.unranked) for ranking in rankings)
    return (
        Fact("Training data", data),
        *([Fact("Images seen at that step", count(best.images_seen))] if best else []),
        Fact("Training runs", count(sum(not run.foreign for run in record.runs))),
        Fact("Checkpoint results", count(measured) if measured else NOT_MEASURED),
        Fact("Device", lead.tags.get(DEVICE_TAG) or NOT_RECORDED),
        Fact("This run in MLflow", lead.name, run_link(record, lead.run_id)),
    )


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
