"""Help by what people look for, names by how they begin, and completion as a shell asks for it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run_job
from support.job_options import COMMANDS, options
from support.processes import ROOT

from ddpm_core.errors import InputError, did_you_mean
from jobs.cli import RecipeFiles
from jobs.help import COMMON, GROUP_OF, GROUPS
from pipelines.storage.layout import by_prefix


def dashed(config: object) -> list[str]:
    return [name.replace("_", "-") for name, _ in options(config)]


EVERY = {name for config in [*COMMANDS.values(), RecipeFiles] for name in dashed(config)}


def test_every_option_is_in_one_group_and_no_group_names_another() -> None:
    assert {name for name in EVERY if "." not in name} - set(GROUP_OF) == set()
    assert set(GROUP_OF) - EVERY - {"across-protocols"} == set()  # of compare
    assert set(COMMON.split()) <= EVERY
    assert sum(len(names.split()) for names in GROUPS.values()) == len(GROUP_OF)


def boxes(text: str) -> dict[str, list[str]]:
    """The options that a help shows, by the title of their box, whichever characters that is drawn with."""
    shown: dict[str, list[str]] = {}
    for line in text.translate(str.maketrans("╭─╮│╰╯", "      ")).splitlines():
        if title := re.fullmatch(r"\s+([\w. ]*options)\s*", line):
            shown[title[1]] = []
        elif option := re.match(r"\s+(--[a-z][\w.-]*)(?=[ ,])", line):
            list(shown.values())[-1].append(option[1])
    return shown


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("train_lsun.py church", ["--shards", "--config", "--storage", "--experiment", "--steps", "--workers"]),
        (
            "evaluate.py",
            ["--model", "--config", "--storage", "--experiment", "--checkpoints", "--samples", "--workers"],
        ),
        ("preprocess.py", ["--source", "--output", "--image-size", "--channels", "--config"]),
    ],
)
def test_help_has_the_common_options_first_and_each_option_once(
    command: str, first: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, *words = command.split()
    assert run_job(monkeypatch, job, *words, "--help") == 0
    out = capsys.readouterr().out
    shown = boxes(out)
    assert list(shown)[:2] == ["options", "common options"]
    assert shown["common options"][: len(first)] == first
    assert len(shown["common options"]) <= 10
    every = [option for group in shown.values() for option in group]
    assert len(every) == len(set(every))
    config = next(value for key, value in COMMANDS.items() if key.startswith(job))
    assert [name for name in [*dashed(config), *dashed(RecipeFiles)] if not re.search(rf"--{name}[ ,]", out)] == []


def test_a_name_is_known_by_a_beginning_that_no_other_has() -> None:
    known = ["tiny-7a114954249b", "tiny-7b2200000000", "church-0123456789ab"]
    assert by_prefix("tiny-7a", known, "run") == known[0]
    assert by_prefix("7b", known, "run") == known[1]
    assert by_prefix("church-0123456789ab", known, "run") == known[2]
    assert by_prefix("bedroom", known, "run") is None
    with pytest.raises(InputError, match=r"run '7' may be tiny-7a\w+ or tiny-7b\w+: give more of its name"):
        by_prefix("7", known, "run")
    assert did_you_mean("chruch", ["church", "cat"]) == " (did you mean church?)"
    assert did_you_mean("x", ["church", "cat"]) == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate.py likelihod --run x", "likelihod is unknown (did you mean likelihood?)"),
        ("preprocess.py verfy x", "verfy is unknown (did you mean verify?)"),
        ("compress.py encod x", "'encod' is unknown (did you mean encode?)"),
        ("sweep.py schedule", "sweep 'schedule' is unknown (did you mean schedules?)"),
        ("sweep.py schedules cifar", "preset 'cifar' is unknown (did you mean cifar10?)"),
        ("train_cifar10.py --shards x --worker 8", "option --worker is unknown (did you mean --workers?)"),
        ("train_cifar10.py --shards x --dry-run --gpu H20", "--gpu is 'H20', whose peak FLOP/s are not known here"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_name(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_job(monkeypatch, *shlex.split(command)) == 2
    assert said in capsys.readouterr().err


def test_a_shell_completes_the_options_of_a_job(tmp_path: Path) -> None:
    script, job = tmp_path / "completion.bash", ROOT / "jobs" / "train_cifar10.py"
    subprocess.run([sys.executable, str(job), "--tyro-write-completion", "bash", str(script)], cwd=ROOT, check=True)
    ask = f"source {script}; COMP_WORDS=({job} --optim.l); COMP_CWORD=1; _tyro_train_cifar10_py; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--optim.lr"]
    assert "complete -F _tyro_train_cifar10_py train_cifar10.py" in script.read_text()
    assert job.stat().st_mode & 0o111  # what is completed is a command
