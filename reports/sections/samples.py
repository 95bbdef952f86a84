"""Sample grids: the best checkpoint's in full, and a few others in step order to see the samples sharpen; the pictures of what
that checkpoint does on the way; and whether its samples are copies of training images."""

from collections.abc import Sequence
from functools import partial

from ddpm_core.records import (
    CI_HIGH,
    CI_LOW,
    CONTACT_SHEET,
    HELD_OUT,
    MEMORIZED,
    MEMORIZED_FEATURES,
    neighbours_path,
    pictures_path,
)
from ddpm_core.verdicts import listed
from reports.drawing.elements import Illustration
from reports.drawing.pictures import UnreadablePicture, enlargement, inline, spaced_grid, square_sheet
from reports.formatting import NOT_MEASURED, count, fixed, number
from reports.records import artifacts
from reports.records.entities import EvaluationRecord, PictureGrid, RunRecord
from reports.records.store import Series, Store
from reports.verdicts.ranking import Entry, Ranking
from reports.verdicts.wording import decimals_of, metric_name

# Base64 adds a third, and the page stays below 10 MB with its figures and tables.
GRID_BYTES = 2_400_000
SMALL_BYTES = 60_000
SHEET_BYTES = 500_000
PICTURE_BYTES = 400_000
PICTURES = 6
CANDIDATES = 20  # checkpoints, from the best on, among which one with pictures is looked for
SMALL_GRIDS = 12
SMALL_TILES = 16
TITLES = {
    "progressive": "Progressive generation",
    "shared": "Samples that share a latent",
    "interpolation": "Interpolations between images",
    "coarse_to_fine": "Interpolations, coarse to fine",
    "neighbours_pixels": "Nearest training images in pixel space",
    "neighbours_features": "Nearest training images in feature space",
}


def best_grid(store: Store, entry: Entry) -> Illustration | None:
    """The sample grid of a checkpoint, None if none was stored or it cannot be read."""
    path = entry.evaluation.samples.get(entry.checkpoint.step)
    content = store.artifact(entry.evaluation.run_id, path) if path else None
    try:
        image = inline(square_sheet(content or b"", entry.evaluation.layout), target=576, budget=GRID_BYTES)
    except UnreadablePicture:
        return None
    samples = _samples_text(entry.evaluation)
    caption = f"{samples} Step {entry.checkpoint.step:,} of {entry.run.name}.{image.note}"
    return Illustration(image=image, alt=f"Grid of generated images. {caption}", caption=caption)


def _samples_text(evaluation: EvaluationRecord) -> str:
    """Which samples a grid shows."""
    layout = evaluation.layout
    if layout is None:
        return f"Uncurated samples, seed {evaluation.protocol.seed}."
    text = f"{layout.count} uncurated samples: indices {layout.indices} of seed {layout.seed}, none picked."
    if enlargement(max(layout.tile)) > 1:
        text += f" Images of {layout.tile[1]}x{layout.tile[0]} pixels, enlarged smoothly."
    return text


def progression(store: Store, entry: Entry) -> tuple[Illustration, ...]:
    """Small grids of the same evaluation in step order, at most `SMALL_GRIDS` and the best among them: the same indices and
    seed at every step, so a place holds the same noise."""
    evaluation, best = entry.evaluation, entry.checkpoint.step
    distances = {point.step: fixed(point.distance, decimals_of(entry)) for point in evaluation.checkpoints}
    name = metric_name(evaluation.protocol.distance)
    grids = []
    for step in spread(sorted(evaluation.samples), keep=best):
        content = store.artifact(evaluation.run_id, evaluation.samples[step])
        try:
            tiles = square_sheet(content or b"", evaluation.layout, most=SMALL_TILES)
            image = inline(tiles, target=160, budget=SMALL_BYTES)
        except UnreadablePicture:
            continue
        grids.append(
            Illustration(
                image=image,
                alt=f"Generated images at step {step:,}",
                caption=f"step {step:,}: {name} {distances.get(step, NOT_MEASURED)}",
                best=step == best,
            )
        )
    return tuple(grids)


def spread(steps: Sequence[int], keep: int) -> list[int]:
    """At most SMALL_GRIDS of ascending steps: the first, the last, `keep`, and evenly between."""
    if len(steps) <= SMALL_GRIDS:
        return list(steps)
    chosen = {steps[round(place * (len(steps) - 1) / (SMALL_GRIDS - 1))] for place in range(SMALL_GRIDS)}
    if keep in steps and keep not in chosen:
        inner = sorted(chosen)[1:-1]
        chosen.remove(min(inner, key=lambda step: abs(step - keep)))
        chosen.add(keep)
    return sorted(chosen)


