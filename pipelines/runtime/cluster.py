"""Attach to Ray, and compare what is asked for with what there is."""

import logging
import signal
import threading
from dataclasses import dataclass

import ray
import ray.data

from ddpm_core.errors import InputError


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all, free or not."""

    cpus: float
    gpus: float


def connect() -> Resources:
    """Attach to the cluster that RAY_ADDRESS or the job names, or start Ray on this machine. Idempotent."""
    if not ray.is_initialized():
        # Workers print nothing a person needs; their warnings and errors still reach the log.
        before = signal.getsignal(signal.SIGTERM)
        ray.init(logging_level=logging.WARNING)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own handler would end the process in the middle of things
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the stages have a line of their own
    total = ray.cluster_resources()
    return Resources(cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0))


def check_fits(resources: Resources, *, workers: int, cpus: float, gpus: float, what: str) -> None:
    """Raises InputError if Ray would wait for ever for resources that the cluster does not have."""
    for kind, each, total in [("CPU", cpus, resources.cpus), ("GPU", gpus, resources.gpus)]:
        if workers * each > total:
            raise InputError(
                f"{what} asks for {workers} x {each:g} {kind}s, but the cluster has {total:g}: ask for fewer workers, or "
                f"fewer {kind}s for each"
            )
