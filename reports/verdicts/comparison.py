"""Which of this experiment's numbers were measured as the paper's: those alone may stand beside it."""

from collections.abc import Iterable

from ddpm_core.protocol import INCEPTION, Protocol
from reports.records.entities import BitsPerDim, Likelihood, TrainingRun
from reports.verdicts import paper
from reports.verdicts.conclusions import departures, paper_data
from reports.verdicts.ranking import Entry, Ranking, measured_again

Key = tuple[str, str, bool]  # mean_type, loss_type, whether the variance is learned: a row of Table 2


def data_of(run: TrainingRun) -> paper.Reported | None:
    """The data set of the paper that a run was trained on."""
    if run.card is not None:
        return paper_data(run.card.name)
    return paper_data(run.evaluations[0].protocol.reference) if run.foreign and run.evaluations else None


def as_the_paper(protocol: Protocol, run: TrainingRun, reported: paper.Reported) -> bool:
    """Whether an FID was measured as the paper's: nothing in which the two differ can change it."""
    return protocol.extractor == INCEPTION and not departures(run.card, protocol, reported)


def best_as_the_paper(
    runs: Iterable[TrainingRun], rankings: tuple[Ranking, ...], reported: paper.Reported, against: str = "train"
) -> Entry | None:
    """The lowest FID that was measured as the paper's, on samples that it was not chosen by where there are such."""
    ids = {run.run_id for run in runs}
    found: list[Entry] = []
    for purpose in ("selection", "report"):
        for ranking in rankings:
            protocol = ranking.protocol
            if protocol.against == against and protocol.purpose == purpose:
                found += [
                    entry
                    for entry in ranking.entries
                    if entry.run.run_id in ids and as_the_paper(protocol, entry.run, reported)
                ]
        if found:
            break
    if not found:
        return None
    best = min(found, key=lambda entry: (entry.checkpoint.distance, entry.checkpoint.step))
    return measured_again(best, rankings) or best


def key_of(run: TrainingRun) -> Key | None:
    """Where a run stands in Table 2, None where its parameters are not recorded or no row is like it."""
    mean, loss, variance = (run.params.get(f"diffusion.{name}_type") for name in ("mean", "loss", "var"))
    if mean is None or loss is None or variance is None:
        return None
    key = (mean, loss, variance.startswith("learned"))
    return key if any(key == row_key(row) for row in paper.TABLE_2) else None


def row_key(row: paper.AblationRow) -> Key:
    return row.mean_type, row.loss_type, row.learned_variance


def coded(run: TrainingRun, *, of_training: bool) -> tuple[Likelihood, BitsPerDim] | None:
    """The newest checkpoint's likelihood of the whole training or test set of CIFAR-10 under EMA weights, the full bound
    before an estimate; None where that was not measured."""
    whole = paper.CIFAR10.reference_images if of_training else paper.CIFAR10_TEST.reference_images
    found = [
        (measured, measured.results[-1])
        for measured in run.likelihoods
        if measured.results
        and measured.weights == "ema"
        and measured.images == whole
        and is_of_training(run, measured) == of_training
        and paper_data(measured.data) is paper.CIFAR10
    ]
    return max(found, key=lambda pair: (pair[0].strata is None, pair[1].step)) if found else None


def is_of_training(run: TrainingRun, measured: Likelihood) -> bool:
    """Whether a likelihood is of the images that the run was trained on."""
    sets = {each.protocol.reference_sha256 for each in run.evaluations if each.protocol.against == "train"}
    return measured.data_sha256 in sets | ({run.card.sha256} if run.card else set())
