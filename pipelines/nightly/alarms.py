"""What a person must be told in the morning: what got worse, what stopped, what looks wrong.

An alarm stands for as long as what it says is so, and is told once.
"""

import http.client
import json
import math
import os
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ddpm_core import records
from ddpm_core.records import CI_LOW, HELD_OUT, SATURATION, SATURATION_DATA, SPREAD
from pipelines.evaluate.evaluation import Evaluation
from pipelines.tracking.queries import Training

WEBHOOK = "DDPM_ALARM_WEBHOOK"  # in the environment: such a URL lets whoever has it write
NARROW = 0.5  # of the data's standard deviation: samples that vary less look alike
SATURATED = 0.25  # of all values, more than in the data
MEMORIZED = 0.01  # of the samples, where no held-out images say how often the rule errs
PATIENCE = 30.0  # seconds that a webhook or command has


@dataclass(frozen=True)
class Alarm:
    """One thing to be told. key: the same every night; its second word is the run. run: the training it is about, or,
    where it is not of_training, its evaluation."""

    key: str
    run: str
    text: str
    of_training: bool = False


def worse(later: Evaluation, earlier: Evaluation, intervals: float) -> bool:
    """Whether the distance rose by more than so many intervals, that is, so many times the half width that the interval
    of the difference of the two has. False where either has no interval."""
    if later.interval is None or earlier.interval is None:
        return False
    half = math.hypot(*((high - low) / 2.0 for low, high in (later.interval, earlier.interval)))
    return later.distance - earlier.distance > intervals * half


def regressions(run: str, evaluations: Sequence[Evaluation], intervals: float) -> list[Alarm]:
    """Of each checkpoint that is worse than the one before it, as long as no later one is as good as that again.
    evaluations: by ascending step, under one protocol."""
    found = []
    for number, (earlier, later) in enumerate(pairwise(evaluations)):
        if all(worse(other, earlier, intervals) for other in evaluations[number + 1 :]):
            name = later.protocol.distance
            found.append(
                Alarm(
                    f"worse {run} {later.step} {later.protocol.fingerprint}",
                    run,
                    f"step {later.step:,} has {name} {later.distance:.4g}, worse than {earlier.distance:.4g} at step "
                    f"{earlier.step:,} by more than {intervals:g} x their interval",
                )
            )
    return found


def degenerate(run: str, evaluation: Evaluation) -> list[Alarm]:
    """Of samples that are alike, driven to black and white, or copies."""
    values, protocol = evaluation.values, evaluation.protocol
    spread = values.get(protocol.metric(SPREAD), 1.0)
    extreme, expected = (values.get(name, 0.0) for name in (SATURATION, SATURATION_DATA))
    copies, chance = values.get(records.MEMORIZED + CI_LOW, 0.0), values.get(records.MEMORIZED + HELD_OUT, MEMORIZED)
    faults = {
        "alike": (spread < NARROW, f"samples vary {spread:.0%} as much as the data in {protocol.extractor}'s features"),
        "saturated": (
            extreme > expected + SATURATED,
            f"{extreme:.0%} of its samples' values are black or white, against {expected:.0%} in the data",
        ),
        "copies": (
            copies > chance,
            f"{copies:.1%} or more of its samples look memorized, against {chance:.1%} that the rule may err on",
        ),
    }
    return [
        Alarm(
            f"{fault} {run} {evaluation.step} {protocol.fingerprint}",
            run,
            f"step {evaluation.step:,} looks wrong: {text}",
        )
        for fault, (is_so, text) in faults.items()
        if is_so
    ]


def stopped(training: Training, last: tuple[int, float] | None, now: float, quiet_hours: float) -> list[Alarm]:
    """Of a training that failed, or that is said to run but has made nothing for long.

    last: (step, time in seconds) of its newest checkpoint, None where there is none.
    """
    step, made = last or (0, 0.0)
    since = max(made, training.started)
    if step >= training.steps:
        return []
    where = f"at step {step:,} of {training.steps:,}"
    if training.status == "FAILED":
        text = f"training failed {where}: read its log, then give its command again"
    elif training.status == "RUNNING" and now - since > quiet_hours * 3600:
        text = (
            f"training has made no checkpoint for {(now - since) / 3600:.0f} hours, {where}: look whether its job still runs, "
            "or give its command again"
        )
    else:
        return []
    return [
        Alarm(
            f"stopped {training.name} {step} {training.status} {training.started:.0f}",
            training.name,
            text,
            of_training=True,
        )
    ]


class Unmoved(urllib.request.HTTPRedirectHandler):
    """Takes a redirection, such as to a page for signing in, for what it is: an alarm that did not arrive."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def deliver(alarms: Sequence[Alarm], facts: Mapping[str, Any], command: str | None) -> list[str]:
    """Send new alarms to the webhook and the command, where there are such; what went wrong with that, in sentences
    without the webhook's address."""
    lines = [f"{alarm.run}: {alarm.text}" for alarm in alarms]
    message = {**facts, "text": "\n".join(lines), "alarms": [asdict(alarm) for alarm in alarms]}
    body = json.dumps(message).encode()
    wrong = []
    if url := os.environ.get(WEBHOOK):
        try:
            if not url.startswith(("https://", "http://")):
                raise ValueError("it is no http address")
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.build_opener(Unmoved).open(request, timeout=PATIENCE):
                pass
        except urllib.error.HTTPError as error:
            wrong.append(f"the webhook in {WEBHOOK} answers {error.code} {error.reason}")
        except (OSError, ValueError, http.client.HTTPException) as error:  # which may name the address
            wrong.append(f"the webhook in {WEBHOOK} was not reached ({type(error).__name__})")
    if command is not None:
        try:
            subprocess.run(shlex.split(command), input=body, timeout=PATIENCE, check=True)
        except subprocess.CalledProcessError as error:
            wrong.append(f"the alarm command {command.split()[0]!r} failed with exit code {error.returncode}")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            wrong.append(f"the alarm command {command.split()[:1]} failed ({type(error).__name__})")
    return wrong
