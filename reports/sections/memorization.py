"""Whether samples are copies of training images, in a sentence: the fraction that lies nearer to one training image than
to the rest, and the same fraction of held-out images to compare it with."""

import json
from collections.abc import Mapping

from reports.records.store import Store
from reports.verdicts.formatting import count, number
from reports.verdicts.ranking import Ranking

_SPACES = (("memorized", "pixel space"), ("memorized_features", "feature space"))


def memorization(store: Store, ranking: Ranking) -> tuple[str, ...]:
    """A sentence a space, about the best checkpoint of the leading run that was looked up; empty where none was."""
    if ranking.best is None:
        return ()
    run = ranking.best.run
    steps = [entry.checkpoint.step for entry in ranking.entries if entry.run.run_id == run.run_id]
    for evaluation in run.evaluations:
        logged = {name for name in evaluation.metrics if name.startswith("memorized")}
        told = []
        for plain, space in _SPACES:
            name = plain if plain in logged else evaluation.protocol.metric(plain)
            if name not in logged:
                continue
            series = store.history(evaluation.run_id, name)
            step = next((step for step in steps if series.at(step) is not None), None)
            if step is None:
                continue
            values = {
                other: store.history(evaluation.run_id, other).at(step) for other in logged if other.startswith(name)
            }
            told.append(_sentence(name, values, space, step, _facts(store, evaluation.run_id, step)))
        if told:
            return tuple(told)
    return ()


def _sentence(name: str, values: Mapping[str, float | None], space: str, step: int, facts: Mapping[str, object]) -> str:
    def percent(value: float | None) -> str:
        return f"{number(None if value is None else 100 * value, 3)} %"

    samples, images = facts.get("samples"), facts.get("training_images")
    of = f"{count(samples)} samples" if isinstance(samples, int) else "the samples looked up"
    among = f"{count(images)} training images" if isinstance(images, int) else "the training images"
    text = f"Of {of} of step {step:,}, {percent(values[name])} stand out as copies in {space}"
    low, high = values.get(f"{name}_ci_low"), values.get(f"{name}_ci_high")
    if low is not None and high is not None:
        text += f" (95\N{NO-BREAK SPACE}% interval {percent(low)} to {percent(high)})"
    threshold, nearest = facts.get("threshold", 0.5), facts.get("nearest", 50)
    text += f": nearer to one of {among} than {threshold} times the mean distance of the {nearest} nearest."
    held_out = next((values[key] for key in (f"{name}_held_out", f"{name}_test") if values.get(key) is not None), None)
    if held_out is None:
        return text + " No held-out images were looked up to compare this with."
    return text + f" Of held-out images {percent(held_out)} do."


def _facts(store: Store, run_id: str, step: int) -> Mapping[str, object]:
    try:
        facts = json.loads(store.artifact(run_id, f"neighbours/step-{step:08d}.json") or b"{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
