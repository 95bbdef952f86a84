"""What a sweep compares: variants of one training configuration, by name."""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ddpm_core.configs import DiffusionConfig, LossType, MeanType, Schedule
from ddpm_core.errors import InputError
from pipelines.train.config import TrainConfig

MATCHED: tuple[Schedule, ...] = ("quad", "const")  # also compared with the beta_T that gives linear's L_T


@dataclass(frozen=True)
class Point:
    """One variant. values: the options that differ. paper: what the paper says of it. chosen: whether it is the paper's
    choice."""

    config: TrainConfig
    values: Mapping[str, str]
    paper: str = ""
    chosen: bool = False


def trial_name(label: str, seed: int) -> str:
    """What a person knows a trial by: its point's label, and its seed."""
    return f"{label}, seed {seed}"


def schedule_points(train: TrainConfig, schedules: Sequence[Schedule], matched: bool) -> dict[str, Point]:
    """Beta schedules at the end points of `train` (the paper's 1e-4 and 0.02), and, if `matched`, those of MATCHED once
    more with the beta_T at which L_T is as small as linear's: the paper compared only such (Appendix B).

    Raises InputError unless one or more schedules are named, each once.
    """
    from ddpm_core.schedules import matching_beta_end  # torch, which a command line must not wait for

    if len(schedules) < 1 or len(set(schedules)) < len(schedules):
        raise InputError(f"--schedules is {' '.join(schedules)!r}: name one or more, each once")
    points: dict[str, Point] = {
        name: diffusion_point(train, replace(train.diffusion, schedule=name)) for name in schedules
    }
    for schedule in MATCHED:
        if matched and schedule in schedules:
            diffusion = replace(train.diffusion, schedule=schedule)
            end = matching_beta_end(schedule, diffusion.num_timesteps, diffusion.beta_start)
            points[f"{schedule}-matched"] = diffusion_point(train, replace(diffusion, beta_end=end))
    return points


def diffusion_point(train: TrainConfig, diffusion: DiffusionConfig) -> Point:
    """A schedule as a variant of `train`."""
    values: dict[str, str] = {"diffusion.schedule": diffusion.schedule}
    if diffusion.beta_end != train.diffusion.beta_end:
        values["diffusion.beta_end"] = f"{diffusion.beta_end:.6g}"
    is_linear = diffusion.schedule == "linear"
    paper = "chosen among constant, linear and quadratic ones" if is_linear else ""
    return Point(replace(train, diffusion=diffusion), values, paper, chosen=is_linear)


def ablation_points(train: TrainConfig) -> dict[str, Point]:
    """The six cells of Table 2: what is predicted, by which objective, with which variance.

    The fixed variance is that of `train`, the learned one the raw logarithm that the paper means. Raises InputError if
    `train` learns it.
    """
    if train.diffusion.var_type not in ("fixedlarge", "fixedsmall"):
        raise InputError(
            f"--train.diffusion.var-type is {train.diffusion.var_type!r}: Table 2 says which cells learn it; give "
            "fixedlarge or fixedsmall for the other cells"
        )
    # mu is the posterior mean (Eq. 8), eps the noise (Eq. 12); L the bound (Eq. 5), mse unweighted; L_simple is Eq. 14.
    cells: list[tuple[str, MeanType, LossType, bool, str]] = [
        ("mu L learned", "xprev", "kl", True, "FID 23.69, IS 7.28 in Table 2"),
        ("mu L fixed", "xprev", "kl", False, "FID 13.22, IS 8.06 in Table 2"),
        ("mu mse", "xprev", "mse", False, "unstable in Table 2"),
        ("eps L learned", "eps", "kl", True, "unstable in Table 2"),
        ("eps L fixed", "eps", "kl", False, "FID 13.51, IS 7.67 in Table 2"),
        ("eps L_simple", "eps", "mse", False, "FID 3.17, IS 9.46 in Table 2"),
    ]
    points = {}
    for label, mean_type, loss_type, learned, paper in cells:
        var_type = "learned" if learned else train.diffusion.var_type
        diffusion = replace(train.diffusion, mean_type=mean_type, loss_type=loss_type, var_type=var_type)
        # A learned variance takes as many output channels as the mean.
        unet = replace(train.unet, out_channels=2 * train.unet.in_channels) if learned else train.unet
        values = {"mean_type": mean_type, "loss_type": loss_type, "var_type": var_type}
        points[label] = Point(
            replace(train, unet=unet, diffusion=diffusion),
            {f"diffusion.{name}": value for name, value in values.items()},
            paper,
            chosen=label == "eps L_simple",
        )
    return points


