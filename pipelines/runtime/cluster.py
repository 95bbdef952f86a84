"""Attach to Ray, compare what is asked for with what there is, and choose how a network is best run on it."""

import ctypes
import logging
import os
import re
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddpm_core.configs import Execution
from ddpm_core.errors import InputError
from pipelines.runtime.progress import Say
from pipelines.storage.locations import Location

OWN_RAY = "DDPM_OWN_RAY"  # in the environment of all processes of a Ray that a command has started for itself
ANSWER = 5.0  # seconds that a cluster has to answer
_BFLOAT16 = re.compile(r"(A10|A40|A100|A800|L4|L20|L40|H20|H100|H200|H800|GH200|B200|GB200|B300|GB300|RTX)")


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all, free or not."""

    cpus: float
    gpus: float


def connect() -> Resources:
    """Attach to the cluster that RAY_ADDRESS or the job names, or start Ray on this machine. Idempotent."""
    import ray  # here: what is wrong with a command is said before Ray is loaded

    if not ray.is_initialized():
        check_address(os.environ.get("RAY_ADDRESS", ""))
        # Workers print nothing a person needs; their warnings and errors still reach the log.
        before = signal.getsignal(signal.SIGTERM)
        os.environ[OWN_RAY] = "1"
        # Without a dashboard: a Ray of the command's own ends with it.
        ray.init(logging_level=logging.WARNING, include_dashboard=False)
        node = ray._private.worker._global_node  # None: of a cluster that is reached by ray://
        if node is None or not node.head:  # a Ray that was there before
            del os.environ[OWN_RAY]
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own handler would end the process in the middle of things
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the stages have a line of their own
    total = ray.cluster_resources()
    return Resources(cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0))


def kept_by_ray(place: Location) -> dict[str, Any]:
    """The options of a RunConfig that have Ray Train and Ray Tune keep what they keep of runs at a place."""
    if isinstance(place, Path):
        return {"storage_path": str(place)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem  # here: --help need not wait for it

    # By fsspec, as everything else: of a URL, Ray would take pyarrow's own, which knows fewer stores and no name with a space.
    return {"storage_path": place.path, "storage_filesystem": PyFileSystem(FSSpecHandler(place.fs))}


def has_dashboard() -> bool:
    """Whether the Ray that this process belongs to has one."""
    return OWN_RAY not in os.environ


def check_address(address: str) -> None:
    """Raises InputError if nobody answers at RAY_ADDRESS. Ray itself would go on asking for a quarter of an hour."""
    if address in ("", "auto", "local"):
        return
    what = f"RAY_ADDRESS is {address!r}"
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{what}, the address of the job API: submit this command there with `ray job submit`, or unset it"
        )
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=ANSWER):
            return
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what}, where no Ray answers ({error}): start that cluster, correct the variable, or unset it to run here"
        ) from error


def check_fits(resources: Resources, *, workers: int, cpus: float, gpus: float, what: str) -> None:
    """Raises InputError if Ray would wait for ever for resources that the cluster does not have."""
    for kind, each, total in [("CPU", cpus, resources.cpus), ("GPU", gpus, resources.gpus)]:
        if workers * each > total:
            raise InputError(
                f"{what} asks for {workers} x {each:g} {kind}s, but the cluster has {total:g}: ask for fewer workers, or "
                f"fewer {kind}s for each"
            )


def choose_execution(execution: Execution, say: Say) -> tuple[Execution, str]:
    """(an execution with every choice made, why). In mode auto it is fast if all GPUs of the cluster multiply in bfloat16,
    by what Ray says of them; then that is said."""
    if execution.mode != "auto":
        return execution.resolved(fast=execution.mode == "fast"), f"as asked for: {execution.mode}"
    fast, reason = _multiply_in_bfloat16()
    chosen = execution.resolved(fast=fast)
    if fast:
        say(
            f"{chosen.network_precision}, channels-last and torch.compile, for {reason}; mode exact takes none of these"
        )
    return chosen, reason


def _multiply_in_bfloat16() -> tuple[bool, str]:
    """(whether all GPUs of the cluster do, why it is thought so)."""
    if not _may_have_gpus() or not connect().gpus:
        return False, "there is no GPU"
    kinds = gpu_kinds()
    if not kinds:
        return False, "Ray does not say which GPUs there are"
    others = [kind for kind in kinds if not _BFLOAT16.match(kind)]
    if others:
        return False, f"GPUs {', '.join(others)} are not known to multiply in bfloat16"
    return True, f"GPUs {', '.join(kinds)}"


def _may_have_gpus() -> bool:
    """False if Ray would have to be started on this machine, which has no GPU: that takes seconds, and nothing of it."""
    ray = sys.modules.get("ray")  # not imported to learn that it was not started
    started = bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())
    return started or ray_address_file().exists() or _has_gpu()


def ray_address_file() -> Path:
    """Where a Ray that was started on this machine leaves its address."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(folder) / "ray" / "ray_current_cluster"


def _has_gpu() -> bool:
    """Whether this machine has a GPU that torch can use. Torch is imported only if there is a driver of one."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not Path("/dev/kfd").exists():  # AMD's
            return False
    import torch

    return torch.cuda.is_available()


def gpu_kinds() -> list[str]:
    """Of the cluster, as Ray names them, such as H100."""
    import ray

    kinds = (key.removeprefix("accelerator_type:") for key in ray.cluster_resources() if "accelerator_type:" in key)
    return sorted(kinds)
