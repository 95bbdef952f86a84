"""A kind and its command as text, every value quoted for what reads it: shell, cron, systemd, YAML, Kubernetes."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ddpm_core.errors import InputError
from jobs.cluster.cron import parse_cron
from jobs.cluster.kinds import Kind, check_printable

LONGEST_LINE = 999  # of a crontab, in Debian's cron


def render(kind: Kind, command: Sequence[str]) -> str:
    """The text to install, with the way to do so in its comments."""
    if not command:
        raise InputError("no command is given: put it last, after --, such as -- python jobs/nightly_eval.py ...")
    for word in command:
        check_printable("a word of the command", word)
    # What a template of YAML prints is a JSON value, which YAML reads as the same: nothing there can be left unquoted.
    finalize = _json if ".yaml" in kind.template else None
    environment = Environment(
        loader=PackageLoader("jobs.cluster", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )
    environment.filters |= {"cron": cron_word, "unit": unit_word, "expand": unexpanded, "shell": shlex.join}
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
    r"""A word of the shell in a crontab, where an unescaped % ends the command. \% is %, and the backslash must not be
    one of the word's own, nor stand within quotes."""
    return r"\%".join(shlex.quote(part) if part else "" for part in str(word).split("%")) or "''"


def unit_word(word: object, *, expanded: bool = True) -> str:
    """A word of a systemd unit. % begins a specifier anywhere, $ a variable where a command line is `expanded`."""
    text = str(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if expanded else text}"'


def unexpanded(text: str) -> str:
    """For a container's command and arguments, in which Kubernetes reads $(NAME) as a variable and $$ as $."""
    return text.replace("$", "$$")


def kubernetes_schedule(every: str) -> str:
    """The expression for Kubernetes, where Sunday is 0 alone."""
    *others, weekday = every.split()
    if "7" in weekday:
        found = parse_cron(every).weekdays
        weekday = ",".join(str(day) for day in sorted({day % 7 for day in found if isinstance(day, int)}))
    return " ".join([*others, weekday])


def calendar(every: str) -> list[str]:
    """The expression as OnCalendar= lines of systemd. Where cron joins days of the month and of the week by "or", there
    are two."""
    found = parse_cron(every)
    names = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"]
    weekdays = sorted({day % 7 for day in found.weekdays if isinstance(day, int)})
    week = ",".join(names[day] for day in weekdays) + " " if len(weekdays) < 7 else ""

    def some(values: set[int], of: int) -> str:
        return "*" if len(values) == of else ",".join(f"{value:02}" for value in sorted(values))

    months, days = some(found.months, 12), some(found.days, 31)
    at = f"{some(found.hours, 24)}:{some(found.minutes, 60)}:00"
    if week and days != "*" and not found.day_and:
        return [f"*-{months}-{days} {at}", f"{week}*-{months}-* {at}"]
    return [f"{week}*-{months}-{days} {at}"]
