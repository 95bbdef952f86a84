"""Sample grids: the best checkpoint's in full, and a few others in step order to see the samples sharpen."""

from collections.abc import Sequence
from dataclasses import dataclass

from reports.conclusions import metric_name
from reports.entities import Evaluation, TrainingRun
from reports.formatting import NOT_MEASURED, decimals_for, fixed
from reports.pictures import Picture, UnreadablePicture, arranged, enlargement, picture
from reports.ranking import Entry
from reports.store import Store

# Base64 adds a third, and the page stays below 10 MB with its figures and tables.
GRID_BYTES = 4_000_000
SMALL_BYTES = 100_000
SHEET_BYTES = 800_000
SMALL_GRIDS = 12
SMALL_TILES = 16


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture with its text alternative and caption."""

    picture: Picture
    alt: str
    caption: str
    best: bool = False


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
    caption = f"{what} Step {entry.checkpoint.step:,} of {entry.run.name}."
    if shown.reduced > 1:
        caption += f" Shown at 1/{shown.reduced} of its width to keep this file small."
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


def contact_sheet(store: Store, run: TrainingRun) -> Shown | None:
    """The training data's contact sheet, None if the run has none."""
    content = store.artifact(run.run_id, "data/contact_sheet.png")
    if content is None:
        return None
    try:
        sheet = picture(arranged(content, run.sheet), target=512, budget=SHEET_BYTES)
    except UnreadablePicture:
        return None
    name = run.card.name if run.card else "the training data"
    return Shown(picture=sheet, alt=f"Contact sheet of {name}", caption=f"Training images of {name}.")


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
    if enlargement(layout) > 1:
        shown += f" Images of {layout.tile[1]}x{layout.tile[0]} pixels, enlarged smoothly."
    return shown
