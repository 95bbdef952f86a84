"""Fan-out: units of work over a pool of actors, each done again where it was lost, in whatever order they finish.

A unit must be idempotent: what it leaves behind is committed under a final name, the same whoever makes it and however
often.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ddpm_core.errors import DivergedError, InputError
from pipelines.runtime.cluster import check_fits, connect
from pipelines.runtime.progress import Say

LOSSES = 5  # a unit that took so many workers with it is at fault itself
SLOW = 2.0  # a unit that runs for so many times the median is given to an idle worker besides
BEAT = 1.0  # seconds between looks for slow ones
SILENCE = 60.0  # seconds without a worker before somebody is told


class OutOfTime(Exception):
    """A pool's deadline has passed; what its workers committed stays."""


class UnitWorker(Protocol):
    """What runs in an actor: made once, it does one unit after the other."""

    def run(self, unit: Any) -> Any: ...


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
                    f"a worker could not be started ({type(error).__name__}: {' '.join(str(error).split())}): mend that and run "
                    "the same command again"
                ) from error
            self.number = number
        return self.worker.run(unit)  # type: ignore[attr-defined]


class Pool:
    """Actors that live for several fan-outs, and what each of them is at."""

    def __init__(self, workers: int | None, cpus_per_worker: float, say: Say) -> None:
        self.workers, self.cpus, self.say = workers, cpus_per_worker, say
        self.deadline: float | None = None  # of time.monotonic(), after which no fan-out goes on
        self.fan_outs = 0
        self.heard = time.monotonic()  # when there was last somebody to work
        self.actors: list[Any] = []
        self.idle: deque[Any] = deque()
        self.running: dict[ray.ObjectRef, tuple[Any, int, float]] = {}  # answer -> actor, unit, since when
        self.returning: dict[ray.ObjectRef, Any] = {}  # a sign of life -> the actor that is to give it: new, or lost

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def fan_out(
        self, worker: Callable[..., UnitWorker], arguments: Sequence[Any], units: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Do all units on as many workers worker(*arguments) as there is use for: (number of the unit, what run(unit)
        returned), as they finish.

        A lost worker's unit goes to the next that is free, and the lost one joins again when Ray has restarted it; nobody
        waits for it. A unit that takes much longer than the others is given to an idle worker too, and whoever is first
        counts. What a unit raises ends it all; InputError where a unit takes LOSSES workers with it, or none can start;
        OutOfTime after the deadline.
        """
        if not units:
            return
        while len(self.actors) < min(self.size, len(units)):
            self.actors.append(ray.remote(PoolWorker).options(**self.options).remote())
            self.expect(self.actors[-1])
        self.heard = time.monotonic()
        self.fan_outs += 1
        recipe = [ray.put((worker, arguments))]
        waiting, done, losses = deque(range(len(units))), set[int](), Counter[int]()
        took: list[float] = []
        try:
            while len(done) < len(units):
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    raise OutOfTime
                while self.idle and (number := self.next_unit(waiting, took)) is not None:
                    actor = self.idle.popleft()
                    answer = actor.run.remote(self.fan_outs, recipe, units[number])
                    self.running[answer] = (actor, number, time.monotonic())
                self.complain()
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
                                f"unit {number} took {LOSSES} workers with it ({describe(error)}): give more memory or a "
                                "smaller --batch-size, and run the same command again"
                            ) from error
                        self.expect(actor)
                        if number not in done and all(number != other for _, other, _ in self.running.values()):
                            waiting.appendleft(number)
                        continue
                    except ray.exceptions.RayTaskError as error:
                        self.idle.append(actor)
                        for kind in (InputError, DivergedError):
                            if isinstance(error.cause, kind):
                                raise kind(str(error.cause)) from error  # one sentence, without a remote traceback
                        raise
                    self.idle.append(actor)
                    if number not in done:
                        done.add(number)
                        took.append(time.monotonic() - since)
                        yield number, result
        finally:
            for actor, _, _ in self.running.values():  # slow ones that others overtook, or all of them at an error
                ray.kill(actor, no_restart=False)
                self.expect(actor)
            self.running.clear()

    @cached_property
    def size(self) -> int:
        """How many workers there shall be: those asked for, or as many as the cluster has room for, one a GPU where there
        are GPUs. Ray is started where it is not. InputError where they do not fit."""
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

    def complain(self) -> None:
        """Say so, now and then, where nobody has been there to work for long."""
        now = time.monotonic()
        if self.running or self.idle:
            self.heard = now
        elif now - self.heard > SILENCE:
            self.heard = now
            gpus = " and a GPU" if self.options["num_gpus"] else ""
            self.say(
                f"waiting: none of {len(self.actors)} workers has had its {self.cpus:g} CPUs{gpus} for {SILENCE:.0f} s; the "
                "cluster is taken by others or still growing"
            )

    def expect(self, actor: Any) -> None:
        """Wait for a sign of life of a new or lost actor, besides everything else."""
        self.returning[actor.__ray_ready__.remote()] = actor

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
        """Take an actor in, or go on waiting for it."""
        actor = self.returning.pop(sign)
        try:
            ray.get(sign)
        except ray.exceptions.RayActorError:
            self.expect(actor)
        else:
            self.idle.append(actor)


def describe(error: ray.exceptions.RayActorError) -> str:
    """How Ray saw an actor die, on one line."""
    return " ".join(str(error).split())
