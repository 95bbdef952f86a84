"""What is new, evaluated every night: python jobs/nightly_eval.py --experiment ddpm --storage /shared/runs

python jobs/nightly_eval.py --every "0 2 * * *" ...   stays, and starts that at those times; for clusters without a scheduler

It ends with 0 where all is well and with 3 where there is a new alarm."""

import subprocess
import sys

from ddpm_core.errors import InputError
from jobs.cli import parse, run, say
from pipelines.nightly.every import keep
from pipelines.runtime.layout import local_storage


def main() -> None:
    every, arguments = taken(sys.argv[1:], "--every")
    if every is not None:  # before anything large is imported: this process stays
        place, experiment = (taken(arguments, option)[0] for option in ("--storage", "--experiment"))
        folder = local_storage(place or "runs").nights(experiment or "ddpm")
        command = [sys.executable, sys.argv[0], *arguments]
        subprocess.run([*command, "--dry-run"], check=False)  # a wrong option shows now and not at night
        return keep(every, command, folder, say)

    from pipelines.nightly.config import NightlyConfig
    from pipelines.nightly.night import delivered, nightly
    from pipelines.tracking.uri import tracking_uri
    from reports.build import build_report

    config = parse(NightlyConfig, arguments, description="Evaluate the checkpoints that have no result yet.")
    result = nightly(config, say)
    if config.dry_run:
        return None
    storage, code = local_storage(config.storage), 0
    report = storage.nights(config.experiment) / "report.html"
    try:
        build_report(tracking_uri(config, storage), config.experiment, report)
        say(f"nightly: report {report}")
    except Exception as error:  # an alarm must get out all the same
        say(f"nightly: the report could not be written ({type(error).__name__}: {error})")
        code = 1
    for line in result.describe():
        say(f"nightly: {line}")
    sys.exit(3 if delivered(config, result, report, say) else code)


def taken(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """(the value of an option, the other arguments). InputError where it has none."""
    for place, word in enumerate(arguments):
        if word.startswith(f"{option}="):
            return word.partition("=")[2], arguments[:place] + arguments[place + 1 :]
        if word == option:
            if word is arguments[-1]:
                raise InputError(f"option {option} has no value: give one after it")
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
    return None, arguments


if __name__ == "__main__":
    run(main)
