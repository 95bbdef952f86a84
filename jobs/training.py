"""The command line that the train_*.py jobs share: a recipe's name, then any of its values."""

import sys
from collections.abc import Mapping

import tyro

from ddpm_core.errors import InputError
from jobs.cli import parse, say
from pipelines.train import train
from pipelines.training_config import TrainConfig, config_for


def train_job(recipes: Mapping[str, str], description: str) -> None:
    """Train one of `recipes` (a name on the command line -> a preset), the first where none is given."""
    arguments = sys.argv[1:]
    name = next(iter(recipes))
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
    elif len(recipes) > 1 and not {"-h", "--help"} & set(arguments):
        raise InputError(f"no recipe is given: put one of {', '.join(recipes)} first")
    if name not in recipes:
        raise InputError(f"recipe {name!r} is unknown: choose one of {', '.join(recipes)}")
    default = config_for(recipes[name], shards=tyro.MISSING)
    first = name if len(recipes) > 1 else ""
    choice = f"Recipes: {', '.join(recipes)} (shown: {name}). " if len(recipes) > 1 else ""
    config = parse(TrainConfig, arguments, description=f"{description} {choice}", default=default, first=first)
    result = train(config, say)
    say(f"train: checkpoints in {result.folder}; MLflow run {result.run_id}")
    say(f"train: evaluate with python jobs/evaluate.py --run {result.name} --storage {result.folder.parent.parent}")
