"""Recipe files: what is saved gives the same options again, options that are given win, and what is wrong is one sentence."""

import importlib
import inspect
import pkgutil
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from support.commands import run_job
from support.job_options import COMMANDS, leaves, options

import pipelines
from ddpm_core.errors import InputError
from ddpm_core.ranges import Range, Text
from jobs.cli import MISSING, parse
from jobs.training import TrainCommand
from pipelines.evaluate.config import EvaluateConfig
from pipelines.sweep.config import SweepConfig
from pipelines.train.config import config_for

WRITING = ("sole_writer(", "to_write=True", "check_writable(")  # what a module calls before it writes to a folder
WITHOUT_RECIPE = {
    "preprocess": "a data set's bytes do not depend on where it lies",
    "export_checkpoint": "its folder has the layout of another program",
    "calibrate": "writes one file",
}
# Beside what its type says.
PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
TEXTS = PLAIN.filter(lambda text: text.strip() and text != "None")


def default_of(config: Any) -> dict[str, Any]:
    """What a job starts from, if it is more than the configuration's own defaults."""
    train = config_for("tiny", shards=MISSING)
    if config is TrainCommand:
        return {"default": TrainCommand(config=train)}
    if issubclass(config, SweepConfig):
        return {"default": config(train=train, evaluate=EvaluateConfig(run="(each trial's)"))}
    return {}


def words(hint: Any) -> st.SearchStrategy[list[str]]:
    """What may stand on a command line for an option of a type that is no bool."""
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(inner) is tuple:
        each = words(get_args(inner)[0])
        if get_args(inner)[-1] is Ellipsis:
            return st.lists(each, min_size=1, max_size=3).map(lambda parts: list(chain.from_iterable(parts)))
        return st.lists(each, min_size=len(get_args(inner)), max_size=len(get_args(inner))).map(
            lambda parts: list(chain.from_iterable(parts))
        )
    strategies = [one_word(*leaf) for leaf in leaves(hint)]
    if "None" in str(hint):
        strategies.append(st.just("None"))
    return st.one_of(strategies).map(lambda word: [word])


def one_word(plain: Any, within: Range | Text | None) -> st.SearchStrategy[str]:
    if get_origin(plain) is Literal:
        return st.sampled_from(get_args(plain)).map(str)
    if plain is int:
        assert isinstance(within, Range)
        return st.integers(int(max(within.low, 0)) + within.above, int(min(within.high, 10_000))).map(str)
    if plain is float:
        assert isinstance(within, Range)
        low, high = max(within.low, 0.0), min(within.high, 1e6)
        return st.floats(low, high, exclude_min=within.above, exclude_max=within.below).map(repr)
    return TEXTS.filter(lambda text: not text.startswith("-"))


