"""Where the actors of a pool live: Ray, behind an interface that a simulation has too."""

import time
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ddpm_core.errors import InputError
from pipelines.runtime.cluster import check_fits, connect


class Backend(Protocol):
    """Where a pool's actors live, and the clock that it goes by: Ray, or a simulation of it."""

    @property
    def size(self) -> int:
        """How many actors there may be. Raises InputError if the cluster has no room for them."""

    def now(self) -> float:
        """Seconds."""

    def put(self, value: Any) -> Any:
        """What stands for a value in units of work, so that it travels once."""

    def start(self) -> Any:
        """A new actor."""

    def ready(self, actor: Any) -> Hashable:
        """What is answered when an actor lives, for the first time or again."""

    def run(self, actor: Any, number: int, recipe: Any, unit: Any) -> Hashable:
        """Have an actor do a unit; what is answered when it has."""

    def wait(self, answers: Sequence[Any], timeout: float) -> Sequence[Any]:
        """One of the answers that are there, or none in `timeout` seconds."""

    def result(self, answer: Any) -> Any:
        """What was answered. Raises RayActorError if the actor died, RayTaskError for what the unit raised."""

    def kill(self, actor: Any, restart: bool) -> None:
        """End an actor and what it is at."""

    def describe_needs(self) -> str:
        """What each actor needs, in words."""


class PoolWorker:
    """What runs in an actor: it becomes the worker of one fan-out after the other, so that a process starts once."""

    def __init__(self) -> None:
        self.number, self.worker = -1, None

    def run(self, number: int, recipe: list[ray.ObjectRef], unit: Any) -> Any:
        """Do a unit of fan-out `number`, whose worker and arguments the recipe holds."""
        if self.number != number:
            self.worker = None  # before the next is made: there may not be room for two
            make, arguments = ray.get(recipe[0])
            try:
                self.worker = make(*arguments)
            except Exception as error:
                raise InputError(
                    f"a worker could not be started ({type(error).__name__}: {' '.join(str(error).split())}): fix that and "
                    "run the same command again"
                ) from error
            self.number = number
        return self.worker.run(unit)  # type: ignore[attr-defined]


class RayBackend:
    """Actors on the cluster that Ray knows, started if there is none."""

    def __init__(self, workers: int | None, cpus_per_worker: float) -> None:
        self.workers, self.cpus = workers, cpus_per_worker

    @cached_property
    def size(self) -> int:
        """Those asked for, or as many as the cluster has room for, one a GPU if there are GPUs."""
        resources = connect()
        gpus = 1 if resources.gpus else 0
        room = resources.gpus if gpus else resources.cpus // self.cpus
        size = self.workers or max(1, int(room))
        check_fits(resources, workers=size, cpus=self.cpus, gpus=gpus, what="--workers")
        return size

    @cached_property
    def options(self) -> dict[str, Any]:
        """Of an actor."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": 1 if connect().gpus else 0,
            "max_restarts": -1,
            # Inside a Tune trial, actors would else be held to the trial's own bundle.
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=None),
        }

    def now(self) -> float:
        return time.monotonic()

    def put(self, value: Any) -> Any:
        return [ray.put(value)]  # in a list: Ray would have the value itself in place of its reference

    def start(self) -> Any:
        return ray.remote(PoolWorker).options(**self.options).remote()

    def ready(self, actor: Any) -> Hashable:
        answer: Hashable = actor.__ray_ready__.remote()
        return answer

    def run(self, actor: Any, number: int, recipe: Any, unit: Any) -> Hashable:
        answer: Hashable = actor.run.remote(number, recipe, unit)
        return answer

    def wait(self, answers: Sequence[Any], timeout: float) -> Sequence[Any]:
        ready, _ = ray.wait(answers, num_returns=1, timeout=timeout)
        return ready

    def result(self, answer: Any) -> Any:
        return ray.get(answer)

    def kill(self, actor: Any, restart: bool) -> None:
        ray.kill(actor, no_restart=not restart)

    def describe_needs(self) -> str:
        return f"{self.cpus:g} CPUs{' and a GPU' if self.options['num_gpus'] else ''}"
