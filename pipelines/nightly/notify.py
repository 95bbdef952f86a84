"""Alarms to a webhook and a command."""

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import requests

from pipelines.nightly.alarms import Alarm

WEBHOOK = "DDPM_ALARM_WEBHOOK"  # in the environment, not among the options: whoever has such a URL may write to it
TIMEOUT = 30.0  # seconds, for each of the two


def notify(alarms: Sequence[Alarm], facts: Mapping[str, Any], command: str | None) -> list[str]:
    """Send alarms, as one JSON object with `facts`, to the webhook and the command, as far as there are such. What went wrong,
    in sentences that do not name the webhook's address."""
    message = {
        **facts,
        "text": "\n".join(f"{alarm.run}: {alarm.text}" for alarm in alarms),
        "alarms": [
            {"key": alarm.key, "run": alarm.run, "text": alarm.text, "of_training": alarm.of_training}
            for alarm in alarms
        ],
    }
    body = json.dumps(message).encode()
    url = os.environ.get(WEBHOOK)
    return [*(post(url, body) if url else ()), *(() if command is None else pipe(command, body))]


def post(url: str, body: bytes) -> list[str]:
    try:
        # A redirection, such as to a page for signing in, means that the alarm did not arrive.
        answer = requests.post(
            url, data=body, headers={"Content-Type": "application/json"}, timeout=TIMEOUT, allow_redirects=False
        )
    except (OSError, ValueError) as error:  # whose text may hold the address
        return [f"the webhook in {WEBHOOK} was not reached ({type(error).__name__})"]
    if not 200 <= answer.status_code < 300:
        return [f"the webhook in {WEBHOOK} answers {answer.status_code} {answer.reason}"]
    return []


def pipe(command: str, body: bytes) -> list[str]:
    try:
        subprocess.run(shlex.split(command), input=body, timeout=TIMEOUT, check=True)
    except subprocess.CalledProcessError as error:
        return [f"the alarm command {command.split()[0]!r} failed with exit code {error.returncode}"]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [f"the alarm command {command.split()[:1]} failed ({type(error).__name__})"]
    return []
