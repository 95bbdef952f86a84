"""Every night: evaluate the checkpoints that are new, move the alias of the best, raise alarms.

    MLflow: trainings of the experiment -> trainings.py: their checkpoints, which of them have no result
    -> night.py: each under a lease evaluated, by evaluate/'s own Evaluator; a failed one is tried again the next nights
    -> conclude.py: alarms.py finds what is wrong, champion.py moves aliases in MLflow's registry
    -> the job writes the report, and notify.py delivers what no night delivered before

Running it again does what is left. Two jobs at once share the work by leases; were both to do the same, they would commit the
same bits. In the storage, nights that evaluate alike share (ledger.py):

    nightly/EXPERIMENT/report.html             the report, with the alarms first
    nightly/EXPERIMENT/CONFIG/                 CONFIG: a fingerprint of what decides a checkpoint's result
        leases/RUN-step-00001000.lock          a job is at this checkpoint; conclusion.lock: a job moves the aliases
        attempts/RUN/step-00001000.json        how its failed attempts ended, and whether one is under way
        told.json                              the standing alarms that were delivered
        config.toml                            the options of the last night
    train/RUN/lowest-PROTOCOL.mark.json        the training keeps its best checkpoint; alias-...: what the alias points at
"""

import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace

from ddpm_core.errors import InputError, did_you_mean
from pipelines.nightly.alarms import Alarm
from pipelines.nightly.champion import Champion
from pipelines.nightly.conclude import confirm, find_alarms, tag_alarms, update_aliases
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.ledger import open_ledger
from pipelines.nightly.night import Night, Work
from pipelines.nightly.notify import notify
from pipelines.nightly.trainings import NightlyTraining
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.progress import Say
from pipelines.runtime.recipe import keep_recipe
from pipelines.storage.layout import Storage, by_prefix, open_storage
from pipelines.storage.locations import Location
from pipelines.tracking.queries import Training, trainings
from pipelines.tracking.retry import with_retries
from pipelines.tracking.tracker import Tracker, open_tracker
from pipelines.tracking.uri import UnreachableError, tracking_uri


@dataclass(frozen=True)
class NightlyResult:
    """What a night did. elsewhere: in work by another job. left: for lack of time. links: to the ranking of all checkpoints in
    MLflow's UI, one a protocol. alarms: all that stand. new: those of them that no night has delivered."""

    evaluated: list[str] = field(default_factory=list)
    failed: list[Work] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    champions: list[Champion] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    new: list[Alarm] = field(default_factory=list)

    def describe(self) -> list[str]:
        """The night in sentences, the alarms first."""
        alarms = [
            f"ALARM {alarm.run}: {alarm.text}{'' if alarm in self.new else ' (delivered before)'}"
            for alarm in self.alarms
        ]
        counted: dict[str, Sized] = {
            "evaluated": self.evaluated,
            "failed": self.failed,
            "in work elsewhere": self.elsewhere,
            "left for lack of time": self.left,
        }
        parts = [f"{len(names)} {what}" for what, names in counted.items() if names]
        champions = [champion.describe() for champion in self.champions]
        ranked = [f"all checkpoints, ranked in MLflow: {link}" for link in self.links]
        return [*alarms, *champions, f"{', '.join(parts)}" if parts else "nothing was new", *ranked]


def nightly(config: NightlyConfig, say: Say = lambda line: None) -> NightlyResult:
    """Evaluate what has no result, the newest first, as long as the budget lasts; then see what is best and what is wrong.

    Raises InputError if the experiment has no training, or none that can be evaluated as asked.
    """
    started = time.monotonic()
    storage, ledger = open_storage(config.storage, to_write=True), open_ledger(config)
    with Pool(config.workers, config.cpus_per_worker, say) as pool:
        tracker = wait_for_tracker(config, storage)
        looked_at = [
            NightlyTraining(record, config, storage, tracker, pool) for record in chosen_trainings(config, tracker)
        ]
        night = Night(looked_at, ledger, config.attempts, pool)
        todo = night.todo()
        if config.dry_run:
            for title in [work.title for work in todo] or ["nothing"]:
                say(f"nightly: {title} is new")
            return NightlyResult(left=[work.title for work in todo])
        if todo:
            pool.check_fits()  # a refusal is one sentence, not a failed attempt of every checkpoint
        keep_recipe(ledger.folder, replace(config, storage=str(storage.root)))
        pool.deadline = started + budget(config, pool)
        night.work()
        with ledger.lease("conclusion", wait=None):
            alarms = find_alarms(looked_at, ledger, config, time.time(), say)
            new = ledger.new_alarms(alarms, {training.name for training in looked_at})
            tag_alarms(looked_at, alarms, tracker, say)
            champions = update_aliases(looked_at, tracker, config.experiment, storage, say)
        if config.report:
            champions = confirm(champions, ledger, say)
        links = ranking_links(looked_at)
        return NightlyResult(night.evaluated, night.failed, night.elsewhere, night.left, champions, links, alarms, new)


def ranking_links(trainings: Sequence[NightlyTraining]) -> list[str]:
    """The links to the ranking of all checkpoints in MLflow's UI, one a protocol."""
    links: dict[str, str] = {}
    for training in trainings:
        if training.evaluator is not None:
            protocol = training.evaluator.subject.protocol("train", "selection")
            if protocol.fingerprint not in links:
                links[protocol.fingerprint] = training.evaluator.records.link(protocol)
    return list(links.values())


def wait_for_tracker(config: NightlyConfig, storage: Storage) -> Tracker:
    """The experiment in MLflow; a server that restarts at this hour is waited for."""
    return with_retries(
        lambda: open_tracker(config, storage, make=False),
        lambda error: isinstance(error, UnreachableError),
        f"tracking server {tracking_uri(config, storage)!r}",
    )


def chosen_trainings(config: NightlyConfig, tracker: Tracker) -> list[Training]:
    """The trainings that the night is about. Raises InputError if there is none."""
    known = trainings(tracker)
    names = [each.name for each in known]
    run = None if config.run is None else by_prefix(config.run, names, "training")
    chosen = [each for each in known if config.run is None or each.name == run]
    if not chosen:
        which = "" if config.run is None else f" {config.run!r}{did_you_mean(config.run, names)}"
        raise InputError(
            f"experiment {config.experiment!r} has no training{which}: train with --experiment {config.experiment}, or give "
            "another --experiment or --tracking-uri"
        )
    return chosen


def budget(config: NightlyConfig, pool: Pool) -> float:
    """How many seconds the night may sample for."""
    hours = config.hours
    if config.gpu_hours is not None:
        hours = min(hours, config.gpu_hours / pool.size)
    return 3600.0 * hours


def deliver_alarms(config: NightlyConfig, result: NightlyResult, report: Location, say: Say) -> bool:
    """Deliver the new alarms to whoever asked for them; whether there were any. What could not be delivered stays new for the
    next night."""
    ledger = open_ledger(config)
    delivered = ledger.delivered()
    new = [alarm for alarm in result.new if alarm.key not in delivered]  # by another job, meanwhile
    if not new:
        return False
    problems = notify(new, {"experiment": config.experiment, "report": str(report)}, config.alarm_command)
    for sentence in problems:
        say(f"nightly: {sentence}; the alarm is given again the next night")
    if not problems:
        ledger.set_delivered({**ledger.delivered(), **{alarm.key: alarm.run for alarm in new}})
    return True
