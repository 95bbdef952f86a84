"""A schedule as text, with every value quoted for its reader: shell, cron, systemd, YAML, Kubernetes."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from cronsim import CronSim
from jinja2 import Environment, PackageLoader, StrictUndefined

from ddpm_core.errors import InputError
from jobs.cluster.cron import parse_cron
from jobs.cluster.kinds import Kind, check_printable

LONGEST_LINE = 999  # of a crontab, in Debian's cron


def render(kind: Kind, command: Sequence[str]) -> str:
    """The text to install; its comments say how. Raises InputError for a command that the kind cannot hold."""
    if not command:
        raise InputError("no command is given: put it last, after --, such as -- python jobs/nightly_eval.py ...")
    for word in command:
        check_printable("a word of the command", word)
    # Every value in a YAML template is printed as JSON, which is YAML too: none can be left unquoted by mistake.
    finalize = _json if ".yaml" in kind.template else None
    environment = Environment(
        loader=PackageLoader("jobs.cluster", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )
    environment.filters |= {
        "cron": cron_word,
        "unit": unit_word,
        "unit_path": unit_path,
        "expand": unexpanded,
        "shell": shlex.join,
    }
    values = kind.values(command)
    if "every" in values:
        values |= {"kubernetes_schedule": kubernetes_schedule(values["every"]), "calendar": calendar(values["every"])}
    text = environment.get_template(kind.template).render(values)
    if kind.template == "crontab.j2" and (longest := max(map(len, text.splitlines()))) > LONGEST_LINE:
        raise InputError(
            f"the line has {longest} characters and cron takes {LONGEST_LINE}: put the command in a script"
        )
    return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def cron_word(word: object) -> str:
    r"""A word of the shell in a crontab, where % ends the command unless written \%. That backslash must be neither one of the
    word's own nor inside quotes."""
    return r"\%".join(shlex.quote(part) if part else "" for part in str(word).split("%")) or "''"


def unit_word(word: object, *, expanded: bool = True) -> str:
    """A word of a systemd unit, where % begins a specifier; on a command line, which is `expanded`, $ begins a variable."""
    text = str(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if expanded else text}"'


def unit_path(path: object) -> str:
    """A path in WorkingDirectory=, which is not quoted: a space at its end would be cut, and a backslash join the next line."""
    text = str(path).replace("%", "%%")
    return f"{text}/" if text.endswith((" ", "\\")) else text


def unexpanded(text: str) -> str:
    """A word of a container's command, in which Kubernetes reads $(NAME) as a variable and $$ as $."""
    return text.replace("$", "$$")


def weekdays_of(schedule: CronSim) -> list[int]:
    """The days of the week, 0 for Sunday to 6, ascending."""
    return sorted({day % 7 for day in schedule.weekdays if isinstance(day, int)})


def kubernetes_schedule(every: str) -> str:
    """A cron expression as Kubernetes reads it: Sunday is 0 and never 7."""
    *others, weekday = every.split()
    if "7" in weekday:
        weekday = ",".join(map(str, weekdays_of(parse_cron(every))))
    return " ".join([*others, weekday])


def calendar(every: str) -> list[str]:
    """A cron expression as OnCalendar= lines of systemd: two if cron joins days of the month and of the week by "or"."""
    schedule = parse_cron(every)
    names = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"]
    weekdays = weekdays_of(schedule)
    week = ",".join(names[day] for day in weekdays) + " " if len(weekdays) < 7 else ""

    def listed(values: set[int], of: int) -> str:
        return "*" if len(values) == of else ",".join(f"{value:02}" for value in sorted(values))

    months, days = listed(schedule.months, 12), listed(schedule.days, 31)
    at = f"{listed(schedule.hours, 24)}:{listed(schedule.minutes, 60)}:00"
    if week and days != "*" and not schedule.day_and:
        return [f"*-{months}-{days} {at}", f"{week}*-{months}-* {at}"]
    return [f"{week}*-{months}-{days} {at}"]
