"""How this experiment's numbers stand to the paper's: which were measured alike, and those alone may stand beside them."""

import re
from collections.abc import Iterable

from ddpm_core.protocol import INCEPTION, Protocol
from ddpm_core.verdicts import listed
from reports.formatting import fixed
from reports.records.entities import BitsPerDim, DataCard, LikelihoodRecord, RunRecord
from reports.verdicts import paper
from reports.verdicts.ranking import Entry, Ranking, measured_again
from reports.verdicts.wording import decimals_of

Objective = tuple[str, str, bool]  # mean_type, loss_type, whether the variance is learned: a row of Table 2

_PAPER_DATA = (
    (re.compile(r"cifar10(?!0)"), paper.CIFAR10),
    (re.compile(r"(lsun)?bedroom"), paper.LSUN_BEDROOM),
    (re.compile(r"(lsun)?church"), paper.LSUN_CHURCH),
    (re.compile(r"(lsun)?cat(?![a-z])"), paper.LSUN_CAT),
)


def paper_data(name: str) -> paper.Reported | None:
    """The paper's own FID on the training set of that name, None if it reports none (CelebA-HQ among them)."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((reported for pattern, reported in _PAPER_DATA if pattern.match(plain)), None)


def paper_result(name: str, protocol: Protocol) -> paper.Reported | None:
    """The paper's FID on a data set, against what the protocol measures against."""
    reported = paper_data(name)
    against_test = protocol.against == "test" or "test" in protocol.reference.lower()
    return paper.CIFAR10_TEST if reported is paper.CIFAR10 and against_test else reported


def data_of(run: RunRecord) -> paper.Reported | None:
    """The data set of the paper that a run was trained on."""
    if run.card is not None:
        return paper_data(run.card.name)
    return paper_data(run.evaluations[0].protocol.reference) if run.foreign and run.evaluations else None


def data_name(entry: Entry) -> str | None:
    """The name of an entry's training data, None without a data card. Weights from elsewhere come without one: they are
    taken to be of the data that they are compared with."""
    if entry.run.foreign:
        return entry.evaluation.protocol.reference
    return entry.run.card.name if entry.run.card else None


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
        (f"an EMA of length {protocol.ema_length}", "one of decay 0.9999", protocol.ema_length is not None),
        ("predictions of x_0 that are not clipped", "clipped ones", not protocol.clip_denoised),
        (f"the variance {protocol.var_type}", "the training's own", protocol.var_type is not None),
    ]
    if card is not None and card.shape:
        size = f"{card.shape[0]} × {card.shape[1] if len(card.shape) > 1 else card.shape[0]} pixels"
        wanted = f"{reported.resolution} × {reported.resolution}"
        pairs.append((size, wanted, tuple(card.shape[:2]) != (reported.resolution, reported.resolution)))
    return [f"{ours} instead of {wanted}" for ours, wanted, differs in pairs if differs]


def compare_with_paper(entry: Entry) -> str:
    """How an FID stands to the paper's, and every way in which the two were measured differently. Says so if there is
    nothing to compare: another extractor, or data the paper has no FID of."""
    protocol = entry.evaluation.protocol
    if protocol.distance != "fid":
        return (
            f"{protocol.distance} is a Fréchet distance on features of {protocol.extractor}. The paper's "
            "numbers are FID on the Inception network and are not comparable with it."
        )
    data = data_name(entry) or "data without a card"
    reported = paper_result(data, protocol)
    if reported is None:
        return f"The paper reports no FID for {data}, so there is nothing to compare this one with."
    difference = entry.checkpoint.distance - reported.fid
    side = "higher" if difference > 0 else "lower"
    sentence = (
        f"The paper reports {reported.fid} for {reported.data} ({reported.place}); "
        f"this is {fixed(abs(difference), decimals_of(entry))} {side}."
    )
    caveats = departures(entry.run.card, protocol, reported)
    if caveats:
        sentence += f" It was not measured as the paper's was: {listed(caveats)}."
    return sentence


def reported_alike(entry: Entry) -> paper.Reported | None:
    """The paper's FID that was measured as an entry's, None if there is none."""
    protocol = entry.evaluation.protocol
    reported = paper_result(data_name(entry) or "", protocol)
    alike = protocol.extractor == INCEPTION and reported and not departures(entry.run.card, protocol, reported)
    return reported if alike else None


def best_as_the_paper(
    runs: Iterable[RunRecord], rankings: tuple[Ranking, ...], reported: paper.Reported, against: str = "train"
) -> Entry | None:
    """The lowest FID that was measured as the paper's, on samples that it was not chosen by if there are such."""
    ids = {run.run_id for run in runs}
    for purpose in ("selection", "report"):
        entries = [
            entry
            for ranking in rankings
            if (ranking.protocol.against, ranking.protocol.purpose) == (against, purpose)
            for entry in ranking.entries
            if entry.run.run_id in ids
            and ranking.protocol.extractor == INCEPTION
            and not departures(entry.run.card, ranking.protocol, reported)
        ]
        if entries:
            best = min(entries, key=lambda entry: (entry.checkpoint.distance, entry.checkpoint.step))
            return measured_again(best, rankings) or best
    return None


def objective_of(run: RunRecord) -> Objective | None:
    """Where a run stands in Table 2, None if its parameters are not recorded or no row is like it."""
    mean, loss, variance = (run.params.get(f"diffusion.{name}_type") for name in ("mean", "loss", "var"))
    if mean is None or loss is None or variance is None:
        return None
    objective = (mean, loss, variance.startswith("learned"))
    return objective if any(objective == row_objective(row) for row in paper.TABLE_2) else None


def row_objective(row: paper.AblationRow) -> Objective:
    """What a row of Table 2 is about."""
    return row.mean_type, row.loss_type, row.learned_variance


def cifar10_likelihood(run: RunRecord, *, of_training: bool) -> tuple[LikelihoodRecord, BitsPerDim] | None:
    """The newest checkpoint's likelihood of the whole training or test set of CIFAR-10 under EMA weights, the full bound
    before an estimate; None if that was not measured."""
    results = [
        (likelihood, likelihood.results[-1])
        for likelihood in run.likelihoods
        if likelihood.results
        and is_of_whole_cifar10(run, likelihood)
        and is_of_training(run, likelihood) == of_training
    ]
    return max(results, key=lambda pair: (pair[0].strata is None, pair[1].step)) if results else None


def is_of_whole_cifar10(run: RunRecord, likelihood: LikelihoodRecord) -> bool:
    """Whether a likelihood is of the images and weights that the paper's are of: all of CIFAR-10's training or test set."""
    whole = paper.CIFAR10 if is_of_training(run, likelihood) else paper.CIFAR10_TEST
    return (
        likelihood.weights == "ema"
        and likelihood.images == whole.reference_images
        and paper_data(likelihood.data) is paper.CIFAR10
    )


def is_of_training(run: RunRecord, likelihood: LikelihoodRecord) -> bool:
    """Whether a likelihood is of the images that the run was trained on."""
    sets = {each.protocol.reference_sha256 for each in run.evaluations if each.protocol.against == "train"}
    return likelihood.data_sha256 in sets | ({run.card.sha256} if run.card else set())
