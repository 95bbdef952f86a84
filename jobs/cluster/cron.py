"""Cron expressions, as far as cron, systemd and Kubernetes read them alike."""

from datetime import UTC, datetime

from cronsim import CronSim, CronSimError

from ddpm_core.errors import InputError


def parse_cron(every: str) -> CronSim:
    """A cron expression of five fields as the sets `minutes`, `hours`, `days` (of the month), `months` and `weekdays` (0 and 7
    are Sunday); `day_and` is False if cron runs on a day that is in either `days` or `weekdays`.

    Raises InputError for anything that schedulers read differently.
    """
    wanted = "give the five fields of cron, such as '0 2 * * *' for every night at two"
    if len(fields := every.split()) != 5:
        raise InputError(f"--every is {every!r}, which has {len(fields)} fields: {wanted}")
    try:
        schedule = CronSim(" ".join(fields), datetime.now(UTC))
    except CronSimError as error:
        raise InputError(f"--every is {every!r}, and cron calls it a {str(error).lower()}: {wanted}") from None
    # CronSim writes "L" as a negative number and "1#2" as a pair.
    if not all(isinstance(value, int) and value >= 0 for value in schedule.days | schedule.weekdays):
        raise InputError(f"--every is {every!r}, but not every scheduler knows L and #: name the days by their numbers")
    day, weekday = fields[2], fields[4]
    if "*" not in (day, weekday) and (day[0] == "*" or weekday[0] == "*"):
        raise InputError(
            f"--every is {every!r}, but schedulers differ on */n beside another day: name the days themselves"
        )
    return schedule
