"""JSON artifacts -> entities. Each function takes what the pipelines wrote and raises one of `UNREADABLE` for anything
else."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ddpm_core.records import BPD, CI_HIGH, CI_LOW, DISTORTION_BPD, PRIOR_BPD, RATE_BPD, RMSE, picture_path
from reports.records.entities import (
    BitsPerDim,
    Compression,
    DataCard,
    GridLayout,
    Likelihood,
    NeighboursFacts,
    PictureGrid,
    RateDistortion,
    Schedule,
    Trial,
)

UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def data_card(card: Mapping[str, Any]) -> DataCard:
    """data/card.json of a training run."""
    known: dict[str, Any] = {"name": "unnamed"}
    known |= {field.name: card[field.name] for field in fields(DataCard) if card.get(field.name) is not None}
    known |= {name: tuple(known[name]) for name in ("shape", "mean", "std") if name in known}
    return DataCard(**known)


def grid_layout(layout: Mapping[str, Any]) -> GridLayout:
    """samples/grid.json and data/contact_sheet.json."""
    return GridLayout(
        tile=_tile(layout),
        columns=int(layout["columns"]),
        count=int(layout["count"]),
        indices=str(layout.get("indices", "")),
        seed=int(layout.get("seed", 0)),
    )


def trial(row: Mapping[str, Any]) -> Trial:
    """A row of a sweep's trials.json."""
    return Trial(
        label=str(row["label"]),
        point=str(row["point"]),
        run_id=row.get("run_id"),
        evaluation_run_id=row.get("evaluation_run_id"),
        steps=row.get("steps"),
        status=str(row["status"]),
        prior_bpd=row.get(PRIOR_BPD),
        reason=str(row.get("reason") or ""),
    )


def schedule(curve: Mapping[str, Any]) -> Schedule:
    """A curve of a sweep's schedules.json."""

    def numbers(name: str) -> tuple[float, ...]:
        # JSON has no infinity: a log-SNR at alpha-bar 0 or 1 may be null.
        return tuple(float("nan") if value is None else float(value) for value in curve[name])

    return Schedule(**{name: numbers(name) for name in ("t", "betas", "alphas_cumprod", "log_snr")})


def likelihood(run_id: str, mark: str, protocol: Mapping[str, Any], results: list[Mapping[str, Any]]) -> Likelihood:
    """likelihood/protocol.json and the likelihood/step-*.json of one run."""
    strata = protocol["strata"]
    return Likelihood(
        run_id=run_id,
        fingerprint=mark,
        data=str(protocol["data"]),
        data_sha256=str(protocol["data_sha256"]),
        images=int(protocol["images"]),
        strata=None if strata is None else int(strata),
        weights=str(protocol["weights"]),
        results=tuple(sorted((bits_per_dim(result) for result in results), key=lambda result: result.step)),
    )


def bits_per_dim(result: Mapping[str, Any]) -> BitsPerDim:
    """One likelihood/step-*.json."""
    values, curves = result["values"], result.get("curves")

    def known(name: str) -> float | None:
        return None if values.get(name) is None else float(values[name])

    return BitsPerDim(
        step=int(result["step"]),
        bpd=float(values[BPD]),
        low=known(BPD + CI_LOW),
        high=known(BPD + CI_HIGH),
        rate=known(RATE_BPD),
        distortion=known(DISTORTION_BPD),
        prior=known(PRIOR_BPD),
        rmse=known(RMSE),
        curves=None if curves is None else _curves(curves),
    )


def compression(mark: str, curve: Mapping[str, Any]) -> Compression:
    """compression/curve.json."""

    def points(found: list[Mapping[str, Any]]) -> tuple[tuple[float, float], ...]:
        return tuple((float(point["rate"]), float(point["rmse"])) for point in found)

    protocol, theory = curve["protocol"], curve["theory"]
    return Compression(
        fingerprint=mark,
        step=int(protocol["step"]),
        data=str(protocol["data"]),
        images=int(protocol["images"]),
        steps=int(protocol["steps"]),
        coded=points(curve["coded"]),
        theory=tuple(zip(map(float, theory["rate"]), map(float, theory["rmse"]), strict=True)),
        others={str(name): points(found) for name, found in curve["lossy"].items()},
        lossless={str(name): float(rate) for name, rate in curve["lossless"].items()},
        bound=float(theory["total"]),
        overhead={name: float(curve["overhead"][name]) for name in ("lossy", "total")},
    )


def neighbours_facts(facts: Mapping[str, Any]) -> NeighboursFacts:
    """neighbours/step-*.json, without what it says of each sample."""
    return NeighboursFacts(
        samples=int(facts["samples"]),
        training_images=int(facts["training_images"]),
        threshold=float(facts["threshold"]),
        nearest=int(facts["nearest"]),
    )


def progress(points: list[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """progress/step-*.json: (code's t, distance of the x_0 predicted there), in the order of generation."""
    return sorted(((int(point["t"]), float(point["distance"])) for point in points), reverse=True)


def picture_grids(pictures: list[Mapping[str, Any]], step: int) -> list[PictureGrid]:
    """The pictures.json of a checkpoint, whose files lie beside it: names that lead elsewhere are refused."""
    grids = []
    for picture in pictures:
        name = str(picture["file"])
        if "/" in name or "\\" in name or name.startswith("."):
            raise ValueError(f"file {name!r} is no plain name")
        grids.append(
            PictureGrid(
                kind=str(picture["kind"]),
                path=picture_path(step, name),
                tile=_tile(picture),
                rows=int(picture["rows"]),
                columns=int(picture["columns"]),
                row_labels=tuple(map(str, picture.get("row_labels") or ())),
                column_labels=tuple(map(str, picture.get("column_labels") or ())),
                caption=str(picture.get("caption", "")),
            )
        )
    return grids


def _curves(curves: Mapping[str, Any]) -> RateDistortion:
    t, rate, rmse = (tuple(curves[name]) for name in ("t", RATE_BPD, RMSE))
    if t != tuple(range(1, len(t) + 1)) or not len(t) == len(rate) == len(rmse) or not t:
        raise ValueError("the curves are not over t = 1..T")
    nan = math.nan
    return RateDistortion(
        t=t,
        rate=tuple(nan if value is None else float(value) for value in rate),
        rmse=tuple(nan if value is None else float(value) for value in rmse),
    )


def _tile(layout: Mapping[str, Any]) -> tuple[int, int]:
    return int(layout["tile"][0]), int(layout["tile"][1])
