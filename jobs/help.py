"""The help of a command, grouped by what people look for: tyro groups by configuration classes."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tyro._backends import (
    _tyro_help_formatting,
)  # the only place where it makes groups; pyproject.toml pins the version

# The ten of these that come first in a command's help are shown before all others.
COMMON = """
source shards train.shards run data files output image-size channels config storage train.storage experiment checkpoints samples
evaluate.samples steps train.steps seeds schedules grid draw workers train.workers hours optim.batch-size optim.lr sampler
sampler-steps extractor evaluate.extractor execution.precision weights format dry-run save-config seed name split images model
"""
FIRST = 10
GROUPS = {
    "data": """source split name channels image-size filter images-per-shard undecodable max-pixels too-small
        duplicates max-skipped shards data test-data reference test-reference images files run checkpoints checkpoint weights
        images-seed horizontal-flip shuffle-window""",
    "training": "model steps trials seed seeds rungs rung-samples schedules matched grid draw draws sample-every max-failures",
    "measuring": """extractor samples sampler sampler-steps eta etas ema-length lengths var-type spacing precision noise report
        progress strata cdf neighbours theory-steps worse-by quiet-hours attempts alarm-command hours gpu-hours
        across-protocols""",
    "hardware": """workers train-workers min-workers cpus cpus-per-worker batch-size chunk-size mode compile channels-last gpu
        utilisation bandwidth stragglers loss-hours""",
    "output": """output storage format checkpoint-every keep-last keep-every pictures nearest partial frames config save-config
        dry-run open watts json""",
    "tracking": "tracking-uri experiment log-every",
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
ORDER = ["common", *GROUPS]


@contextlib.contextmanager
def grouped() -> Iterator[None]:
    """Within the block tyro's help has these groups."""
    made = _tyro_help_formatting.format_help

    def format_help(*, args: Sequence[Any], **others: Any) -> list[str]:
        return made(args=arranged(args), **others)

    _tyro_help_formatting.format_help = format_help  # type: ignore[assignment]
    try:
        yield
    finally:
        _tyro_help_formatting.format_help = made


def arranged(arguments: Sequence[Any]) -> list[Any]:
    """The options in the order of their groups, each as if it came from a class of the group's name."""
    names = [name_of(argument.arg) for argument in arguments]
    common = [name for name in COMMON.split() if name in names][:FIRST]
    places = []
    for name, argument in zip(names, arguments, strict=True):
        nested = argument.source_parser.extern_prefix
        group = "common" if name in common else "" if nested else GROUP_OF.get(name, "")
        # Of nested classes, each is a group of its own, after the others.
        rank = (ORDER.index(group) if group else len(ORDER), common.index(name) if name in common else 0)
        if group:
            argument = replace(
                argument, source_parser=replace(argument.source_parser, extern_prefix=group, description="")
            )
        places.append((rank, argument))
    return [argument for _, argument in sorted(places, key=lambda place: place[0])]


def name_of(argument: Any) -> str:
    """An option's name without dashes; of several, such as --model/--run, the last, which is the field's own."""
    return str(argument.display_name()).rpartition("/")[2].lstrip("-").removeprefix("options.")