def chosen(config: Any) -> st.SearchStrategy[list[str]]:
    """Some options of a command with values."""

    def option(name: str, hint: Any) -> st.SearchStrategy[list[str]]:
        dashed = name.replace("_", "-")
        if hint is bool:
            table, dot, last = dashed.rpartition(".")
            return st.sampled_from([[f"--{dashed}"], [f"--{table}{dot}no-{last}"]])
        return words(hint).map(lambda parts: [f"--{dashed}", *parts])

    every = [option(name, hint) for name, hint in options(config) if name != "dry_run"]
    return (
        st.lists(st.sampled_from(every), max_size=6)
        .flatmap(lambda some: st.tuples(*some))
        .map(lambda parts: list(chain.from_iterable(parts)))
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_saved_recipe_gives_all_options_again(command: str, tmp_path: Path) -> None:
    config, needed = COMMANDS[command], shlex.split(command)[1:]
    while needed and not needed[0].startswith("-") and config.__name__ != "ExportConfig":
        needed.pop(0)  # the words before the options
    file = tmp_path / "recipe.toml"
    default = default_of(config)

    @settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(chosen(config))
    def check(given_options: list[str]) -> None:
        try:
            saved = parse(config, [*needed, *given_options, f"--save-config={file}"], description="", **default)
        except InputError:  # values that do not go together
            assume(False)
        assert parse(config, ["--config", str(file)], description="", **default) == saved

    check()


def test_options_on_the_command_line_win(tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text('shards = "a"\nsteps = 5\nhorizontal_flip = true\nkeep-every = "None"\n[unet]\nch-mult = [1, 1]\n')
    arguments = ["--config", str(file), "--steps", "7", "--no-horizontal-flip", "--unet.ch-mult", "2"]
    command = parse(TrainCommand, arguments, description="", **default_of(TrainCommand))
    config = command.config
    assert (config.shards, config.steps, config.horizontal_flip, config.keep_every) == ("a", 7, False, None)
    assert config.unet.ch_mult == (2,)


def test_a_positional_argument_may_stand_in_the_file(tmp_path: Path) -> None:
    from pipelines.checkpoints.config import ExportConfig

    file = tmp_path / "export.toml"
    file.write_text('run = "one"\noutput = "out"\n')
    assert parse(ExportConfig, [f"--config={file}"], description="").run == "one"
    assert parse(ExportConfig, ["two", f"--config={file}"], description="").run == "two"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('shard = "a"', "has the key 'shard', which is no option here (did you mean shards?)"),
        (
            "[unet]\nchannels = 3",
            "has the key 'unet.channels', which is no option here (did you mean unet.in-channels?)",
        ),
        ('steps = "many"', "has steps = 'many': give a whole number"),
        ("steps = 1.5", "has steps = 1.5: give a whole number"),
        ("steps = true", "has steps = True: give a whole number"),
        ("shards = 5", "has shards = 5: give a text in quotes"),
        ("horizontal-flip = 1", "has horizontal-flip = 1: give true or false"),
        ("keep-every = [1]", 'has keep-every = [1]: give a whole number or "None"'),
        ("[unet]\nch-mult = 1", "has unet.ch-mult = 1: give a list, each a whole number"),
        ("[steps]\nx = 1", "has the key 'steps.x', which is no option here"),
        ("steps = 0", "--steps is 0: give a positive number (with 'recipe.toml')"),
        ('[diffusion]\nschedule = "lineer"', "--diffusion.schedule is 'lineer' (did you mean linear?): give one of"),
        ("steps", "which is no TOML"),
        ('preset = "lsun_church"', "has preset = 'lsun_church', but the recipe here is tiny"),
        ('config = "other.toml"', "has the key 'config', which is no option here"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence_with_file_and_key(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(text)
    assert run_job(monkeypatch, "train_lsun.py", "tiny", "--shards", "x", "--dry-run", "--config", "recipe.toml") == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "recipe.toml" in captured.err
    assert (captured.err.startswith("error: "), captured.err.count("\n"), captured.out) == (True, 1, "")


def test_a_file_names_the_recipe_too_and_a_dry_run_is_not_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = []
    for arguments in ("tiny --shards x --seed 5 --save-config tiny.toml", "--config tiny.toml"):
        assert run_job(monkeypatch, "train_lsun.py", *arguments.split(), "--dry-run") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "dry-run" not in tomllib.loads(Path("tiny.toml").read_text())


def test_a_path_that_is_not_utf_8_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/train_lsun.py"])
    arguments = ["--shards", "a\udcff", "--save-config", str(tmp_path / "x.toml")]
    with pytest.raises(InputError, match="which is not UTF-8"):
        parse(TrainCommand, arguments, description="", **default_of(TrainCommand))
    assert not list(tmp_path.iterdir())


def source_with_callees(function: Any) -> str:
    """The source of a function and of what it names in its module, or imports from its package's session, and so on."""
    places, sources = [(function.__module__, function.__name__)], dict[tuple[str, str], str]()
    while places:
        place = places.pop()
        module = importlib.import_module(place[0])
        source = sources[place] = inspect.getsource(getattr(module, place[1]))
        later = re.findall(r"from (pipelines\.\w+\.session) import (\w+)", source)
        own = [(place[0], name) for name in {*re.findall(r"\w+", source)} if defines(module, name)]
        places += {*own, *later} - {*sources}
    return "".join(sources.values())


def defines(module: ModuleType, name: str) -> bool:
    thing = getattr(module, name, None)
    return (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == module.__name__


def writing_jobs() -> Iterator[tuple[str, str]]:
    """(name, source) of every public function of the pipelines that takes a job's options and writes to a folder."""
    for package in pkgutil.iter_modules(pipelines.__path__):
        public = importlib.import_module(f"pipelines.{package.name}")
        for name in getattr(public, "__all__", ()):
            function = getattr(public, name)
            # What takes a result too, such as the delivery of alarms, is for after the job.
            if inspect.isfunction(function) and {*inspect.signature(function).parameters} & {"config", "result"} == {
                "config"
            }:
                source = source_with_callees(function)
                if any(call in source for call in WRITING):
                    yield name, source


def test_every_job_that_writes_a_folder_keeps_its_recipe_there() -> None:
    """What is in the recipes is tested with each job."""
    jobs = dict(writing_jobs())
    assert {"train", "evaluate", "encode_files"} <= {*jobs}
    assert {name for name, source in jobs.items() if "keep_recipe(" not in source} == {*WITHOUT_RECIPE}
