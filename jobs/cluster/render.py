"""Render a schedule to install: python jobs/cluster/render.py KIND [options] -- COMMAND, on standard output.

python jobs/cluster/render.py crontab -- python jobs/nightly_eval.py --experiment church --storage /shared/runs
python jobs/cluster/render.py systemd ...      a service and its timer
python jobs/cluster/render.py cronjob ...      Kubernetes: `ray job submit` to a running Ray cluster
python jobs/cluster/render.py raycronjob ...   KubeRay: a Ray cluster for each run, by the clock
python jobs/cluster/render.py rayjob ...       KubeRay: a Ray cluster for one run, such as a training
"""

import sys

from ddpm_core.errors import InputError
from jobs.cli import parse, run, say
from jobs.cluster.kinds import KINDS
from jobs.cluster.rendering import render


def main() -> None:
    match sys.argv[1:]:
        case [word, *rest] if word in KINDS:
            options, command = rest, list[str]()
            if "--" in rest:
                options, command = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
            about = f"{KINDS[word].__doc__} It is printed; the command stands last, after `-- `."
            say(render(parse(KINDS[word], options, description=about, first=word), command).rstrip("\n"))
        case ["-h" | "--help"]:
            say((__doc__ or "").rstrip())
        case [word, *_]:
            raise InputError(f"kind {word!r} is unknown: put one of {', '.join(KINDS)} first")
        case _:
            raise InputError(f"no kind is given: put one of {', '.join(KINDS)} first")


if __name__ == "__main__":
    run(main)