def process_pictures(store: Store, ranking: Ranking) -> tuple[int, tuple[Illustration, ...]]:
    """The pictures of the best checkpoint that has any, and its step: chains, latents, interpolations and neighbours."""
    best = ranking.best
    if best is None:
        return 0, ()
    entries = [entry for entry in ranking.entries if entry.run.run_id == best.run.run_id]
    for step in (entry.checkpoint.step for entry in entries[:CANDIDATES]):
        for evaluation in best.run.evaluations:
            illustrations = _pictures_of(store, evaluation.run_id, step)
            if illustrations:
                return step, illustrations
    return best.checkpoint.step, ()


def _pictures_of(store: Store, run_id: str, step: int) -> tuple[Illustration, ...]:
    """The pictures of a checkpoint that an evaluation has, in the order of TITLES."""
    grids = artifacts.read(store, run_id, pictures_path(step), partial(artifacts.picture_grids, step=step)) or []
    order = {kind: place for place, kind in enumerate(TITLES)}
    grids.sort(key=lambda grid: order.get(grid.kind, len(order)))
    illustrations = [_illustration(store, run_id, grid) for grid in grids[:PICTURES]]
    return tuple(illustration for illustration in illustrations if illustration is not None)


def _illustration(store: Store, run_id: str, grid: PictureGrid) -> Illustration | None:
    """One picture with its labels, if they fit its rows and columns; None if it cannot be read."""
    content = store.artifact(run_id, grid.path)
    try:
        tiles = spaced_grid(content or b"", grid.tile, grid.rows, grid.columns)
        image = inline(tiles, target=700, budget=PICTURE_BYTES)
    except UnreadablePicture:
        return None
    title = TITLES.get(grid.kind, grid.kind.replace("_", " "))
    fits = len(grid.row_labels) == grid.rows and len(grid.column_labels) == grid.columns
    axes = f" Rows: {listed(list(grid.row_labels))}. Columns: {listed(list(grid.column_labels))}." if fits else ""
    return Illustration(
        image=image,
        alt=f"{title}: {grid.rows} x {grid.columns} images.{axes}",
        caption=grid.caption + image.note,
        title=title,
        row_labels=grid.row_labels if fits else (),
        column_labels=grid.column_labels if fits else (),
    )


def contact_sheet(store: Store, run: RunRecord) -> Illustration | None:
    """The training data's contact sheet, None if the run has none."""
    content = store.artifact(run.run_id, CONTACT_SHEET)
    try:
        image = inline(square_sheet(content or b"", run.sheet), target=512, budget=SHEET_BYTES)
    except UnreadablePicture:
        return None
    name = run.card.name if run.card else "the training data"
    caption = f"Training images of {name}.{image.note}"
    return Illustration(image=image, alt=f"Contact sheet of {name}", caption=caption)


def memorization(store: Store, ranking: Ranking) -> tuple[str, ...]:
    """Whether samples are copies of training images: the fraction that lies nearer to one training image than to the rest, and
    that of held-out images to compare it with. A sentence a space, about the best checkpoint of the leading run whose
    neighbours were looked up; empty if there is none."""
    if ranking.best is None:
        return ()
    run = ranking.best.run
    steps = [entry.checkpoint.step for entry in ranking.entries if entry.run.run_id == run.run_id]
    for evaluation in run.evaluations:
        spaces = {MEMORIZED: "pixel space", evaluation.protocol.metric(MEMORIZED_FEATURES): "feature space"}
        sentences = [_memorized(store, evaluation, metric, space, steps) for metric, space in spaces.items()]
        if any(sentences):
            return tuple(sentence for sentence in sentences if sentence)
    return ()


def _memorized(store: Store, evaluation: EvaluationRecord, metric: str, space: str, steps: Sequence[int]) -> str:
    """What a metric says at the first of the steps that has it; empty if none has."""

    def history(name: str) -> Series:
        return store.history(evaluation.run_id, name) if name in evaluation.metrics else Series()

    def percent(value: float) -> str:
        return f"{number(100 * value, 3)} %"

    fractions = history(metric)
    step = next((step for step in steps if fractions.at(step) is not None), None)
    if step is None:
        return ""
    fraction, low, high, held_out = (history(metric + end).at(step) for end in ("", CI_LOW, CI_HIGH, HELD_OUT))
    facts = artifacts.read(store, evaluation.run_id, neighbours_path(step), artifacts.neighbours)
    of = f"{count(facts.samples)} samples" if facts else "the samples looked up"
    text = f"Of {of} of step {step:,}, {percent(fraction or 0.0)} stand out as copies in {space}"
    if low is not None and high is not None:
        text += f" (95\N{NO-BREAK SPACE}% interval {percent(low)} to {percent(high)})"
    if facts:
        text += (
            f": nearer to one of {count(facts.training_images)} training images than {facts.threshold} times the mean "
            f"distance of the {facts.nearest} nearest"
        )
    if held_out is None:
        return f"{text}. No held-out images were looked up to compare this with."
    return f"{text}. Of held-out images {percent(held_out)} do."