def space_values(grid: Sequence[str], draw: Sequence[str], draws: int, seed: int) -> list[dict[str, str]]:
    """The options of each point of a space, name -> value: every combination of the grid, each with `draws` draws.

    grid: such as "optim.lr=1e-4,2e-4". draw: such as "optim.lr=loguniform:1e-5:1e-3". A drawn value is a function of the
    seed, the option's name and the number of the draw. Raises InputError for a text that is neither, and for no option, one
    in both, seed or steps.
    """
    from ddpm_core.rng import derive_seed  # torch, which a command line must not wait for

    axes = {name: text.split(",") for name, text in map(parse_assignment, grid)}
    distributions = {name: parse_distribution(name, text) for name, text in map(parse_assignment, draw)}
    if not (axes or distributions):
        raise InputError("--grid and --draw are empty: name an option with values, such as --grid optim.lr=1e-4,2e-4")
    if repeated := axes.keys() & distributions.keys():
        raise InputError(f"option {min(repeated)!r} is in --grid and in --draw: leave one out")
    if fixed := (axes.keys() | distributions.keys()) & {"seed", "steps"}:
        raise InputError(f"option {min(fixed)!r} is the same for all points: give --seeds or --train.steps instead")
    drawn = [
        {
            name: sample(random.Random(derive_seed(seed, f"draw {name}", number)))
            for name, sample in distributions.items()
        }
        for number in range(draws if distributions else 1)
    ]
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [combination | values for combination in combinations for values in drawn]


def parse_assignment(text: str) -> tuple[str, str]:
    """(name, values) of an option given as NAME=VALUES. Raises InputError if either is missing."""
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise InputError(f"{text!r} names no option with values: write it as optim.lr=1e-4,2e-4")
    return name.removeprefix("--"), values


def parse_distribution(name: str, text: str) -> Callable[[random.Random], str]:
    """A distribution given as KIND:LOW:HIGH, from which values are drawn as texts of six digits, so that what is trained is
    what the point's name says. Raises InputError if it is none. name: the option, for errors."""
    try:
        kind, low_text, high_text = text.split(":")
        low, high = float(low_text), float(high_text)
        if not low < high or (kind == "loguniform" and low <= 0.0):
            raise ValueError
        return {
            "uniform": lambda generator: f"{generator.uniform(low, high):.6g}",
            "loguniform": lambda generator: f"{math.exp(generator.uniform(math.log(low), math.log(high))):.6g}",
            "integers": lambda generator: str(generator.randint(int(low), int(high))),  # both ends included
        }[kind]
    except (ValueError, KeyError):
        raise InputError(
            f"--draw {name}={text} is no distribution: write uniform:LOW:HIGH, loguniform:LOW:HIGH or integers:LOW:HIGH"
        ) from None


def command_line(values: Mapping[str, str]) -> list[str]:
    """Options as words of a command line; a boolean as --NAME or --no-NAME, which tyro wants after the last dot."""
    words: list[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if value.lower() in ("true", "false"):
            head, _, last = option.rpartition(".")
            flag = last if value.lower() == "true" else f"no-{last}"
            words.append(f"--{head}.{flag}" if head else f"--{flag}")
        else:
            words += [f"--{option}", value]
    return words
