"""Fan-out: units of work over a pool of actors, each done again where it was lost, in whatever order they finish.

A unit must be idempotent: what it leaves behind is committed under a final name, the same whoever makes it and however
often.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ddpm_core.errors import InputError
from pipelines.cluster import check_fits, connect

LOSSES = 5  # a unit that took so many workers with it is at fault itself
SLOW = 2.0  # a unit that runs for so many times the median is given to an idle worker besides
BEAT = 1.0  # seconds between looks for slow ones


class UnitWorker(Protocol):
    """What runs in an actor: made once, it does one unit after the other."""

    def run(self, unit: Any) -> Any: ...


def pool_size(workers: int | None, cpus_per_worker: float) -> int:
    """How many workers the cluster shall have: those asked for, or as many as there is room for, one a GPU where there
    are GPUs. InputError where they do not fit."""
    resources = connect()
    gpus = 1 if resources.gpus else 0
    room = resources.gpus if gpus else resources.cpus // cpus_per_worker
    size = workers or max(1, int(room))
    check_fits(resources, workers=size, cpus=cpus_per_worker, gpus=gpus, what="--workers")
    return size


def fan_out(
    worker: Callable[..., UnitWorker],
    arguments: Sequence[Any],
    units: Sequence[Any],
    *,
    workers: int,
    cpus_per_worker: float,
) -> Iterator[tuple[int, Any]]:
    """Do all units on `workers` actors worker(*arguments): (number of the unit, what run(unit) returned), as they finish.

    A lost worker's unit goes to the next that is free, and the lost one joins again when Ray has restarted it; nobody
    waits for it. A unit that takes much longer than the others is given to an idle worker too, and whoever is first
    counts. What a unit raises ends it all; InputError where a unit takes LOSSES workers with it. The actors are killed at
    the end, whatever that is.
    """
    pool = Pool(worker, arguments, min(workers, len(units)), cpus_per_worker)
    try:
        yield from pool.run(units)
    finally:
        pool.kill()


class Pool:
    """The actors of one fan-out, and what each of them is at."""

    def __init__(
        self, worker: Callable[..., UnitWorker], arguments: Sequence[Any], size: int, cpus_per_worker: float
    ) -> None:
        options = {
            "num_cpus": cpus_per_worker,
            "num_gpus": 1 if connect().gpus else 0,
            "max_restarts": -1,
            # Inside a Tune trial, actors would else be held to the trial's own bundle.
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=None),
        }
        self.actors = [ray.remote(worker).options(**options).remote(*arguments) for _ in range(size)]
        self.idle: deque[Any] = deque()
        self.running: dict[ray.ObjectRef, tuple[Any, int, float]] = {}  # answer -> actor, unit, since when
        # A sign of life -> the actor that is to give it: a new one, or one that was lost.
        self.returning = {actor.__ray_ready__.remote(): actor for actor in self.actors}

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def run(self, units: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        waiting, done, losses = deque(range(len(units))), set[int](), Counter[int]()
        took: list[float] = []
        while len(done) < len(units):
            while self.idle and (number := self.next_unit(waiting, took)) is not None:
                actor = self.idle.popleft()
                self.running[actor.run.remote(units[number])] = (actor, number, time.monotonic())
            answers, _ = ray.wait([*self.running, *self.returning], num_returns=1, timeout=BEAT)
            for answer in answers:
                if answer in self.returning:
                    self.welcome(answer)
                    continue
                actor, number, since = self.running.pop(answer)
                try:
                    result = ray.get(answer)
                except ray.exceptions.RayActorError as error:
                    losses[number] += 1
                    if losses[number] == LOSSES:
                        raise InputError(
                            f"unit {number} took {LOSSES} workers with it ({describe(error)}): give more memory or a smaller "
                            "--batch-size, and run the same command again"
                        ) from error
                    self.returning[actor.__ray_ready__.remote()] = actor
                    if number not in done and all(number != other for _, other, _ in self.running.values()):
                        waiting.appendleft(number)
                    continue
                self.idle.append(actor)
                if number not in done:
                    done.add(number)
                    took.append(time.monotonic() - since)
                    yield number, result

    def next_unit(self, waiting: deque[int], took: Sequence[float]) -> int | None:
        """The next unit for an idle worker: one that waits, or one whose only worker is slow; None where there is none."""
        if waiting:
            return waiting.popleft()
        if not took:
            return None
        limit = SLOW * sorted(took)[len(took) // 2]
        count = Counter(number for _, number, _ in self.running.values())
        now = time.monotonic()
        slow = [(since, number) for _, number, since in self.running.values() if count[number] == 1]
        return next((number for since, number in sorted(slow) if now - since > limit), None)

    def welcome(self, sign: ray.ObjectRef) -> None:
        """Take a restarted worker back in, or go on waiting for it."""
        actor = self.returning.pop(sign)
        try:
            ray.get(sign)
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                raise InputError(
                    f"a worker could not be started ({describe(error)}): mend that and run the same command again"
                ) from error
            self.returning[actor.__ray_ready__.remote()] = actor
        else:
            self.idle.append(actor)


def describe(error: ray.exceptions.RayActorError) -> str:
    """What happened to an actor, on one line: the end of its constructor's traceback, or how Ray saw it die."""
    lines = str(error).strip().splitlines()
    return lines[-1] if error.actor_init_failed else " ".join(" ".join(lines).split())
