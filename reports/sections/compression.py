"""Coded files beside the theory and beside other formats: rate against distortion, and what a whole image weighs."""

from dataclasses import dataclass

from ddpm_core.verdicts import listed
from reports.drawing import figures
from reports.drawing.elements import Chart, Column, Row, Table, numeric
from reports.formatting import count, counted, fixed, number
from reports.records.entities import CompressionRecord, RunRecord
from reports.sections import commands

_NAMES = {"coded": "these files", "png": "PNG", "webp": "WebP, lossless"}
_FORMATS = {"WEBP": "WebP"}  # names of Pillow's


@dataclass(frozen=True, kw_only=True)
class CompressionSection:
    """Without charts and a table, `missing` is the command that would make them."""

    charts: tuple[Chart, ...]
    table: Table | None
    missing: str


def compression_section(lead: RunRecord) -> CompressionSection:
    """The leading run's newest checkpoint that coded images."""
    if not lead.compressions:
        return CompressionSection(charts=(), table=None, missing=commands.compression(lead))
    newest = max(lead.compressions, key=lambda record: (record.step, record.images))
    return CompressionSection(charts=(_chart(newest),), table=_table(newest), missing="")


def _chart(record: CompressionRecord) -> Chart:
    """Distortion against rate, up to a little above that of the whole files."""
    curves = {"files, cut": record.coded, "theory": record.theory}
    curves |= {_FORMATS.get(name, name): points for name, points in record.others.items()}
    most = 1.05 * max(rate for rate, _ in record.coded)
    shown = {name: [point for point in points if point[0] <= most] for name, points in curves.items()}
    lines = [figures.Relation(label=name, points=points) for name, points in shown.items() if points]
    beyond = [name for name, points in shown.items() if not points]
    images = f"{counted(record.images, 'image')} of {record.data}, step {record.step:,}"
    svg = figures.relation(
        "compression",
        lines,
        x="rate (bits/dim)",
        y="distortion (RMSE)",
        alt=f"Distortion against rate of {listed([line.label for line in lines])}: {images}.",
        small=False,
    )
    caption = (
        f"Distortion (RMSE on 0..255) against rate in bits/dim: files of {record.steps} steps that were cut, the theory of "
        f"Fig. 5 for the same images, and other formats. {images}."
    )
    if beyond:
        caption += f" {listed(beyond)} {'needs' if len(beyond) == 1 else 'need'} more than {number(most, 3)} bits/dim."
    return Chart(svg=svg, caption=caption)


def _table(record: CompressionRecord) -> Table:
    """Bits/dim of whole images by format, the fewest first, and the bound."""
    rows = [
        Row(cells=(_NAMES.get(name, name), fixed(rate, 3), f"{100 * (rate / record.bound - 1):+.1f} %"))
        for name, rate in sorted(record.lossless.items(), key=lambda item: item[1])
    ]
    rows.append(Row(cells=("the variational bound", fixed(record.bound, 3), "")))
    return Table(
        caption=(
            f"Bits/dim of whole images, bit for bit: {count(record.images)} of {record.data}; the lossy part of these files is "
            f"{100 * record.lossy_overhead:.1f} % above L₁ + … + L_T (protocol {record.fingerprint})"
        ),
        columns=(Column(title="Format"), *numeric("Bits/dim", "Against the bound")),
        rows=tuple(rows),
        sortable=True,
    )
