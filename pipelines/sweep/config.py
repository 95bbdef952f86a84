"""What a sweep is, as a value: the three kinds of it, and what their points share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ddpm_core.configs import Schedule
from ddpm_core.errors import InputError
from ddpm_core.ranges import Positive
from pipelines.evaluate.config import MIN_CHUNKS, EvaluateConfig
from pipelines.runtime.options import Checked
from pipelines.sweep.points import Point, ablation_points, command_line, schedule_points, space_values
from pipelines.train.config import TrainConfig

Typed = Callable[[Sequence[str], TrainConfig], TrainConfig]  # a configuration with options given as words


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Checked, ABC):
    """What all points of a sweep share."""

    train: TrainConfig
    """The training that the points vary."""
    evaluate: EvaluateConfig
    """How each is evaluated at the end; its run is filled in for every trial."""
    seeds: Positive[int] = 1
    """Trainings of each point: --train.seed and the numbers after it. Two or more give a spread."""
    rungs: tuple[Positive[int], ...] = ()
    """Steps at which the points are compared, and those of the worse half that are worse beyond their intervals stopped."""
    rung_samples: int = 1000
    """Samples of each trial at a rung."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.rungs) != sorted(set(self.rungs)):
            raise InputError(f"--rungs is {' '.join(map(str, self.rungs))}: give steps in ascending order")
        if self.rungs and self.rungs[-1] >= self.train.steps:
            raise InputError(
                f"--rungs ends at {self.rungs[-1]:,}: the last must come before --train.steps {self.train.steps:,}"
            )
        if self.rung_samples < 2 * MIN_CHUNKS:
            raise InputError(f"--rung-samples is {self.rung_samples}: an interval needs {2 * MIN_CHUNKS} or more")

    def trial(self, point: Point, seed: int, steps: int) -> TrainConfig:
        """The training of a point with one seed, up to some step."""
        return replace(point.config, seed=seed, steps=steps)

    def measurement(self, steps: int) -> EvaluateConfig:
        """How a trial is evaluated at some step: few samples at a rung; at the end as asked for, on noise that nothing was
        chosen by."""
        last = self.evaluate
        if steps == self.train.steps:
            return replace(last, noise="report")
        size = -(-self.rung_samples // (2 * MIN_CHUNKS))
        batch = min(last.batch_size, size)
        return replace(
            last, samples=self.rung_samples, chunk_size=size, batch_size=batch, progress=0, pictures=0, nearest=0
        )

    @abstractmethod
    def points(self, typed: Typed) -> dict[str, Point]:
        """What is compared, by name. InputError where that cannot be."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSweep(SweepConfig):
    """Beta schedules."""

    schedules: tuple[Schedule, ...] = ("linear", "quad", "const")
    """Those to compare, at --train.diffusion.beta-start and beta-end."""
    matched: bool = True
    """Also quad and const with the beta_T that meets linear's L_T, as the paper demands of all."""

    def points(self, typed: Typed) -> dict[str, Point]:
        return schedule_points(self.train, self.schedules, self.matched)


@dataclass(frozen=True, kw_only=True)
class AblationSweep(SweepConfig):
    """Table 2 of the paper."""

    def points(self, typed: Typed) -> dict[str, Point]:
        return ablation_points(self.train)


@dataclass(frozen=True, kw_only=True)
class SpaceSweep(SweepConfig):
    """Any options of a training."""

    grid: tuple[str, ...] = ()
    """Options with their values, OPTION=VALUE,VALUE,...: every combination is a point."""
    draw: tuple[str, ...] = ()
    """Options with a distribution, OPTION=uniform:LOW:HIGH, loguniform:LOW:HIGH or integers:LOW:HIGH."""
    draws: Positive[int] = 8
    """Points to draw, for each combination of the grid."""

    def points(self, typed: Typed) -> dict[str, Point]:
        return {
            ", ".join(f"{name} {value}" for name, value in values.items()): Point(
                typed(command_line(values), self.train), values
            )
            for values in space_values(self.grid, self.draw, self.draws, self.train.seed)
        }
