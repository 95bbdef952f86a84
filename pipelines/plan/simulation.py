"""A fan-out without Ray: the loop of `runtime/fan_out.py` itself, over workers and a clock that are simulated.

Time passes for two reasons only: a worker is at a unit, or the driver is at something. What the driver costs is the CPU time
that its own code takes here and now (`meter`), and what each call of Ray's costs (`RayCosts`); it does one thing at a time, so
that is what ends the growth in the end.
"""

import heapq
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import RayActorError

from pipelines.runtime.fan_out import Pool, make_missing


@dataclass(frozen=True, kw_only=True)
class WorkerModel:
    """How workers behave. Chance is drawn for each chunk, in the order in which they are given out."""

    workers: int
    seconds: Callable[[range], float]  # of a chunk of these samples, the median
    spread: float = 0.0  # standard deviation of the logarithm of a chunk's seconds
    stragglers: float = 0.0  # the share of chunks that take `slowdown` times as long
    slowdown: float = 10.0
    losses: float = 0.0  # the share of chunks whose worker dies, half way
    restart: float = 0.0  # seconds until a lost worker is there again
    numbers: float = 0.0  # seconds of all numbers of a checkpoint, if any are made


@dataclass(frozen=True, kw_only=True)
class RayCosts:
    """CPU seconds of the driver's calls of Ray."""

    submit: float = 0.0
    result: float = 0.0
    wait: float = 0.0
    wait_each: float = 0.0  # for each answer that is waited for


@dataclass(frozen=True)
class SimulatedOutcome:
    """A simulated fan-out. sampling: seconds from the first unit given out to the last chunk taken; useful: those of workers in
    that time, at units that counted. seconds: until the last unit of all is taken. driver: seconds that the driver was at
    something. lost: workers; repeated: units given to a second worker."""

    workers: int
    sampling: float
    useful: float
    seconds: float
    driver: float
    lost: int
    repeated: int

    @property
    def busy(self) -> float:
        """The share of the workers' time that went into what counted, while there were chunks."""
        return self.useful / (self.workers * self.sampling)


class SimulatedBackend:
    """Workers of a model, on a clock that starts at 0."""

    def __init__(self, model: WorkerModel, costs: RayCosts, seed: int, meter: Callable[[], float] | None) -> None:
        self.model, self.costs, self.meter = model, costs, meter or (lambda: 0.0)
        self.random = np.random.default_rng(seed)
        self.time = 0.0
        self.driver = 0.0
        self.metered = self.meter()
        self.events: list[tuple[float, int]] = []  # (when, answer), the next first
        # answer -> actor, unit, what is answered; killed ones' are gone
        self.answers: dict[int, tuple[int, Any, Any]] = {}
        self.done: dict[Any, float] = {}  # unit -> seconds that its worker took
        self.actors = self.asked = self.given = self.lost = 0

    @property
    def size(self) -> int:
        return self.model.workers

    @contextmanager
    def aside(self, cost: float = 0.0) -> Iterator[None]:
        """Count the driver's time until now and `cost`, and not what the simulation itself takes in the block."""
        self.spend(self.meter() - self.metered + cost)
        yield
        self.metered = self.meter()

    def spend(self, seconds: float) -> None:
        self.time += seconds
        self.driver += seconds

    def now(self) -> float:
        with self.aside():
            return self.time

    def put(self, value: Any) -> Any:
        return value

    def start(self) -> int:
        self.actors += 1
        return self.actors

    def answer(self, seconds: float, actor: int, unit: Any = None, value: Any = None) -> int:
        self.asked += 1
        self.answers[self.asked] = (actor, unit, value)
        heapq.heappush(self.events, (self.time + seconds, self.asked))
        return self.asked

    def ready(self, actor: int) -> Hashable:
        with self.aside(self.costs.submit):
            # Pools that plan for hours start once: workers are there when the clock starts.
            return self.answer(self.model.restart if self.given else 0.0, actor)

    def run(self, actor: int, number: int, recipe: Any, unit: Any) -> Hashable:
        with self.aside(self.costs.submit):
            self.given += 1
            model = self.model
            if isinstance(unit, SimulatedNumbers):
                return self.answer(model.numbers, actor, unit, model.numbers)
            straggles, dies = self.random.random(2)
            seconds = model.seconds(unit.indices) * float(np.exp(model.spread * self.random.standard_normal()))
            seconds *= model.slowdown if straggles < model.stragglers else 1.0
            if dies < model.losses:
                self.lost += 1
                return self.answer(seconds / 2, actor, unit, RayActorError())
            return self.answer(seconds, actor, unit, seconds)

    def wait(self, answers: Collection[Any], timeout: float) -> Sequence[Any]:
        with self.aside(self.costs.wait + len(answers) * self.costs.wait_each):
            while self.events and self.events[0][1] not in self.answers:
                heapq.heappop(self.events)
            nobody_idle = len(self.answers) == self.actors  # then a look for slow ones would be for nothing
            if not self.events or (self.events[0][0] > self.time + timeout and not nobody_idle):
                self.time += timeout
                return []
            when, answer = heapq.heappop(self.events)
            self.time = max(self.time, when)
            return [answer]

    def result(self, answer: int) -> Any:
        with self.aside(self.costs.result):
            _, unit, value = self.answers.pop(answer)
            if isinstance(value, float):
                self.done.setdefault(unit, value)
        if isinstance(value, Exception):
            raise value
        return () if isinstance(unit, SimulatedNumbers) else value

    def kill(self, actor: int, restart: bool) -> None:
        with self.aside(self.costs.submit):
            for answer in [answer for answer, (at, _, _) in self.answers.items() if at == actor]:
                del self.answers[answer]

    def describe_needs(self) -> str:
        return "place"


