"""Sample grids: the best checkpoint's in full, and a few others in step order to see the samples sharpen; and the
pictures of what that checkpoint does on the way."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_core.records import CONTACT_SHEET, pictures_path
from reports.drawing.pictures import Picture, UnreadablePicture, arranged, enlargement, picture, spaced
from reports.records import artifacts
from reports.records.entities import Evaluation, PictureGrid, TrainingRun
from reports.records.store import Store
from reports.verdicts.conclusions import metric_name
from reports.verdicts.formatting import NOT_MEASURED, decimals_for, fixed, listed
from reports.verdicts.ranking import Entry, Ranking

# Base64 adds a third, and the page stays below 10 MB with its figures and tables.
GRID_BYTES = 2_400_000
SMALL_BYTES = 60_000
SHEET_BYTES = 500_000
PICTURE_BYTES = 400_000
PICTURES = 6
LOOKED_FOR = 20  # checkpoints, from the best on, that pictures are looked for of
SMALL_GRIDS = 12
SMALL_TILES = 16


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture with its text alternative and caption, and the labels of its rows and columns where it has any."""

    picture: Picture
    alt: str
    caption: str
    best: bool = False
    title: str = ""
    row_labels: tuple[str, ...] = ()
    column_labels: tuple[str, ...] = ()


_TITLES = {
    "progressive": "Progressive generation",
    "shared": "Samples that share a latent",
    "interpolation": "Interpolations between images",
    "coarse_to_fine": "Interpolations, coarse to fine",
    "neighbours_pixels": "Nearest training images in pixel space",
    "neighbours_features": "Nearest training images in feature space",
}


def best_grid(store: Store, entry: Entry) -> Shown | None:
    """The sample grid of a checkpoint, None if none was stored or it cannot be read."""
    path = entry.evaluation.samples.get(entry.checkpoint.step)
    content = store.artifact(entry.evaluation.run_id, path) if path else None
    if content is None:
        return None
    try:
        shown = picture(arranged(content, entry.evaluation.layout), target=576, budget=GRID_BYTES)
    except UnreadablePicture:
        return None
    what = _what(entry.evaluation)
    caption = f"{what} Step {entry.checkpoint.step:,} of {entry.run.name}.{shown.told}"
    return Shown(picture=shown, alt=f"Grid of generated images. {caption}", caption=caption)


def progression(store: Store, entry: Entry) -> tuple[Shown, ...]:
    """Small grids of the same evaluation in step order, at most `SMALL_GRIDS` and the best among them: the
    same indices and seed at every step, so a place holds the same noise."""
    evaluation, best = entry.evaluation, entry.checkpoint.step
    values = {point.step: point for point in evaluation.checkpoints}
    name = metric_name(evaluation.protocol.distance)
    decimals = decimals_for(entry.checkpoint.distance, entry.checkpoint.low, entry.checkpoint.high)
    grids = []
    for step in spread(sorted(evaluation.samples), keep=best):
        content = store.artifact(evaluation.run_id, evaluation.samples[step])
        try:
            tiles = arranged(content or b"", evaluation.layout, most=SMALL_TILES)
            small = picture(tiles, target=160, budget=SMALL_BYTES)
        except UnreadablePicture:
            continue
        value = fixed(values[step].distance, decimals) if step in values else NOT_MEASURED
        grids.append(
            Shown(
                picture=small,
                alt=f"Generated images at step {step:,}",
                caption=f"step {step:,}: {name} {value}",
                best=step == best,
            )
        )
    return tuple(grids)


def process_pictures(store: Store, ranking: Ranking) -> tuple[int, tuple[Shown, ...]]:
    """The pictures of the best checkpoint that has any, and its step: chains, latents, interpolations and neighbours."""
    best = ranking.best
    if best is None:
        return 0, ()
    own = [entry for entry in ranking.entries if entry.run.run_id == best.run.run_id][:LOOKED_FOR]
    for step in (entry.checkpoint.step for entry in own):
        for evaluation in best.run.evaluations:
            content = store.artifact(evaluation.run_id, pictures_path(step))
            if content is None:
                continue
            try:
                grids = artifacts.picture_grids(json.loads(content), step)
            except artifacts.UNREADABLE:
                continue
            order = {kind: place for place, kind in enumerate(_TITLES)}
            grids.sort(key=lambda grid: order.get(grid.kind, len(order)))
            shown = [_process_picture(store, evaluation.run_id, grid) for grid in grids[:PICTURES]]
            if any(shown):
                return step, tuple(each for each in shown if each is not None)
    return best.checkpoint.step, ()


def _process_picture(store: Store, run_id: str, grid: PictureGrid) -> Shown | None:
    content = store.artifact(run_id, grid.path)
    try:
        tiles = spaced(content or b"", grid.tile, grid.rows, grid.columns)
        shown = picture(tiles, target=700, budget=PICTURE_BYTES)
    except UnreadablePicture:
        return None
    title = _TITLES.get(grid.kind, grid.kind.replace("_", " "))
    fits = len(grid.row_labels) == grid.rows and len(grid.column_labels) == grid.columns
    axes = f" Rows: {listed(list(grid.row_labels))}. Columns: {listed(list(grid.column_labels))}." if fits else ""
    return Shown(
        picture=shown,
        alt=f"{title}: {grid.rows} x {grid.columns} images.{axes}",
        caption=grid.caption + shown.told,
        title=title,
        row_labels=grid.row_labels if fits else (),
        column_labels=grid.column_labels if fits else (),
    )


def contact_sheet(store: Store, run: TrainingRun) -> Shown | None:
    """The training data's contact sheet, None if the run has none."""
    content = store.artifact(run.run_id, CONTACT_SHEET)
    if content is None:
        return None
    try:
        sheet = picture(arranged(content, run.sheet), target=512, budget=SHEET_BYTES)
    except UnreadablePicture:
        return None
    name = run.card.name if run.card else "the training data"
    return Shown(picture=sheet, alt=f"Contact sheet of {name}", caption=f"Training images of {name}.{sheet.told}")


def spread(steps: Sequence[int], keep: int, most: int = SMALL_GRIDS) -> list[int]:
    """At most `most` of ascending steps: the first, the last, `keep`, and evenly between."""
    if len(steps) <= most:
        return list(steps)
    chosen = {steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)}
    if keep in steps and keep not in chosen:
        inner = sorted(chosen)[1:-1]
        chosen.remove(min(inner, key=lambda step: abs(step - keep)))
        chosen.add(keep)
    return sorted(chosen)


def _what(evaluation: Evaluation) -> str:
    layout = evaluation.layout
    if layout is None:
        return f"Uncurated samples, seed {evaluation.protocol.seed}."
    shown = f"{layout.count} uncurated samples: indices {layout.indices} of seed {layout.seed}, none picked."
    if enlargement(max(layout.tile)) > 1:
        shown += f" Images of {layout.tile[1]}x{layout.tile[0]} pixels, enlarged smoothly."
    return shown
