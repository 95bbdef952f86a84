"""The command line that the train_*.py jobs share: a recipe's name, then any of its values."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm_core.errors import InputError, did_you_mean
from ddpm_core.ranges import Name, Range
from jobs.cli import COMPLETION, given_recipe, parse, say
from pipelines import train
from pipelines.runtime.console import emit_result
from pipelines.runtime.options import Checked
from pipelines.runtime.recipe import PRESET, Recipe
from pipelines.train.config import TrainConfig, config_for


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Checked):
    """What a training job is asked."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved configuration and what the run will cost, and end."""
    gpu: Name = "H100 80GB HBM3"
    """For the dry run: the GPU's name, as torch.cuda.get_device_name says it."""
    utilisation: Annotated[float, Range("a share above 0, at most 1", low=0, above=True, high=1)] = 0.3
    """For the dry run: model FLOPs done over FLOPs possible."""


def train_job(recipes: Mapping[str, str], description: str) -> None:
    """Train one of `recipes` (a name on the command line -> a preset), the first if none is given."""
    arguments = sys.argv[1:]
    word = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    name = chosen_recipe(word, given_recipe(arguments), recipes)
    if name is None:
        if len(recipes) > 1 and not {"-h", "--help", *COMPLETION} & set(arguments):
            raise InputError(
                f"no recipe is given: put one of {', '.join(recipes)} first, with --shards for its data, or give --config FILE, "
                "a TOML file such as --save-config writes"
            )
        name = next(iter(recipes))
    first = name if len(recipes) > 1 else ""
    choice = f"Recipes: {', '.join(recipes)} (shown: {name}). " if len(recipes) > 1 else ""
    default = TrainCommand(config=config_for(recipes[name], shards=tyro.MISSING))
    command = parse(TrainCommand, arguments, description=f"{description} {choice}", default=default, first=first)
    if command.dry_run:
        from pipelines.train.plan import describe_plan

        print(describe_plan(command.config, command.gpu, command.utilisation))
        return
    result = train.train(command.config, say)
    say(f"train: checkpoints in {result.run.folder}; MLflow run {result.run_id}")
    emit_result(run=result.run.name)
    again = ["python", "jobs/evaluate.py", "--run", result.run.name, "--storage", str(result.storage.root)]
    say(f"train: evaluate with {shlex.join(again)}")


def chosen_recipe(word: str | None, recipe: Recipe | None, recipes: Mapping[str, str]) -> str | None:
    """The name of the recipe to train: the word that was given, else that of the file's preset, else None. Raises InputError for
    one that is none, or where the two differ."""
    if word is not None and word not in recipes:
        raise InputError(f"recipe {word!r} is unknown{did_you_mean(word, recipes)}: choose one of {', '.join(recipes)}")
    preset = recipe.values.get(PRESET) if recipe is not None else None
    if recipe is None or preset is None:
        return word
    names = [name for name, value in recipes.items() if value == preset]
    if not names or word not in (None, *names):
        from ddpm_core.typed import shown

        here = (
            f"the recipe here is {word}" if word is not None else f"the presets here are {', '.join(recipes.values())}"
        )
        raise InputError(
            f"{recipe.path!r} has preset = {shown(preset)}, but {here}: give the file to the job that it is for"
        )
    return names[0]