class NoWorker:
    """Stands for the worker, which is simulated."""

    def run(self, unit: Any) -> Any:
        raise AssertionError("it is never run")


@dataclass(frozen=True)
class SimulatedChunk:
    """A chunk that nobody makes."""

    indices: range
    folder: Path


@dataclass(frozen=True)
class SimulatedNumbers:
    """The numbers of a checkpoint, that nobody needs."""

    folder: Path


def simulate(
    chunks: Sequence[range],
    model: WorkerModel,
    costs: RayCosts | None = None,
    *,
    checkpoints: int = 1,
    seed: int = 0,
    meter: Callable[[], float] | None = None,
) -> SimulatedOutcome:
    """The chunks of some checkpoints' samples, none of which is there, and the numbers of each, made by simulated workers.

    meter: CPU seconds of this process, such as time.process_time, for what the driver's own code costs; without one it costs
    nothing, and the outcome is a function of the arguments. Raises InputError as `Pool.fan_out` does.
    """
    backend = SimulatedBackend(model, costs or RayCosts(), seed, meter)
    sampling = useful = 0.0
    due: list[SimulatedNumbers] = []
    with tempfile.TemporaryDirectory() as folder, Pool(None, 0.0, lambda line: None, backend) as pool:
        units = [SimulatedChunk(each, Path(folder) / str(number)) for number in range(checkpoints) for each in chunks]
        made = make_missing(
            pool,
            NoWorker,
            [],
            units,
            is_current=lambda chunk, tensors, facts: True,
            stage="plan",
            counted="samples",
            note=lambda chunk: "",
            say=lambda line: None,
            due=due,
        )
        left = Counter(unit.folder for unit in units)
        for number, (unit, _) in enumerate(made, 1):
            left[unit.folder] -= 1
            if model.numbers and not left[unit.folder]:
                due.append(SimulatedNumbers(unit.folder))
            if number == len(units):
                sampling, useful = backend.now(), sum(backend.done.values())
        seconds, driver = backend.now(), backend.driver
    given = len(units) + (checkpoints if model.numbers else 0)
    repeated = backend.given - given - backend.lost
    return SimulatedOutcome(model.workers, sampling, useful, seconds, driver, backend.lost, repeated)
