"""Alarms: what a person must know in the morning, by rules over numbers.

An alarm stands as long as its rule holds, and is delivered once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ddpm_core.records import CI_LOW, HELD_OUT, MEMORIZED, SATURATION, SATURATION_DATA, SPREAD
from ddpm_core.verdicts import difference_half_width
from pipelines.evaluate.evaluation import Evaluation
from pipelines.tracking.queries import Training

LEAST_SPREAD = 0.5  # of the data's standard deviation: samples that vary less look alike
MOST_SATURATION = 0.25  # of all values, more than in the data
MOST_MEMORIZED = 0.01  # of the samples, if no held-out images say how often the rule errs

Kind = Literal["worse", "alike", "saturated", "copies", "stopped", "refused", "failed"]


@dataclass(frozen=True)
class Alarm:
    """What is wrong with a training, or with its checkpoints.

    run: the training's name. detail: what tells it from other alarms of its kind and run, the same every night. of_training:
    whether it is about the training itself, not about evaluations of its checkpoints.
    """

    kind: Kind
    run: str
    detail: str
    text: str
    of_training: bool = False

    @property
    def key(self) -> str:
        """By which the ledger knows it again."""
        return f"{self.kind} {self.run} {self.detail}"


def is_worse(later: Evaluation, earlier: Evaluation, intervals: float) -> bool:
    """Whether the distance rose by more than so many intervals: half widths of the interval of the difference of the two.
    False if either has no interval."""
    if later.interval is None or earlier.interval is None:
        return False
    return later.distance - earlier.distance > intervals * difference_half_width(later.interval, earlier.interval)


def regressions(run: str, evaluations: Sequence[Evaluation], intervals: float) -> list[Alarm]:
    """An alarm for each checkpoint that is worse than the one before it, as long as no later one is as good as that again.
    evaluations: under one protocol, by ascending step."""
    alarms = []
    for number, (earlier, later) in enumerate(pairwise(evaluations)):
        if all(is_worse(other, earlier, intervals) for other in evaluations[number + 1 :]):
            text = (
                f"step {later.step:,} has {later.protocol.distance} {later.distance:.4g}, worse than {earlier.distance:.4g} at "
                f"step {earlier.step:,} by more than {intervals:g} x their interval"
            )
            alarms.append(Alarm("worse", run, f"{later.step} {later.protocol.fingerprint}", text))
    return alarms


def degenerate(run: str, evaluation: Evaluation) -> list[Alarm]:
    """Alarms for samples that are alike, driven to black and white, or copies of training images."""
    values, protocol = evaluation.values, evaluation.protocol
    spread = values.get(protocol.metric(SPREAD), 1.0)
    saturation, of_data = (values.get(name, 0.0) for name in (SATURATION, SATURATION_DATA))
    copies, by_chance = values.get(MEMORIZED + CI_LOW, 0.0), values.get(MEMORIZED + HELD_OUT, MOST_MEMORIZED)
    faults: dict[Kind, tuple[bool, str]] = {
        "alike": (
            spread < LEAST_SPREAD,
            f"samples vary {spread:.0%} as much as the data in {protocol.extractor}'s features",
        ),
        "saturated": (
            saturation > of_data + MOST_SATURATION,
            f"{saturation:.0%} of its samples' values are black or white, against {of_data:.0%} in the data",
        ),
        "copies": (
            copies > by_chance,
            f"{copies:.1%} or more of its samples look memorized, against {by_chance:.1%} that the rule may err on",
        ),
    }
    return [
        Alarm(fault, run, f"{evaluation.step} {protocol.fingerprint}", f"step {evaluation.step:,} looks wrong: {text}")
        for fault, (is_wrong, text) in faults.items()
        if is_wrong
    ]


def stopped(training: Training, last: tuple[int, float] | None, now: float, quiet_hours: float) -> list[Alarm]:
    """An alarm for a training that failed, or that should be running but has made no checkpoint for so long.

    last: (step, time in seconds) of its newest checkpoint, None if it has none. now: seconds.
    """
    step, made = last or (0, 0.0)
    quiet = now - max(made, training.started)
    if step >= training.steps:
        return []
    progress = f"at step {step:,} of {training.steps:,}"
    if training.status == "FAILED":
        text = f"training failed {progress}: read its log, then give its command again"
    elif training.status == "RUNNING" and quiet > quiet_hours * 3600:
        text = (
            f"training has made no checkpoint for {quiet / 3600:.0f} hours, {progress}: see whether its job still runs, or give "
            "its command again"
        )
    else:
        return []
    return [Alarm("stopped", training.name, f"{step} {training.status} {training.started:.0f}", text, of_training=True)]


def given_up(run: str, failures: Mapping[int, Sequence[str]], attempts: int) -> list[Alarm]:
    """An alarm for each checkpoint that failed too often. failures: by step, how its attempts ended."""
    return [
        Alarm(
            "failed",
            run,
            str(step),
            f"step {step:,} is left alone after {len(ends)} failed attempts; fix this and give --attempts "
            f"{len(ends) + attempts}: {ends[-1]}",
        )
        for step, ends in failures.items()
    ]


def refused(run: str, reason: str) -> Alarm:
    """The alarm for a training whose checkpoints cannot be evaluated as asked."""
    return Alarm("refused", run, reason, f"cannot be evaluated: {reason}", of_training=True)
