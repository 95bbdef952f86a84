#!/usr/bin/env python3
"""MLflow's UI over a storage, with the links to its rankings: python jobs/ui.py --storage /shared/runs (make ui)

A tracking server has a UI already: then the links are printed, and nothing is started.
"""

import os
import subprocess
import sys
import time
import webbrowser
from dataclasses import dataclass
from typing import Annotated

from ddpm_core.errors import InputError
from ddpm_core.records import LOCAL_UI
from jobs.cli import Suppress, parse, run, say
from pipelines.runtime.options import StorageOptions
from pipelines.storage.layout import open_storage
from pipelines.tracking.uri import UnreachableError, check_answers, tracking_uri

PATIENCE = 120.0  # seconds for the server to start, before the browser is opened


@dataclass(frozen=True, kw_only=True)
class UIConfig(StorageOptions):
    """Whose records to show."""

    experiment: Annotated[str, Suppress] = ""  # all of them are shown
    open: bool = True
    """Open the newest ranking in a browser, if this machine has a screen."""


def main() -> None:
    config = parse(UIConfig, sys.argv[1:], description="Show MLflow's UI, and where it ranks checkpoints.")
    uri = tracking_uri(config, open_storage(config.storage))
    from pipelines.tracking.queries import rankings  # here: --help need not wait for MLflow

    links = rankings(uri)
    if links is None:
        raise InputError(f"tracking database {uri!r} does not exist: train first, or give the --storage of a training")
    for ranking in links:
        say(f"ui: {ranking.experiment}, checkpoints by {ranking.metric} ({ranking.protocol}): {ranking.link}")
    if uri.startswith("http"):
        return
    place = ["--host", "127.0.0.1", "--port", LOCAL_UI.rpartition(":")[2], "--backend-store-uri", uri]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen([sys.executable, "-m", "mlflow", "ui", "--workers", "1", *place], env=environment)
    try:
        if config.open and links and has_screen() and answers(server):
            webbrowser.open(links[0].link)
        server.wait()
    finally:
        server.terminate()
        server.wait()
    sys.exit(server.returncode)


def has_screen() -> bool:
    """Whether a browser can show anything here; without, Python would start one that runs in the terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def answers(server: subprocess.Popen[bytes]) -> bool:
    """Wait for the server; whether it answers."""
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            check_answers(LOCAL_UI)
        except UnreachableError:
            time.sleep(0.2)
        else:
            return True
    return False


if __name__ == "__main__":
    run(main)
