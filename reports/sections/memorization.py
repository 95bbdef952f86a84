"""Whether samples are copies of training images, in a sentence: the fraction that lies nearer to one training image than
to the rest, and the same fraction of held-out images to compare it with."""

from collections.abc import Sequence

from ddpm_core.records import CI_HIGH, CI_LOW, HELD_OUT, MEMORIZED, MEMORIZED_FEATURES, neighbours_path
from reports.formatting import count, number
from reports.records import artifacts
from reports.records.entities import EvaluationRecord
from reports.records.store import Series, Store
from reports.verdicts.ranking import Ranking


def memorization(store: Store, ranking: Ranking) -> tuple[str, ...]:
    """A sentence a space, about the best checkpoint of the leading run whose neighbours were looked up; empty if there is
    none."""
    if ranking.best is None:
        return ()
    run = ranking.best.run
    steps = [entry.checkpoint.step for entry in ranking.entries if entry.run.run_id == run.run_id]
    for evaluation in run.evaluations:
        spaces = {MEMORIZED: "pixel space", evaluation.protocol.metric(MEMORIZED_FEATURES): "feature space"}
        sentences = [_sentence(store, evaluation, metric, space, steps) for metric, space in spaces.items()]
        if any(sentences):
            return tuple(sentence for sentence in sentences if sentence)
    return ()


def _sentence(store: Store, evaluation: EvaluationRecord, metric: str, space: str, steps: Sequence[int]) -> str:
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
