"""What a night's results mean: alarms, and the aliases of the best checkpoints. Trouble with one training does not hide what is
to be said of the others."""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace

from filelock import Timeout

from ddpm_core.checkpoint import checkpoint_name, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from ddpm_core.records import ALARM_TAG, TRAIN
from pipelines.checkpoints.store import made_at, saved_steps
from pipelines.evaluate.evaluation import Evaluation
from pipelines.evaluate.illustrate import illustrate
from pipelines.nightly.alarms import Alarm, degenerate, given_up, refused, regressions, stopped
from pipelines.nightly.champion import Candidate, Champion, update_alias
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.ledger import Ledger
from pipelines.nightly.trainings import NightlyTraining
from pipelines.runtime.fan_out import OutOfTime
from pipelines.runtime.progress import Say
from pipelines.storage.layout import Storage
from pipelines.storage.locations import is_there
from pipelines.tracking.tracker import Tracker


@contextlib.contextmanager
def continue_on_error(what: str, say: Say) -> Iterator[None]:
    """Say what goes wrong in the block, and go on behind it."""
    try:
        yield
    except OutOfTime:
        pass
    except Exception as error:
        say(f"nightly: {what}: {error}" if isinstance(error, InputError) else traceback.format_exc())


def find_alarms(
    trainings: Sequence[NightlyTraining], ledger: Ledger, config: NightlyConfig, now: float, say: Say
) -> list[Alarm]:
    """All alarms that stand. now: seconds."""
    alarms: list[Alarm] = []
    for training in trainings:
        with continue_on_error(training.name, say):
            alarms += alarms_of(training, ledger, config, now)
    return [*alarms, *(refused(each.name, each.refused) for each in trainings if each.refused is not None)]


def alarms_of(training: NightlyTraining, ledger: Ledger, config: NightlyConfig, now: float) -> list[Alarm]:
    """All alarms that stand for a training, but for its refusal."""
    name, steps = training.name, saved_steps(training.folder)
    last = (steps[-1], made_at(training.folder / checkpoint_name(steps[-1]))) if steps else None
    failures = {step: ledger.failures(name, checkpoint_name(step)) for step in steps}
    too_many = {step: ends for step, ends in failures.items() if len(ends) >= config.attempts}
    evaluations = training.evaluations()
    alarms = [
        *stopped(training.record, last, now, config.quiet_hours),
        *given_up(name, too_many, config.attempts),
        *regressions(name, evaluations, config.worse_by),
    ]
    for newest in evaluations[-1:]:
        values = {**newest.values, **memorized(training, newest)}
        alarms += degenerate(name, replace(newest, values=values))
    return alarms


def memorized(training: NightlyTraining, evaluation: Evaluation) -> dict[str, float]:
    """What the neighbours of an evaluation's samples say, if they are asked for and there is time."""
    evaluator, path = training.evaluator, training.folder / evaluation.folder.name
    if evaluator is None or not evaluator.subject.config.nearest or not is_there(path / MANIFEST):
        return {}
    with contextlib.suppress(OutOfTime):
        memorization = illustrate(evaluator.subject, evaluator.records, open_checkpoint(path), evaluator.pool)
        return {} if memorization is None else memorization.values(evaluation.protocol)
    return {}


def tag_alarms(trainings: Sequence[NightlyTraining], alarms: Sequence[Alarm], tracker: Tracker, say: Say) -> None:
    """Put the alarms into MLflow, as tags of the runs that they are about; tags of those that are over are cleared."""
    for training in trainings:
        with continue_on_error(training.name, say):
            evaluator, own = training.evaluator, [alarm for alarm in alarms if alarm.run == training.name]
            evaluated = evaluator.records.find(evaluator.subject.protocol("train", "selection")) if evaluator else None
            trained = tracker.find(TRAIN, training.name)
            of_training = [alarm.text for alarm in own if alarm.of_training or evaluated is None]
            of_checkpoints = [alarm.text for alarm in own if not alarm.of_training]
            for run, texts in ((trained, of_training), (evaluated, of_checkpoints)):
                if run is not None:
                    run.set_tags({ALARM_TAG: "; ".join(texts)})


def update_aliases(
    trainings: Sequence[NightlyTraining], tracker: Tracker, experiment: str, storage: Storage, say: Say
) -> list[Champion]:
    """Have the aliases of each protocol's model point at its best and its newest checkpoint. The best ones."""
    groups: dict[str, list[Candidate]] = {}  # by protocol
    for training in trainings:
        with continue_on_error(training.name, say):
            for evaluation in training.current_evaluations():
                assert training.evaluator is not None  # it found them
                candidate = Candidate(training.evaluator, evaluation)
                groups.setdefault(evaluation.protocol.fingerprint, []).append(candidate)
    champions = []
    for fingerprint, candidates in groups.items():
        with continue_on_error(fingerprint, say):
            champions.append(update_alias(tracker, experiment, storage, candidates, say))
    return [champion for champion in champions if champion is not None]


def confirm(champions: Sequence[Champion], ledger: Ledger, say: Say) -> list[Champion]:
    """Measure champions on samples that they were not chosen by, in what time is left."""
    confirmed = []
    for champion in champions:
        again = None
        with (
            continue_on_error(champion.run, say),
            contextlib.suppress(Timeout),  # another job is at it
            ledger.lease(f"{champion.run}-report", 0.0),
        ):
            [again] = champion.evaluator.evaluate([champion.checkpoint], "report")["train"]
        confirmed.append(replace(champion, again=again))
    return confirmed
