"""What can be rendered: the options of each kind of schedule, and what its template is given."""

import importlib.metadata
import re
import sys
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from ddpm_core.errors import InputError
from jobs.cluster.cron import parse_cron

PROJECT = Path(__file__).resolve().parents[2]
# What systemd and cron would leave out, and where this Python lies.
PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
# RayCronJob and RayJob append up to 11 characters to a name, and a Ray cluster's may have 53.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,34}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What every kind has."""

    name: str = ""
    """What it is called; the script's name unless given."""

    template: ClassVar[str]

    def __post_init__(self) -> None:
        if self.name and not NAME.fullmatch(self.name):
            raise InputError(f"--name is {self.name!r}: give one of at most 36 small letters, digits and dashes")
        for field in fields(self):
            value = getattr(self, field.name)
            option = field.name.replace("_", "-")
            if isinstance(value, str | Path):
                check_printable(f"--{option}", str(value))
            elif isinstance(value, int) and value < (field.name in ("workers", "cpus", "user")):
                raise InputError(f"--{option} is {value}: give a positive number")

    def values(self, command: Sequence[str]) -> dict[str, Any]:
        """What the template is given."""
        scripts = [Path(word).stem for word in command if word.endswith(".py")]
        name = self.name or (scripts or ["job"])[0].replace("_", "-")
        if not NAME.fullmatch(name):
            raise InputError(f"--name would be {name!r}: give one of at most 36 small letters, digits and dashes")
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        facts = {"command": list(command), "nightly": "nightly_eval" in scripts}
        return {**options, **facts, "name": name, "ray_version": importlib.metadata.version("ray")}


def check_printable(what: str, text: str) -> None:
    """InputError for line breaks and what else no line of a crontab, unit or manifest can hold."""
    if not text.isprintable():
        raise InputError(f"{what} is {text!r}: it must be one line without control characters")


@dataclass(frozen=True, kw_only=True)
class Timed(Kind):
    """What starts by the clock."""

    every: str = "0 2 * * *"
    """When, in cron's five fields: minute, hour, day of the month, month, day of the week."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_cron(self.every)


@dataclass(frozen=True, kw_only=True)
class Zoned(Timed):
    """What may name its time zone."""

    time_zone: str = ""
    """Of --every, such as Europe/Berlin; the scheduler's own unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_zone and self.time_zone not in zoneinfo.available_timezones():
            raise InputError(
                f"--time-zone is {self.time_zone!r}, which is no time zone: give one such as Europe/Berlin"
            )


@dataclass(frozen=True, kw_only=True)
class OnMachine(Kind):
    """What runs in a checkout on a machine."""

    project: Path = PROJECT
    """The checkout that it runs in; this one unless given."""
    path: str = PATH
    """Where python and ray are found, as in $PATH."""
    address: str = ""
    """The dashboard of the Ray cluster that it is submitted to; run on the machine itself unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.project.is_absolute():
            raise InputError(f"--project is '{self.project}', a relative path: give an absolute one")


@dataclass(frozen=True, kw_only=True)
class InImage(Kind):
    """What runs in a container."""

    image: str
    """The image: Ray, this project installed, and its checkout as the working directory."""
    namespace: str = "default"
    """The Kubernetes namespace."""
    project: str = "/home/ray/ddpm"
    """The checkout in the image."""
    user: int = 1000
    """The user id in the image, not root; 1000 in Ray's images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not Path(self.project).is_absolute():
            raise InputError(f"--project is '{self.project}', a relative path: give an absolute one")


@dataclass(frozen=True, kw_only=True)
class Crontab(OnMachine, Timed):
    """A line of a crontab."""

    log: Path | None = None
    """The file that takes the output; NAME.log in the home folder unless given."""

    template: ClassVar[str] = "crontab.j2"

    def values(self, command: Sequence[str]) -> dict[str, Any]:
        values = super().values(command)
        return {**values, "log": self.log or Path.home() / f"{values['name']}.log"}


@dataclass(frozen=True, kw_only=True)
class Systemd(OnMachine, Zoned):
    """A systemd service and its timer."""

    template: ClassVar[str] = "systemd.j2"


@dataclass(frozen=True, kw_only=True)
class CronJob(InImage, Zoned):
    """A Kubernetes CronJob that submits to a Ray cluster that is there."""

    address: str
    """The dashboard of the Ray cluster, such as http://ray-head-svc:8265."""
    token_secret: str = ""
    """The Secret whose key auth_token is the Ray cluster's token; KubeRay names it as the cluster."""

    template: ClassVar[str] = "cronjob.yaml.j2"


@dataclass(frozen=True, kw_only=True)
class RayJob(InImage):
    """A KubeRay RayJob: a Ray cluster for one run of the command."""

    storage_claim: str
    """The PersistentVolumeClaim that is mounted at /shared."""
    workers: int = 1
    """The worker pods."""
    cpus: int = 8
    """The CPUs of a worker pod."""
    memory: str = "32Gi"
    """The memory of a worker pod."""
    gpus: int = 0
    """The GPUs of a worker pod."""
    tracking_secret: str = ""
    """The Secret with MLFLOW_TRACKING_URI, and with MLFLOW_TRACKING_USERNAME and _PASSWORD where the server asks."""
    retries: int = 0
    """How often a failure is tried again on a new cluster. KubeRay takes an alarm (exit code 3) for a failure."""
    keep_seconds: int = 3600
    """How long the cluster, its dashboard and logs stay after the end."""

    template: ClassVar[str] = "rayjob.yaml.j2"


@dataclass(frozen=True, kw_only=True)
class RayCronJob(RayJob, Zoned):
    """A KubeRay RayCronJob: a RayJob by the clock."""

    template: ClassVar[str] = "raycronjob.yaml.j2"


KINDS: dict[str, type[Kind]] = {
    "crontab": Crontab,
    "systemd": Systemd,
    "cronjob": CronJob,
    "raycronjob": RayCronJob,
    "rayjob": RayJob,
}
