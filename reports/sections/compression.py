"""Coded files beside the theory and beside other formats: rate against distortion, and what a whole image weighs."""

from dataclasses import dataclass

from markupsafe import Markup

from reports.drawing import figures
from reports.records.entities import Compression, TrainingRun
from reports.sections.charts import Chart
from reports.sections.tables import Column, Row, Table
from reports.verdicts import commands
from reports.verdicts.formatting import count, counted, fixed

_NAMES = {"coded": "these files", "png": "PNG", "webp": "WebP, lossless"}


@dataclass(frozen=True, kw_only=True)
class CompressionSection:
    """`missing` is the command that would measure it."""

    charts: tuple[Chart, ...]
    table: Table | None
    missing: str


def compression_section(lead: TrainingRun) -> CompressionSection:
    """The leading run's newest checkpoint that coded images."""
    if not lead.compressions:
        return CompressionSection(charts=(), table=None, missing=commands.compression(lead))
    shown = max(lead.compressions, key=lambda each: (each.step, each.images))
    return CompressionSection(charts=(_chart(shown),), table=_table(shown), missing="")


def _chart(shown: Compression) -> Chart:
    curves = {"files, cut": shown.coded, "theory": shown.theory, **shown.others}
    most = 1.05 * max(rate for rate, _ in shown.coded)
    lines = [
        figures.Relation(
            label=name,
            x=[rate for rate, _ in points if rate <= most],
            y=[rmse for rate, rmse in points if rate <= most],
        )
        for name, points in curves.items()
    ]
    what = f"{counted(shown.images, 'image')} of {shown.data}, step {shown.step:,}"
    svg = figures.relation(
        "compression",
        lines,
        x="rate (bits/dim)",
        y="distortion (RMSE)",
        alt=f"Distortion against rate of coded files, of the theory and of {' and '.join(shown.others)}: {what}.",
    )
    caption = (
        f"Distortion (RMSE on 0..255) against rate in bits/dim: files of {shown.steps} steps that were cut, the theory of "
        f"Fig. 5 for the same images, and other formats. {what}."
    )
    return Chart(svg=Markup(svg), caption=caption)


def _table(shown: Compression) -> Table:
    rows = [
        Row(cells=(_NAMES.get(name, name), fixed(rate, 3), f"{100 * (rate / shown.bound - 1):+.1f} %"))
        for name, rate in sorted(shown.lossless.items(), key=lambda item: item[1])
    ]
    rows.append(Row(cells=("the variational bound", fixed(shown.bound, 3), "")))
    return Table(
        caption=(
            f"Bits/dim of whole images, bit for bit: {count(shown.images)} of {shown.data}; the lossy part of these files is "
            f"{100 * shown.overhead['lossy']:.1f} % above L₁ + … + L_T (protocol {shown.fingerprint})"
        ),
        columns=(
            Column(title="Format"),
            Column(title="Bits/dim", numeric=True),
            Column(title="Against the bound", numeric=True),
        ),
        rows=tuple(rows),
        sortable=True,
    )
