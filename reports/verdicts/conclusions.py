"""What the records come to, in sentences: the answer, how sure it is, how it stands to the paper; alarms of the nightly
evaluation, and what went wrong."""

import math
from dataclasses import dataclass

from ddpm_core.records import ALARM_TAG, LOSS
from ddpm_core.verdicts import Verdict, listed
from reports.formatting import count, counted, number
from reports.records.entities import ExperimentRecord
from reports.verdicts.comparison import compare_with_paper
from reports.verdicts.ranking import Entry, Ranking, measured_again
from reports.verdicts.wording import distance_text, interval_text, metric_name

SHOWN = 10  # sentences on what went wrong


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The top of the report: a headline, the sentences that qualify it, and small print."""

    headline: str
    sentences: tuple[str, ...]
    notes: tuple[str, ...] = ()


def answer(record: ExperimentRecord, rankings: tuple[Ranking, ...]) -> Answer:
    """The best checkpoint of the leading protocol in words, or why there is none."""
    if not any(ranking.entries or ranking.unranked for ranking in rankings):
        return _nothing_evaluated(record)
    leading = rankings[0]
    name = metric_name(leading.protocol.distance)
    if leading.best is None:
        return Answer(
            headline=f"No evaluated checkpoint has a finite {name}",
            sentences=(f"{counted(len(leading.unranked), 'checkpoint')} measured, none with a usable value.",),
        )
    return _best_checkpoint(leading, leading.best, rankings)


def _best_checkpoint(leading: Ranking, best: Entry, rankings: tuple[Ranking, ...]) -> Answer:
    name, alone = metric_name(leading.protocol.distance), len(leading.entries) == 1
    verb = f"has {name}" if alone else f"has the lowest {name},"
    again = measured_again(best, rankings)
    sentences = [f"Checkpoint of {best.run.name}. {_interval(best)}", _rivals(leading)]
    if again is not None:
        sentences.append(
            f"On samples that it was not chosen by, it has {name} {distance_text(again)}. {_interval(again)}"
        )
    sentences.append(compare_with_paper(again or best))
    if len(rankings) > 1:
        sentences.append(
            f"This experiment was measured under {counted(len(rankings), 'protocol')}, whose numbers do not "
            f"compare; this is the one to choose by, with {count(leading.protocol.num_samples)} samples, and each has its "
            "own ranking below."
        )
    notes = [f"Measured with {leading.protocol.describe()}."]
    if not alone and again is None:
        notes.append(
            "The checkpoint was chosen and is reported on the same seeds, so its value is optimistic: "
            "the minimum over checkpoints is lower than a fresh measurement of it would be on average."
        )
    return Answer(
        headline=f"Step {best.checkpoint.step:,} {verb} {distance_text(best)}",
        sentences=tuple(sentences),
        notes=tuple(notes),
    )


def _interval(entry: Entry) -> str:
    if entry.checkpoint.interval is None:
        return "Its interval is not measured."
    return f"95\N{NO-BREAK SPACE}% interval: {interval_text(entry)}."


def _rivals(ranking: Ranking) -> str:
    """How many of the others the intervals tell apart from the best."""
    others = len(ranking.entries) - 1
    if not others:
        return "It is the only checkpoint evaluated under its protocol, so nothing was chosen."
    if ranking.best is None or ranking.best.checkpoint.interval is None:
        return f"Whether the {counted(others, 'other checkpoint')} can be told apart from it is not known."
    close, unknown = ranking.count(Verdict.INDISTINGUISHABLE), ranking.count(Verdict.NO_INTERVAL)
    if close:
        text = (
            f"{close:,} of the {counted(others, 'other checkpoint')} {'is' if close == 1 else 'are'} not "
            "distinguishable from the best: the intervals overlap."
        )
    else:
        text = f"None of the {counted(others, 'other checkpoint')} has an interval that overlaps it."
    return text + (f" For {unknown:,} no interval was measured." if unknown else "")


def _nothing_evaluated(record: ExperimentRecord) -> Answer:
    """The last losses, which are all there is."""
    losses = [f"{run.name} has {number(run.latest[LOSS])}" for run in record.runs if LOSS in run.latest]
    if not losses:
        sentence = "No loss was measured either."
    else:
        shown = listed(losses) if len(losses) <= 3 else f"{losses[-1]} (the newest of {len(losses):,} runs)"
        sentence = f"Last loss: {shown}. A loss alone does not say how good samples are."
    return Answer(
        headline="No checkpoint has been evaluated yet",
        sentences=(
            f"The experiment holds {counted(len(record.runs), 'training run')}, and no result of an evaluation.",
            sentence,
        ),
    )


def alarms(record: ExperimentRecord) -> tuple[str, ...]:
    """What the nightly evaluation warned of, of trainings and of their checkpoints."""
    pairs = [
        (run.name, text)
        for run in record.runs
        for text in (run.tags.get(ALARM_TAG, ""), *(evaluation.alarm for evaluation in run.evaluations))
    ]
    return tuple(f"{name}: {text}" for name, text in pairs if text)


def attention(record: ExperimentRecord) -> tuple[str, ...]:
    """Records that could not be used, runs that failed, losses that are not finite, evaluations that are not whole."""
    sentences = list(record.remarks)
    for run in record.runs:
        if run.status in ("FAILED", "KILLED") and not run.foreign:
            sentences.append(f"Training run {run.name} {'failed' if run.status == 'FAILED' else 'was killed'}.")
        if not math.isfinite(run.latest.get(LOSS, 0.0)):
            sentences.append(f"The last loss of {run.name} is not a finite number.")
        for evaluation in run.evaluations:
            if not evaluation.checkpoints:
                sentences.append(f"An evaluation of {run.name} ({evaluation.run_id}) has no result.")
            elif evaluation.status in ("FAILED", "KILLED"):
                sentences.append(
                    f"An evaluation of {run.name} ({evaluation.run_id}) did not end well: some are missing."
                )
    if len(sentences) > SHOWN:
        sentences[SHOWN:] = [f"And {len(sentences) - SHOWN:,} more of the kind."]
    return tuple(sentences)
