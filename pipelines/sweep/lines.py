"""What trials say in processes of Ray's, said by the driver of their sweep: it has the terminal, the log and the events."""

import contextlib
import functools
from dataclasses import replace
from typing import Any

import ray.exceptions
import ray.tune

from pipelines.runtime.messages import Listener, MessageQueue
from pipelines.runtime.progress import ProgressLine, Say, StageStanding, WarningLine
from pipelines.sweep.points import trial_name


def put(queue: MessageQueue, trial: str, line: str | None) -> None:
    """Put a message into the queue, where it is when this returns. A queue that has died ends no trial."""
    with contextlib.suppress(ray.exceptions.RayError):
        queue.put((trial, line))


def say_through(queue: MessageQueue, trial: str) -> Say:
    """The say of a trial."""
    return functools.partial(put, queue, trial)


class TrialLines(Listener):
    """Says the lines of trials, each with its trial's name. A message is (trial, line), or (trial, None) when the trial has
    ended, however it did: then its stages that are not done have ended too."""

    def __init__(self, inbox: MessageQueue, say: Say) -> None:
        super().__init__(inbox)
        self.say = say
        self._under_way: dict[str, dict[str, StageStanding]] = {}  # by trial and stage

    def take(self, message: tuple[str, str | None]) -> None:
        trial, line = message
        stages = self._under_way.setdefault(trial, {})
        if line is not None:
            self._say(trial, line)
            if isinstance(line, ProgressLine):
                stages[line.standing.stage] = line.standing
            return
        for standing in self._under_way.pop(trial).values():
            if not standing.final:
                self._say(trial, ProgressLine(replace(standing, ended=True)))

    def _say(self, trial: str, line: str) -> None:
        words = f"sweep: {trial}: {line}"
        if isinstance(line, ProgressLine):
            self.say(ProgressLine(replace(line.standing, stage=f"{trial}: {line.standing.stage}"), words))
        else:
            self.say(WarningLine(words) if isinstance(line, WarningLine) else words)


class TrialEnds(ray.tune.Callback):
    """Puts (trial, None) into a queue when a trial has ended: Tune knows that of one whose process was killed too."""

    def __init__(self, queue: MessageQueue) -> None:
        self.queue = queue

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        put(self.queue, trial_name(*trial.config["trial"]), None)

    on_trial_error = on_trial_complete
