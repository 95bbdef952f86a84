"""What is new, evaluated every night: python jobs/nightly_eval.py --experiment ddpm --storage /shared/runs

python jobs/nightly_eval.py --every "0 2 * * *" ...   stays, and starts that at those times; for clusters without a scheduler

Ends with 0 where all is well and with 3 where there is a new alarm.
"""

import subprocess
import sys

from ddpm_core.errors import InputError
from jobs.cli import parse, run, say
from pipelines.every import keep
from pipelines.locations import absolute


def main() -> None:
    every, arguments = taken(sys.argv[1:], "--every")
    if every is not None:  # before anything large is imported: this process stays
        storage, experiment = (taken(arguments, option)[0] for option in ("--storage", "--experiment"))
        folder = absolute(storage or "runs", option="--storage") / "nightly" / (experiment or "ddpm")
        command = [sys.executable, sys.argv[0], *arguments]
        subprocess.run([*command, "--dry-run"], check=False)  # a wrong option shows now and not at night
        keep(every, command, folder, say)
        return

    from pipelines.nightly import delivered, nightly, notes_of
    from pipelines.nightly_config import NightlyConfig
    from pipelines.tracking import default_uri
    from reports.build import build_report

    config = parse(NightlyConfig, arguments, description="Evaluate the checkpoints that have no result yet.")
    result = nightly(config, say)
    if config.dry_run:
        return
    report = notes_of(config).folder / "report.html"
    try:
        build_report(config.tracking_uri or default_uri(report.parents[2]), config.experiment, report)
    finally:
        alarmed = delivered(config, result, report, say)
        for line in [f"report {report}", *result.describe()]:
            say(f"nightly: {line}")
    if alarmed:
        sys.exit(3)


def taken(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """(the value of an option, the other arguments). InputError where it has none."""
    for place, word in enumerate(arguments):
        if word.startswith(f"{option}="):
            return word.partition("=")[2], arguments[:place] + arguments[place + 1 :]
        if word == option and place + 1 < len(arguments):
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
        if word == option:
            raise InputError(f"option {option} has no value: give one after it")
    return None, arguments


if __name__ == "__main__":
    run(main)
