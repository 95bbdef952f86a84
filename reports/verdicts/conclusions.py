"""What the rankings come to, in sentences: the answer, how sure it is, and how it stands to the paper."""

import re
from dataclasses import dataclass

from ddpm_core.protocol import Protocol
from ddpm_core.records import LOSS
from reports.records.entities import DataCard, ExperimentRecord
from reports.verdicts import paper
from reports.verdicts.formatting import NOT_MEASURED, count, counted, decimals_for, fixed, listed, number
from reports.verdicts.ranking import Entry, Ranking, Verdict, measured_again

_PAPER_DATA = (
    (re.compile(r"cifar10(?!0)"), paper.CIFAR10),
    (re.compile(r"(lsun)?bedroom"), paper.LSUN_BEDROOM),
    (re.compile(r"(lsun)?church"), paper.LSUN_CHURCH),
    (re.compile(r"(lsun)?cat(?![a-z])"), paper.LSUN_CAT),
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The top of the report: a headline, the sentences that qualify it, and small print."""

    headline: str
    sentences: tuple[str, ...]
    notes: tuple[str, ...] = ()


def metric_name(name: str) -> str:
    """A metric as people write it: FID, Inception score; other extractors keep the name they are logged
    by."""
    names = {"fid": "FID", "fid_test": "FID (test set)", "is": "Inception score", "is_test": "Inception score"}
    return names.get(name, name)


def distance_text(entry: Entry) -> str:
    """A measured distance with the digits its interval supports."""
    point = entry.checkpoint
    return fixed(point.distance, decimals_for(point.distance, point.low, point.high))


def interval_text(entry: Entry, decimals: int | None = None) -> str:
    """Both ends of the 95 % interval; "not measured" without one."""
    point = entry.checkpoint
    if point.interval is None:
        return NOT_MEASURED
    digits = decimals_for(point.distance, point.low, point.high) if decimals is None else decimals
    return f"{fixed(point.low, digits)} to {fixed(point.high, digits)}"


def answer(record: ExperimentRecord, rankings: tuple[Ranking, ...]) -> Answer:
    """The best checkpoint of the leading protocol in words, or why there is none."""
    if not rankings or not any(ranking.entries or ranking.unranked for ranking in rankings):
        return _nothing_evaluated(record)
    ranking = rankings[0]
    name = metric_name(ranking.protocol.distance)
    best = ranking.best
    if best is None:
        return Answer(
            headline=f"No evaluated checkpoint has a finite {name}",
            sentences=(f"{counted(len(ranking.unranked), 'checkpoint')} measured, none with a usable value.",),
        )
    alone = len(ranking.entries) == 1
    verb = f"has {name}" if alone else f"has the lowest {name},"
    headline = f"Step {best.checkpoint.step:,} {verb} {distance_text(best)}"
    again = measured_again(best, rankings)
    sentences = [
        f"Checkpoint of {best.run.name}. {_interval(best)}",
        _rivals(ranking),
        *_measured_again(again),
        compare_with_paper(again or best),
    ]
    if len(rankings) > 1:
        sentences.append(
            f"This experiment was measured under {counted(len(rankings), 'protocol')}, whose numbers do not "
            f"compare; this is the one to choose by, with {count(ranking.protocol.num_samples)} samples, and each has its "
            "own ranking below."
        )
    notes = [f"Measured with {ranking.protocol.describe()}."]
    if not alone and again is None:
        notes.append(
            "The checkpoint was chosen and is reported on the same seeds, so its value is optimistic: "
            "the minimum over checkpoints is lower than a fresh measurement of it would be on average."
        )
    return Answer(headline=headline, sentences=tuple(sentences), notes=tuple(notes))


def compare_with_paper(entry: Entry) -> str:
    """How an FID stands to the paper's, and every way in which the two were measured differently. Says
    plainly where there is nothing to compare: another extractor, or data the paper has no FID of."""
    protocol = entry.evaluation.protocol
    if protocol.distance != "fid":
        return (
            f"{protocol.distance} is a Fréchet distance on features of {protocol.extractor}. The paper's "
            "numbers are FID on the Inception network and are not comparable with it."
        )
    card = entry.run.card
    # Weights from elsewhere come without a card: they are taken to be of the data they are compared with.
    data = protocol.reference if entry.run.foreign else card.name if card else "data without a card"
    reported = paper_result(data, protocol)
    if reported is None:
        return f"The paper reports no FID for {data}, so there is nothing to compare this one with."
    point = entry.checkpoint
    difference = point.distance - reported.fid
    side = "higher" if difference > 0 else "lower"
    sentence = (
        f"The paper reports {reported.fid} for {reported.data} ({reported.place}); "
        f"this is {fixed(abs(difference), decimals_for(point.distance, point.low, point.high))} {side}."
    )
    caveats = departures(card, protocol, reported)
    if caveats:
        sentence += f" It was not measured as the paper's was: {listed(caveats)}."
    return sentence


def paper_data(name: str) -> paper.Reported | None:
    """The paper's own FID on the training set of that name, None where it reports none (CelebA-HQ among them)."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((reported for pattern, reported in _PAPER_DATA if pattern.match(plain)), None)


def paper_result(name: str, protocol: Protocol) -> paper.Reported | None:
    """The paper's FID on a data set, against what the protocol measures against."""
    reported = paper_data(name)
    against_test = protocol.against == "test" or "test" in protocol.reference.lower()
    return paper.CIFAR10_TEST if reported is paper.CIFAR10 and against_test else reported


def departures(card: DataCard | None, protocol: Protocol, reported: paper.Reported) -> list[str]:
    """Every way in which an FID was measured otherwise than the paper's."""
    pairs = [
        (f"{protocol.num_samples:,} samples", f"{paper.SAMPLES:,}", protocol.num_samples != paper.SAMPLES),
        (
            f"{protocol.reference_images:,} reference images",
            f"{reported.reference_images:,}",
            protocol.reference_images != reported.reference_images,
        ),
        (
            f"{protocol.sampler_steps:,} {protocol.sampler} steps",
            f"{paper.SAMPLER_STEPS:,} ancestral ones",
            (protocol.sampler, protocol.sampler_steps) != ("ancestral", paper.SAMPLER_STEPS),
        ),
        (f"{protocol.weights} weights", "their moving average", protocol.weights != "ema"),
        ("predictions of x_0 that are not clipped", "clipped ones", not protocol.clip_denoised),
    ]
    if card is not None and card.shape:
        size = f"{card.shape[0]} × {card.shape[1] if len(card.shape) > 1 else card.shape[0]} pixels"
        wanted = f"{reported.resolution} × {reported.resolution}"
        pairs.append((size, wanted, tuple(card.shape[:2]) != (reported.resolution, reported.resolution)))
    return [f"{ours} instead of {theirs}" for ours, theirs, differs in pairs if differs]


def _measured_again(again: Entry | None) -> list[str]:
    if again is None:
        return []
    name, value = metric_name(again.evaluation.protocol.distance), distance_text(again)
    return [f"On samples that it was not chosen by, it has {name} {value}. {_interval(again)}"]


def _interval(best: Entry) -> str:
    if best.checkpoint.interval is None:
        return "Its interval is not measured."
    return f"95\N{NO-BREAK SPACE}% interval: {interval_text(best)}."


def _rivals(ranking: Ranking) -> str:
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
    status = f"The experiment holds {counted(len(record.runs), 'training run')}, and no result of an evaluation."
    losses = [f"{run.name} has {number(run.latest[LOSS])}" for run in record.runs if LOSS in run.latest]
    if not losses:
        return Answer(
            headline="No checkpoint has been evaluated yet", sentences=(status, "No loss was measured either.")
        )
    told = listed(losses) if len(losses) <= 3 else f"{losses[-1]} (the newest of {len(losses):,} runs)"
    return Answer(
        headline="No checkpoint has been evaluated yet",
        sentences=(status, f"Last loss: {told}. A loss alone does not say how good samples are."),
    )
