"""How the leading run was made: what ran, on which data, under which settings, and where to look further."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ddpm_core.protocol import Protocol
from ddpm_core.records import CODE_VERSION_TAG, CONFIG, DEVICE_TAG, FINGERPRINT_TAG, PRESET_TAG, WORKERS_TAG
from reports.drawing.elements import Column, Illustration, Row, Table, long_table
from reports.formatting import NOT_RECORDED, count, counted, number
from reports.records.entities import DataCard, ExperimentRecord, RunRecord
from reports.records.records import is_served, run_link
from reports.records.store import Store, public_uri
from reports.sections.commands import reproduce
from reports.sections.cost import cost_table
from reports.sections.samples import contact_sheet
from reports.verdicts.presets import changes, preset_of, preset_parameters

SHOWN_DIFFERENCES = 4  # parameters


@dataclass(frozen=True, kw_only=True)
class Making:
    """How the leading run was made. `changed` says how it differs from its preset; `commands` are (label, command)."""

    configuration: Table
    changed: str
    origin: Table
    cost: Table
    protocols: Table | None
    card: Table | None
    sheet: Illustration | None
    runs: Table
    commands: tuple[tuple[str, str], ...]


def making_section(
    store: Store, record: ExperimentRecord, lead: RunRecord, protocols: Sequence[Protocol], watts: float | None
) -> Making:
    """All that the records tell about the making of the leading run. `watts` is what one of its devices draws."""
    return Making(
        configuration=configuration_table(lead),
        changed=changes_text(lead),
        origin=origin_table(lead),
        cost=cost_table(store, lead, watts),
        protocols=protocols_table(protocols) if protocols else None,
        card=card_table(lead.card) if lead.card else None,
        sheet=contact_sheet(store, lead),
        runs=runs_table(record, lead),
        commands=commands(record, lead),
    )


def runs_table(record: ExperimentRecord, lead: RunRecord) -> Table:
    """Every training run, the newest first, and in which parameters it differs from the leading one."""
    rows = [
        Row(
            cells=(
                run.name,
                run.run_id,
                run.status.lower(),
                count(sum(len(evaluation.checkpoints) for evaluation in run.evaluations)),
                "the run this report leads with" if run is lead else _differences(run, lead),
            ),
            mark="best" if run is lead else "",
            href=run_link(record, run.run_id),
        )
        for run in reversed(record.runs)
    ]
    columns = (
        Column(title="Run", linked=True),
        Column(title="MLflow run id"),
        Column(title="Status"),
        Column(title="Results", numeric=True),
        Column(title="Differs in", wraps=True),
    )
    return long_table("Training runs of the experiment, the newest first", columns, rows)


def _differences(run: RunRecord, lead: RunRecord) -> str:
    """The first parameters in which two runs differ."""
    names = sorted(name for name in {*run.params, *lead.params} if run.params.get(name) != lead.params.get(name))
    texts = [
        f"{name}\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{run.params.get(name, 'unset')}"
        for name in names[:SHOWN_DIFFERENCES]
    ]
    if len(names) > SHOWN_DIFFERENCES:
        texts.append(f"and {len(names) - SHOWN_DIFFERENCES} more")
    return ", ".join(texts) or "nothing"


def configuration_table(run: RunRecord) -> Table:
    """The run's resolved configuration beside its preset's; what was changed first, and marked."""
    changed, preset = changes(run) or {}, preset_parameters(preset_of(run))
    order = sorted(run.params, key=lambda name: (name not in changed, name))
    return Table(
        caption=f"Configuration of {run.name}",
        columns=(Column(title="Parameter"), *(Column(title=title, wraps=True) for title in ("Value", "Preset's"))),
        rows=tuple(
            Row(cells=(name, run.params[name], preset.get(name, "–")), mark="close" if name in changed else "")
            for name in order
        ),
    )


def changes_text(run: RunRecord) -> str:
    """How the configuration differs from the preset, in a sentence."""
    changed, preset = changes(run), preset_of(run)
    if changed is None:
        return f"Preset {preset} is not known to this version, and so is not what was changed of it." if preset else ""
    if not changed:
        return f"The values are those of the preset {preset}."
    values = ", ".join(f"{name} {run.params[name]} (preset: {value})" for name, value in changed.items())
    return f"Preset {preset}, with {values}."


def origin_table(run: RunRecord) -> Table:
    """What made the run: software, hardware, and how far it is."""
    tags = {
        "Preset": PRESET_TAG,
        "Configuration fingerprint": FINGERPRINT_TAG,
        "Code version": CODE_VERSION_TAG,
        "Device": DEVICE_TAG,
        "Workers": WORKERS_TAG,
    }
    pairs = [(title, run.tags.get(tag) or NOT_RECORDED) for title, tag in tags.items()]
    return _properties(f"Origin of {run.name}", [*pairs, ("Status in MLflow", run.status.lower())])


def card_table(card: DataCard) -> Table:
    def per_channel(values: Sequence[float]) -> str:
        return ", ".join(number(value) for value in values) or NOT_RECORDED

    return _properties(
        f"Training data: {card.name}",
        [
            ("Images", NOT_RECORDED if card.images is None else count(card.images)),
            ("Size", " × ".join(str(side) for side in card.shape) or NOT_RECORDED),
            ("Channel mean", per_channel(card.mean)),
            ("Channel standard deviation", per_channel(card.std)),
            ("E[x₀²] in [−1, 1]", NOT_RECORDED if card.second_moment is None else number(card.second_moment)),
            ("Resize filter", card.filter or NOT_RECORDED),
            ("Skipped", NOT_RECORDED if card.skipped is None else counted(card.skipped, "image")),
            ("Source", card.source or NOT_RECORDED),
            ("sha256", card.sha256 or NOT_RECORDED),
        ],
    )


def _properties(caption: str, pairs: Sequence[tuple[str, str]]) -> Table:
    columns = (Column(title="Property"), Column(title="Value", wraps=True))
    return Table(caption=caption, columns=columns, rows=tuple(Row(cells=pair) for pair in pairs))


def protocols_table(protocols: Sequence[Protocol]) -> Table:
    """Everything that numbers depend on besides the checkpoint, a column a protocol; where they differ first, and marked."""

    def text(name: str, value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)  # a seed is a name

    values = [asdict(protocol) for protocol in protocols]
    rows = []
    for name in values[0]:
        cells = tuple(text(name, each[name]) for each in values)
        rows.append(Row(cells=(name.replace("_", " "), *cells), mark="close" if len(set(cells)) > 1 else ""))
    return Table(
        caption="Protocols, where they differ first" if len(protocols) > 1 else "Protocol",
        columns=(
            Column(title="Property"),
            *(Column(title=f"Protocol {protocol.fingerprint}", wraps=True) for protocol in protocols),
        ),
        rows=tuple(sorted(rows, key=lambda row: not row.mark)),
    )


def commands(record: ExperimentRecord, lead: RunRecord) -> tuple[tuple[str, str], ...]:
    """Command lines and addresses, each with what it is for."""
    uri, run_id = public_uri(record.tracking_uri), lead.run_id
    mlflow = f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow"
    again = reproduce(lead)
    return (
        *([("Train the leading run again", again)] if again else []),
        *([] if is_served(record) else [("Open the MLflow UI", f"mlflow ui --backend-store-uri {shlex.quote(uri)}")]),
        ("The leading run in it", run_link(record, run_id)),
        ("The run as text", f"{mlflow} runs describe --run-id {run_id}"),
        ("Its configuration", f"{mlflow} artifacts download --run-id {run_id} --artifact-path {CONFIG}"),
    )
