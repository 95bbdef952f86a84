"""Every option of every job, by its type, with values that it cannot have: generated, so that a new option is covered.

Nothing here starts Ray or reads a file: what is wrong is seen before that, or else the sentence is another.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
import ray
from support.commands import run_job
from support.job_options import COMMANDS, leaves, options

from ddpm_core.ranges import LARGEST, Range, Text
from jobs.cli import RecipeFiles

UNCHECKED = {"tracking-uri", "grid", "draw"}  # texts that are parsed, each with sentences of its own


def wrong_values(name: str, hint: Any) -> list[str]:
    """Values that an option of this type cannot have."""
    (plain, within), *_ = leaves(hint)
    if plain in (int, float):
        assert isinstance(within, Range), f"{name}: a number of a configuration says its range in its type"
        values = ["nan", "inf", "eight", str(10**26)] if plain is int else ["nan", "inf", "1e999", "eight"]
        low = within.low if within.above else within.low - 1
        return [*values, str(int(low)), *([str(int(within.high) + 1)] if within.high < LARGEST else [])]
    if get_origin(plain) is Literal:
        return ["nonsense", ""]
    if plain is str and name.rpartition(".")[2].replace("_", "-") not in UNCHECKED:
        assert isinstance(within, Text), f"{name}: a text of a configuration says in its type what it may be"
        return ["", " ", "a" * 5000]
    return []


def cases() -> Iterator[tuple[str, str, str]]:
    """(command, option, wrong value), an option of several commands once for each configuration that declares it."""
    seen = set()
    for command, config in COMMANDS.items():
        for name, hint in [*options(config), *options(RecipeFiles)]:
            declares = declaring(config, name.partition(".")[0])
            if (command, name) in seen or (declares, name) in seen:
                continue
            seen |= {(command, name), (declares, name)}
            for value in wrong_values(name, hint):
                yield command, f"--{name.replace('_', '-')}", value


def declaring(config: type, field: str) -> Any:
    """The class that a configuration has a field from; the command's own configuration if it is none of its fields, but one of
    a part that is spread out."""
    return next((each for each in config.__mro__ if field in vars(each).get("__annotations__", {})), config)


CASES = list(cases())


def test_there_are_some_hundred_cases() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("command", dict.fromkeys(command for command, _, _ in CASES))
def test_no_value_that_an_option_cannot_have_is_taken(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def init(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.chdir(tmp_path)
    job, *arguments = command.split()
    faults = []
    for _, option, value in (case for case in CASES if case[0] == command):
        code = run_job(monkeypatch, job, *arguments, option, value)
        captured = capsys.readouterr()
        one_sentence = captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
        named = option.rpartition(".")[2].lstrip("-") in captured.err.replace("_", "-")
        if code != 2 or not one_sentence or not named or list(tmp_path.iterdir()):
            faults.append(f"{option} {value!r} -> {code}: {captured.err[-300:]}{captured.out[-100:]}")
    assert not faults, "\n".join(faults)
