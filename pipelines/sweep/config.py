"""The options of a sweep: its three kinds, and what their points share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from ddpm_core.configs import Schedule
from ddpm_core.errors import InputError
from ddpm_core.ranges import Positive, up_to
from pipelines.evaluate.config import MIN_CHUNKS, EvaluateConfig
from pipelines.runtime.options import Checked
from pipelines.sweep.points import Point, ablation_points, command_line, schedule_points, space_values
from pipelines.train.config import TrainConfig

ParseOptions = Callable[[Sequence[str], TrainConfig], TrainConfig]  # (words of a command line, defaults)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Checked, ABC):
    """What all points of a sweep share."""

    train: TrainConfig
    """The training that the points vary."""
    evaluate: EvaluateConfig
    """How each is evaluated at the end; its --run is that of each trial."""
    seeds: Annotated[int, up_to(1000)] = 1
    """Trainings of each point, with --train.seed and the numbers after it as seeds. Two or more give a spread."""
    rungs: tuple[Positive[int], ...] = ()
    """Steps at which the points are compared, and those of the worse half stopped that are worse beyond their intervals."""
    rung_samples: Positive[int] = 1000
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

        if self.evaluate.ema_length is not None and not self.train.optim.posthoc_ema:
            raise InputError(
                "--evaluate.ema-length wants what trainings track with --train.optim.posthoc-ema: give both"
            )

    @property
    def seed_numbers(self) -> range:
        """Those of each point's trainings."""
        return range(self.train.seed, self.train.seed + self.seeds)

    def training(self, point: Point, seed: int, steps: int) -> TrainConfig:
        """The training of a point with one seed, up to a step."""
        return replace(point.config, seed=seed, steps=steps)

    def evaluation(self, steps: int) -> EvaluateConfig:
        """How a trial is evaluated at a step: at a rung with few samples, at the end as asked for."""
        if steps == self.train.steps:
            return replace(self.evaluate, noise="report")  # not the noise by which rungs chose
        chunk_size = -(-self.rung_samples // (2 * MIN_CHUNKS))  # twice the chunks that an interval needs
        return replace(
            self.evaluate,
            samples=self.rung_samples,
            chunk_size=chunk_size,
            batch_size=min(self.evaluate.batch_size, chunk_size),
            progress=0,
            pictures=0,
            nearest=0,
        )

    @abstractmethod
    def points(self, parse: ParseOptions) -> dict[str, Point]:
        """What is compared, by name. Raises InputError if the options name no points, or wrong ones."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSweep(SweepConfig):
    """Beta schedules."""

    schedules: tuple[Schedule, ...] = ("linear", "quad", "const")
    """Those to compare, at --train.diffusion.beta-start and beta-end."""
    matched: bool = True
    """Also quad and const with the beta_T that gives linear's L_T; the paper compares only such."""

    def points(self, parse: ParseOptions) -> dict[str, Point]:
        return schedule_points(self.train, self.schedules, self.matched)


@dataclass(frozen=True, kw_only=True)
class AblationSweep(SweepConfig):
    """Table 2 of the paper."""

    def points(self, parse: ParseOptions) -> dict[str, Point]:
        return ablation_points(self.train)


@dataclass(frozen=True, kw_only=True)
class SpaceSweep(SweepConfig):
    """Any options of a training."""

    grid: tuple[str, ...] = ()
    """Options with their values, OPTION=VALUE,VALUE,...: every combination is a point."""
    draw: tuple[str, ...] = ()
    """Options with a distribution, OPTION=uniform:LOW:HIGH, loguniform:LOW:HIGH or integers:LOW:HIGH."""
    draws: Annotated[int, up_to(10_000)] = 8
    """Points to draw, for each combination of the grid."""

    def points(self, parse: ParseOptions) -> dict[str, Point]:
        combinations = space_values(self.grid, self.draw, self.draws, self.train.seed)
        return {
            ", ".join(f"{name} {value}" for name, value in values.items()): Point(
                parse(command_line(values), self.train), values
            )
            for values in combinations
        }
