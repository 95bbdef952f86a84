"""How the leading run was made: what ran, on which data, under which settings, and where to look further."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from ddpm_core.protocol import Protocol
from reports import samples
from reports.entities import DataCard, ExperimentRecord, TrainingRun
from reports.formatting import count, counted, number
from reports.store import Store, public_uri
from reports.tables import FOLDED, NOT_RECORDED, SHOWN, Column, Row, Table


@dataclass(frozen=True, kw_only=True)
class Making:
    """How the leading run was made."""

    configuration: Table
    origin: Table
    card: Table | None
    sheet: samples.Shown | None
    runs: Table
    commands: tuple[tuple[str, str], ...]


def making_of(store: Store, record: ExperimentRecord, lead: TrainingRun) -> Making:
    """All that the records tell about the making of the leading run."""
    return Making(
        configuration=configuration_table(lead),
        origin=origin_table(lead),
        card=card_table(lead.card) if lead.card else None,
        sheet=samples.contact_sheet(store, lead),
        runs=runs_table(record, lead),
        commands=commands(record, lead),
    )


def runs_table(record: ExperimentRecord, lead: TrainingRun) -> Table:
    """Every training run, the newest first, and in which parameters it differs from the leading one."""
    rows = [
        Row(
            cells=(
                run.name,
                run.run_id,
                run.status.lower(),
                count(sum(len(evaluation.checkpoints) for evaluation in run.evaluations)),
                "the run this report leads with" if run is lead else _difference(run, lead),
            ),
            mark="best" if run is lead else "",
        )
        for run in reversed(record.runs)
    ]
    return Table(
        caption="Training runs of the experiment, the newest first",
        columns=(
            Column(title="Run", wraps=True),
            Column(title="MLflow run id"),
            Column(title="Status"),
            Column(title="Results", numeric=True),
            Column(title="Differs in", wraps=True),
        ),
        rows=tuple(rows[:SHOWN]),
        folded=tuple(rows[SHOWN : SHOWN + FOLDED]),
        omitted=max(0, len(rows) - SHOWN - FOLDED),
    )


def configuration_table(run: TrainingRun) -> Table:
    """The run's resolved configuration."""
    return _properties(f"Configuration of {run.name}", sorted(run.params.items()))


def origin_table(run: TrainingRun) -> Table:
    """What made the run: software, hardware, and how far it is."""
    tags = run.tags
    return _properties(
        f"Origin of {run.name}",
        [
            ("Preset", tags.get("ddpm.preset") or run.params.get("preset") or NOT_RECORDED),
            ("Configuration fingerprint", tags.get("ddpm.fingerprint", NOT_RECORDED)),
            ("Code version", tags.get("ddpm.code_version", NOT_RECORDED)),
            ("Device", tags.get("ddpm.device", NOT_RECORDED)),
            ("Workers", tags.get("ddpm.workers", NOT_RECORDED)),
            ("Status in MLflow", run.status.lower()),
        ],
    )


def card_table(card: DataCard) -> Table:
    """The training set."""

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


def protocol_table(protocol: Protocol) -> Table:
    """Everything a number depends on besides the checkpoint."""

    def text(value: object) -> str:
        return (
            ("yes" if value else "no")
            if isinstance(value, bool)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )

    values = asdict(protocol)
    seed = str(values.pop("seed"))  # a name, not an amount: no thousands
    rows = [(name.replace("_", " "), text(value)) for name, value in values.items()]
    return _properties(f"Protocol {protocol.fingerprint}", [*rows[:1], ("seed", seed), *rows[1:]])


def commands(record: ExperimentRecord, lead: TrainingRun) -> tuple[tuple[str, str], ...]:
    """Command lines and addresses, each with what it is for."""
    uri = public_uri(record.tracking_uri)
    served = urlsplit(uri).scheme in ("http", "https")
    address = uri.rstrip("/") if served else "http://127.0.0.1:5000"
    run_id = lead.run_id
    page = f"{address}/#/experiments/{record.experiment_id}/runs/{run_id}"
    start = () if served else (("Open the MLflow UI", f"mlflow ui --backend-store-uri {shlex.quote(uri)}"),)
    at = f"MLFLOW_TRACKING_URI={shlex.quote(uri)}"
    return (
        *start,
        ("The leading run in it", page),
        ("The run as text", f"{at} mlflow runs describe --run-id {run_id}"),
        (
            "Its configuration",
            f"{at} mlflow artifacts download --run-id {run_id} --artifact-path config.json",
        ),
    )


def _properties(caption: str, pairs: Sequence[tuple[str, str]]) -> Table:
    rows = tuple(Row(cells=pair) for pair in pairs)
    return Table(
        caption=caption,
        columns=(Column(title="Property", wraps=True), Column(title="Value", wraps=True)),
        rows=rows,
    )


def _difference(run: TrainingRun, lead: TrainingRun) -> str:
    names = sorted(name for name in {*run.params, *lead.params} if run.params.get(name) != lead.params.get(name))
    told = [f"{name} = {run.params.get(name, 'unset')}" for name in names[:4]]
    if len(names) > 4:
        told.append(f"and {len(names) - 4} more")
    return ", ".join(told) or "nothing"
