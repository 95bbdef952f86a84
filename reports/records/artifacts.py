"""JSON artifacts -> entities. Each function takes what the pipelines wrote, and raises one of `UNREADABLE` for anything
else."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from ddpm_core.records import BPD, CI_HIGH, CI_LOW, DISTORTION_BPD, PRIOR_BPD, RATE_BPD, RMSE, picture_path
from reports.records.entities import (
    BitsPerDim,
    CompressionRecord,
    DataCard,
    GridLayout,
    LikelihoodRecord,
    NeighboursFacts,
    PictureGrid,
    RateDistortionCurves,
    ScheduleCurves,
    TrialRecord,
)
from reports.records.store import Store

Entity = TypeVar("Entity")
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def read(store: Store, run_id: str, path: str, parse: Callable[[Any], Entity]) -> Entity | None:
    """A JSON artifact as an entity, None if it is missing or cannot be read."""
    try:
        return parse(json.loads(store.artifact(run_id, path) or b"null"))
    except UNREADABLE:
        return None


def data_card(card: Mapping[str, Any]) -> DataCard:
    """The DATA_CARD of a training."""
    values: dict[str, Any] = {"name": "unnamed"}
    values |= {field.name: card[field.name] for field in fields(DataCard) if card.get(field.name) is not None}
    values |= {name: tuple(values[name]) for name in ("shape", "mean", "std") if name in values}
    return DataCard(**values)


def grid_layout(layout: Mapping[str, Any]) -> GridLayout:
    """SAMPLES_LAYOUT and CONTACT_SHEET_LAYOUT."""
    return GridLayout(
        tile=_tile(layout),
        columns=int(layout["columns"]),
        count=int(layout["count"]),
        indices=str(layout.get("indices", "")),
        seed=int(layout.get("seed", 0)),
    )


def trials(rows: Sequence[Mapping[str, Any]]) -> tuple[TrialRecord, ...]:
    """The TRIALS of a sweep."""
    return tuple(
        TrialRecord(
            label=str(row["label"]),
            point=str(row["point"]),
            run_id=row.get("run_id"),
            evaluation_run_id=row.get("evaluation_run_id"),
            steps=row.get("steps"),
            status=str(row["status"]),
            prior_bpd=row.get(PRIOR_BPD),
            reason=str(row.get("reason") or ""),
        )
        for row in rows
    )


def schedules(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, ScheduleCurves]:
    """The SCHEDULES of a sweep, by their names."""
    names = ("t", "betas", "alphas_cumprod", "log_snr")
    return {
        str(label): ScheduleCurves(**{name: _numbers(curve[name]) for name in names}) for label, curve in curves.items()
    }


def likelihood(
    run_id: str, fingerprint: str, protocol: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> LikelihoodRecord:
    """The LIKELIHOOD_PROTOCOL of one run, and what it holds of each checkpoint."""
    strata = protocol["strata"]
    return LikelihoodRecord(
        run_id=run_id,
        fingerprint=fingerprint,
        data=str(protocol["data"]),
        data_sha256=str(protocol["data_sha256"]),
        images=int(protocol["images"]),
        strata=None if strata is None else int(strata),
        weights=str(protocol["weights"]),
        results=tuple(sorted((bits_per_dim(result) for result in results), key=lambda result: result.step)),
    )


def bits_per_dim(result: Mapping[str, Any]) -> BitsPerDim:
    """The likelihood of one checkpoint."""
    values, curves = result["values"], result.get("curves")

    def optional(name: str) -> float | None:
        return None if values.get(name) is None else float(values[name])

    return BitsPerDim(
        step=int(result["step"]),
        bpd=float(values[BPD]),
        low=optional(BPD + CI_LOW),
        high=optional(BPD + CI_HIGH),
        rate=optional(RATE_BPD),
        distortion=optional(DISTORTION_BPD),
        prior=optional(PRIOR_BPD),
        rmse=optional(RMSE),
        curves=None if curves is None else _rate_distortion(curves),
    )


def compression(fingerprint: str, curve: Mapping[str, Any]) -> CompressionRecord:
    """The COMPRESSION_CURVE of one run."""

    def points(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], ...]:
        return tuple((float(row["rate"]), float(row["rmse"])) for row in rows)

    protocol, theory = curve["protocol"], curve["theory"]
    return CompressionRecord(
        fingerprint=fingerprint,
        step=int(protocol["step"]),
        data=str(protocol["data"]),
        images=int(protocol["images"]),
        steps=int(protocol["steps"]),
        coded=points(curve["coded"]),
        theory=tuple(zip(map(float, theory["rate"]), map(float, theory["rmse"]), strict=True)),
        others={str(name): points(rows) for name, rows in curve["lossy"].items()},
        lossless={str(name): float(rate) for name, rate in curve["lossless"].items()},
        bound=float(theory["total"]),
        lossy_overhead=float(curve["overhead"]["lossy"]),
    )


def neighbours(facts: Mapping[str, Any]) -> NeighboursFacts:
    """What the neighbours of a checkpoint's samples say, but for that of each sample."""
    counts = {name: int(facts[name]) for name in ("samples", "training_images", "nearest")}
    return NeighboursFacts(**counts, threshold=float(facts["threshold"]))


def chain(points: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(code's t, distance of the x_0 predicted there) along a checkpoint's chain, in the order of generation."""
    return sorted(((int(point["t"]), float(point["distance"])) for point in points), reverse=True)


def picture_grids(pictures: Sequence[Mapping[str, Any]], step: int) -> list[PictureGrid]:
    """The pictures of the checkpoint of a step. Raises ValueError for a file that would lie elsewhere."""
    grids = []
    for picture in pictures:
        file = str(picture["file"])
        if "/" in file or "\\" in file or file.startswith("."):
            raise ValueError(f"file {file!r} is no plain name")
        grids.append(
            PictureGrid(
                kind=str(picture["kind"]),
                path=picture_path(step, file),
                tile=_tile(picture),
                rows=int(picture["rows"]),
                columns=int(picture["columns"]),
                row_labels=tuple(map(str, picture.get("row_labels") or ())),
                column_labels=tuple(map(str, picture.get("column_labels") or ())),
                caption=str(picture.get("caption", "")),
            )
        )
    return grids


def _rate_distortion(curves: Mapping[str, Any]) -> RateDistortionCurves:
    t, rate, rmse = (tuple(curves[name]) for name in ("t", RATE_BPD, RMSE))
    if t != tuple(range(1, len(t) + 1)) or not len(t) == len(rate) == len(rmse) or not t:
        raise ValueError("the curves are not over t = 1..T")
    return RateDistortionCurves(t=t, rate=_numbers(rate), rmse=_numbers(rmse))


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    """Numbers as they were before JSON, which has no infinity: the log-SNR at alpha-bar 0 or 1 may be null."""
    return tuple(math.nan if value is None else float(value) for value in values)


def _tile(layout: Mapping[str, Any]) -> tuple[int, int]:
    return int(layout["tile"][0]), int(layout["tile"][1])
