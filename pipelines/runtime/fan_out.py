"""Fan-out: units of work over a pool of actors, each done again if it was lost, in whatever order they finish.

A unit must be idempotent: what it leaves behind is committed under a final name, the same whoever makes it and however
often. `Pool.fan_out` does units; `make_missing` does those whose chunk is not there yet, and what follows from them.
"""

import math
from bisect import insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from ddpm_core.errors import DivergedError, InputError
from pipelines.runtime.progress import Progress, Say, WarningLine
from pipelines.storage.chunks import AHEAD, chunk_path, load_arrays
from pipelines.storage.locations import Location, entries, remove_leftovers

if TYPE_CHECKING:
    import numpy as np
    from ray.exceptions import RayActorError

    from pipelines.runtime.backend import Backend

LOSSES = 5  # a unit that took so many workers with it is at fault itself
SLOW = 1.5  # a unit that runs for so many times the median is given to an idle worker besides
POLL = 1.0  # seconds between looks for slow ones
STALL = 60.0  # seconds without a worker before somebody is told


class OutOfTime(Exception):
    """A pool's deadline has passed; what its workers committed stays."""


class UnitWorker(Protocol):
    """What runs in an actor: made once, it does one unit after the other."""

    def run(self, unit: Any) -> Any: ...


class UnitQueue:
    """The units of one fan-out: which wait, which are done, and how long those of a kind take."""

    def __init__(self) -> None:
        self.kinds: list[type] = []  # of each unit
        self.waiting: deque[int] = deque()
        self.done: set[int] = set()
        self.losses = Counter[int]()  # workers that each unit took with it
        self.workers = Counter[int]()  # that are at each unit
        self.seconds: dict[type, list[float]] = defaultdict(list)  # that units of a kind took, ascending

    def add(self, units: Sequence[Any]) -> None:
        """Take in those of all units so far that are new; they go before those that wait."""
        first = len(self.kinds)
        self.kinds += map(type, units[first:])
        self.waiting.extendleft(reversed(range(first, len(self.kinds))))

    @property
    def is_done(self) -> bool:
        return len(self.done) == len(self.kinds)

    def next(self, running: Iterable[tuple[int, float]], now: float) -> int | None:
        """The next unit for an idle worker, which is at it from now on: one that waits, else one whose only worker is slow,
        else None. running: (unit, since when) of each busy worker, the longest at it first."""
        unit = self.waiting.popleft() if self.waiting else self._slow(running, now)
        if unit is not None:
            self.workers[unit] += 1
        return unit

    def _slow(self, running: Iterable[tuple[int, float]], now: float) -> int | None:
        limits = {kind: SLOW * seconds[len(seconds) // 2] for kind, seconds in self.seconds.items()}
        shortest = min(limits.values(), default=math.inf)
        for unit, since in running:
            if now - since <= shortest:
                return None
            limit = limits.get(self.kinds[unit], math.inf)
            if now - since > limit and self.workers[unit] == 1 and unit not in self.done:
                return unit
        return None

    def finish(self, unit: int, seconds: float) -> bool:
        """A worker has done a unit; whether it was the first to do so."""
        self.workers[unit] -= 1
        if unit in self.done:
            return False
        self.done.add(unit)
        insort(self.seconds[self.kinds[unit]], seconds)
        return True

    def lose(self, unit: int, error: "RayActorError") -> None:
        """A worker died at a unit, which goes first now, unless it is done or in work elsewhere. Raises InputError if it
        has taken LOSSES workers with it."""
        self.workers[unit] -= 1
        self.losses[unit] += 1
        if self.losses[unit] == LOSSES:
            raise InputError(
                f"unit {unit} took {LOSSES} workers with it ({' '.join(str(error).split())}): give more memory or a smaller "
                "--batch-size, and run the same command again"
            ) from error
        if unit not in self.done and not self.workers[unit]:
            self.waiting.appendleft(unit)


class Pool:
    """Actors that live for several fan-outs, and what each of them is at. backend: where they live, by default on Ray."""

    def __init__(self, workers: int | None, cpus_per_worker: float, say: Say, backend: "Backend | None" = None) -> None:
        self.workers, self.cpus_per_worker, self.say = workers, cpus_per_worker, say
        if backend is not None:
            self.backend = backend
        self.deadline: float | None = None  # by the backend's clock, after which no fan-out goes on
        self.fan_outs = 0
        self.last_worker = 0.0  # by the backend's clock, when there was last somebody to work
        self.actors: list[Any] = []
        self.idle: deque[Any] = deque()
        # answer -> actor, unit, since when; the longest at it first
        self.running: dict[Hashable, tuple[Any, int, float]] = {}
        self.returning: dict[Hashable, Any] = {}  # a sign of life -> the actor that is to give it: new, or lost

    @cached_property
    def backend(self) -> "Backend":
        from pipelines.runtime.backend import RayBackend  # here: who finds everything done needs no Ray

        return RayBackend(self.workers, self.cpus_per_worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self.actors:
            self.backend.kill(actor, restart=False)

    def fan_out(
        self, worker: Callable[..., UnitWorker], arguments: Sequence[Any], units: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Do all units on as many workers worker(*arguments) as there is use for: (number of the unit, what run(unit)
        returned), as they finish.

        A lost worker's unit goes to the next that is free, and the lost one joins again when Ray has restarted it; nobody
        waits for it. A unit that takes much longer than others of its type is given to an idle worker too, and whoever is
        first counts. Who takes a result may add to `units`, and these go next. What a unit raises ends it all. Raises
        InputError if a unit takes LOSSES workers with it, or none can start; OutOfTime after the deadline.
        """
        if not units:
            return
        while len(self.actors) < min(self.size, len(units)):
            self.actors.append(self.backend.start())
            self.expect(self.actors[-1])
        self.last_worker = self.backend.now()
        self.fan_outs += 1
        recipe = self.backend.put((worker, arguments))
        queue = UnitQueue()
        queue.add(units)
        try:
            while not queue.is_done:
                if self.deadline is not None and self.backend.now() >= self.deadline:
                    raise OutOfTime
                while self.idle and (unit := queue.next(self.busy, self.backend.now())) is not None:
                    actor = self.idle.popleft()
                    answer = self.backend.run(actor, self.fan_outs, recipe, units[unit])
                    self.running[answer] = (actor, unit, self.backend.now())
                self.report_stall()
                for answer in self.backend.wait([*self.running, *self.returning], POLL):
                    if answer in self.returning:
                        self.welcome(answer)
                    else:
                        yield from self.take(answer, queue)
                        queue.add(units)
        finally:
            for actor, _, _ in self.running.values():  # slow ones that others overtook, or all of them at an error
                self.backend.kill(actor, restart=True)
                self.expect(actor)
            self.running.clear()

    def take(self, answer: Hashable, queue: UnitQueue) -> Iterator[tuple[int, Any]]:
        """What a worker answered: (number of its unit, result), nothing if it died or another was first. Raises what the
        unit raised."""
        from ray.exceptions import RayActorError, RayTaskError

        actor, unit, since = self.running.pop(answer)
        try:
            result = self.backend.result(answer)
        except RayActorError as error:
            self.expect(actor)
            queue.lose(unit, error)
            return
        except RayTaskError as error:
            self.idle.append(actor)
            for kind in (InputError, DivergedError):
                if isinstance(error.cause, kind):
                    raise kind(str(error.cause)) from error  # one sentence, without a remote traceback
            raise
        self.idle.append(actor)
        if queue.finish(unit, self.backend.now() - since):
            yield unit, result

    def check_fits(self) -> None:
        """Connects to Ray. Raises InputError if the cluster has no room for the workers."""
        _ = self.size

    @property
    def busy(self) -> Iterator[tuple[int, float]]:
        """(unit, since when) of each worker that is at one, the longest at it first."""
        return ((unit, since) for _, unit, since in self.running.values())

    @property
    def size(self) -> int:
        """How many workers there shall be. Ray is started if it is not there. Raises InputError if they do not fit."""
        return self.backend.size

    def report_stall(self) -> None:
        """Say so, now and then, if there has been nobody to work for long."""
        now = self.backend.now()
        if self.running or self.idle:
            self.last_worker = now
        elif now - self.last_worker > STALL:
            self.last_worker = now
            self.say(
                WarningLine(
                    f"waiting: none of {len(self.actors)} workers has had its {self.backend.describe_needs()} for "
                    f"{STALL:.0f} s; the cluster is taken by others or still growing"
                )
            )

    def expect(self, actor: Any) -> None:
        """Wait for a sign of life of a new or lost actor, besides everything else."""
        self.returning[self.backend.ready(actor)] = actor

    def welcome(self, sign: Hashable) -> None:
        """Take an actor in, or go on waiting for it."""
        from ray.exceptions import RayActorError

        actor = self.returning.pop(sign)
        try:
            self.backend.result(sign)
        except RayActorError:
            self.expect(actor)
        else:
            self.idle.append(actor)


class ChunkUnit(Protocol):
    """A unit that leaves one chunk, that of `indices`, in `folder`."""

    @property
    def indices(self) -> range: ...
    @property
    def folder(self) -> Location: ...


Unit = TypeVar("Unit", bound=ChunkUnit)
IsCurrent = Callable[[Unit, Mapping[str, "np.ndarray"], Mapping[str, Any]], bool]
Outcome = Literal["kept", "made", "skipped"]


def make_missing(
    pool: Pool,
    worker: Callable[..., UnitWorker],
    arguments: Sequence[Any],
    units: Sequence[Unit],
    *,
    is_current: IsCurrent[Unit],
    stage: str,
    counted: str,
    note: Callable[[Unit], str],
    say: Say,
    due: list[Any] | None = None,
) -> Iterator[tuple[Unit, Outcome]]:
    """Have the chunk of each unit: first come the units whose chunk was there already ("kept"), then the others, as workers
    make or skip them.

    worker: its run(unit) returns whether it made the chunk. is_current: whether a chunk's tensors and facts are those that
    the unit would leave; a damaged or absent chunk is made again. stage, counted, note: for the progress lines, such as
    "evaluate", "samples", "step 1,000". due: units of other work for the same workers, to which the caller may add as it takes
    outcomes: they go next, and run() returns sentences of them, which are said.
    """
    there: set[Location] = set()
    for folder in {unit.folder for unit in units}:
        remove_leftovers(folder)
        there.update(entries(folder))  # one look at a folder, not one for each chunk that is not there
    due = [] if due is None else due
    missing = []
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="kept") as readers:
        looks = readers.map(
            lambda unit: chunk_path(unit.folder, unit.indices) in there and is_kept(unit, is_current, stage, say), units
        )
        for unit, kept in zip(units, looks, strict=True):
            if kept:
                yield unit, "kept"
            else:
                missing.append(unit)
    chunks = range(len(due), len(due) + len(missing))
    work = [*due, *missing]
    due.clear()
    progress = Progress(stage, sum(len(unit.indices) for unit in missing), counted, say) if missing else None
    for number, result in pool.fan_out(worker, arguments, work):
        if number not in chunks:
            for line in result:
                say(line)
            continue
        unit = work[number]
        if result and progress is not None:
            progress.workers = len(pool.running) + len(pool.idle)
            progress.advance(len(unit.indices), note(unit))
        yield unit, "made" if result else "skipped"
        work += due
        due.clear()


def is_kept(unit: Unit, is_current: IsCurrent[Unit], stage: str, say: Say) -> bool:
    """Whether a unit's chunk is there, undamaged and current."""
    try:
        return is_current(unit, *load_arrays(unit.folder, unit.indices))
    except FileNotFoundError:
        return False
    except InputError:
        path = chunk_path(unit.folder, unit.indices)
        say(WarningLine(f"{stage}: chunk {str(path)!r} is damaged: it is made again"))
        return False
