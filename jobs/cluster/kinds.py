"""The kinds of schedule: the options of each, and the values that its template gets."""

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
# The $PATH of systemd and cron may lack these, and always lacks the folder of this Python.
PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
# RayCronJob and RayJob append up to 11 characters to a name, and that of a Ray cluster has 53 at most.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,34}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The options of every kind."""

    name: str = ""
    """The name of what is installed; by default the script's name."""

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
        """The values that the template gets."""
        scripts = [Path(word).stem for word in command if word.endswith(".py")]
        name = self.name or (scripts or ["job"])[0].replace("_", "-")
        if not NAME.fullmatch(name):
            raise InputError(f"--name would be {name!r}: give one of at most 36 small letters, digits and dashes")
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        facts = {"command": list(command), "nightly": "nightly_eval" in scripts}
        return {**options, **facts, "name": name, "ray_version": importlib.metadata.version("ray")}


def check_printable(what: str, text: str) -> None:
    """Raises InputError for line breaks and other characters that no line of a crontab, unit or manifest can hold."""
    if not text.isprintable():
        raise InputError(f"{what} is {text!r}: it must be one line without control characters")


@dataclass(frozen=True, kw_only=True)
class Timed(Kind):
    """The options of what starts by the clock."""

    every: str = "0 2 * * *"
    """When to start, in cron's five fields: minute, hour, day of the month, month, day of the week."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_cron(self.every)


@dataclass(frozen=True, kw_only=True)
class Zoned(Timed):
    """The options of what starts by the clock of a time zone of its own."""

    time_zone: str = ""
    """The time zone of --every, such as Europe/Berlin; by default the scheduler's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_zone and self.time_zone not in zoneinfo.available_timezones():
            raise InputError(
                f"--time-zone is {self.time_zone!r}, which is no time zone: give one such as Europe/Berlin"
            )


@dataclass(frozen=True, kw_only=True)
class OnMachine(Kind):
    """The options of what runs in a checkout on a machine."""

    project: Path = PROJECT
    """The checkout that it runs in; by default this one."""
    path: str = PATH
    """The folders of python and ray, as in $PATH."""
    address: str = ""
    """The dashboard of the Ray cluster that it is submitted to; by default it runs on the machine itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.project.is_absolute():
            raise InputError(f"--project is '{self.project}', a relative path: give an absolute one")


@dataclass(frozen=True, kw_only=True)
class InImage(Kind):
    """The options of what runs in a container."""

    image: str
    """The image, with Ray, this project installed, and a checkout of it: jobs/cluster/Dockerfile makes one."""
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
    """The file that the output is appended to; by default NAME.log in the home folder."""

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
    """A Kubernetes CronJob that submits to a running Ray cluster."""

    address: str
    """The dashboard of the Ray cluster, such as http://ray-head-svc:8265."""
    token_secret: str = ""
    """The Secret whose key auth_token is the Ray cluster's token; KubeRay gives it the cluster's name."""

    template: ClassVar[str] = "cronjob.yaml.j2"


@dataclass(frozen=True, kw_only=True)
class RayJob(InImage):
    """A KubeRay RayJob, which starts a Ray cluster for one run of the command."""

    storage_claim: str
    """The PersistentVolumeClaim to mount at /shared."""
    workers: int = 1
    """How many worker pods."""
    cpus: int = 8
    """CPUs for each worker pod."""
    memory: str = "32Gi"
    """Memory for each worker pod."""
    gpus: int = 0
    """GPUs for each worker pod."""
    tracking_secret: str = ""
    """The Secret with MLFLOW_TRACKING_URI, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD if the server asks."""
    retries: int = 0
    """How often to try again after a failure, on a new cluster. KubeRay takes an alarm (exit code 3) for a failure."""
    keep_seconds: int = 3600
    """How long to keep the cluster, its dashboard and logs after the end."""

    template: ClassVar[str] = "rayjob.yaml.j2"


@dataclass(frozen=True, kw_only=True)
class RayCronJob(RayJob, Zoned):
    """A KubeRay RayCronJob, which starts such a RayJob by the clock."""

    template: ClassVar[str] = "raycronjob.yaml.j2"


KINDS: dict[str, type[Kind]] = {
    "crontab": Crontab,
    "systemd": Systemd,
    "cronjob": CronJob,
    "raycronjob": RayCronJob,
    "rayjob": RayJob,
}
