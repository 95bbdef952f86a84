"""The pages stay true: commands, options, packages, examples."""

import importlib
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.commands import run_job
from support.pages import missing, shown_output

import jobs.cli
import jobs.training
from jobs.training import TrainCommand
from pipelines.runtime.recipe import write_recipe
from pipelines.storage.locations import location
from pipelines.train.config import config_for

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
NAMES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"{name}/README.md" for name in ("ddpm_core", "jobs", "pipelines", "reports")),
]
PAGES = {name: (ROOT / name).read_text() for name in NAMES if (ROOT / name).is_file()}
TEXT = "\n".join(PAGES.values())
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands() -> list[str]:
    """The job command lines in the pages, continuation lines joined; one that another holds stands for itself besides."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]*python jobs/[^`\n]+)`", TEXT)
    return [line[start.end() :] for line in lines for start in re.finditer(r"python (?=jobs/)", line)]


def test_every_make_target_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "ui"} <= named <= TARGETS


@pytest.mark.parametrize("command", [line for line in commands() if "NAME" not in line])
def test_every_command_is_one_that_the_job_understands(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own parser takes it, up to where the work would start."""
    parse, parsed = jobs.cli.parse, []

    def parse_and_stop(*args: Any, **kwargs: Any) -> NoReturn:
        parsed.append(parse(*args, **kwargs))
        sys.exit(0)

    for module in (jobs.cli, jobs.training):
        monkeypatch.setattr(module, "parse", parse_and_stop)
    job, *words = shlex.split(command.replace("/shared/", f"{tmp_path}/"), comments=True)
    monkeypatch.chdir(tmp_path)
    if "--config" in words:
        file = tmp_path / words[words.index("--config") + 1]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_recipe(
            location(str(file), option="--config"),
            TrainCommand(config=config_for("lsun_church", shards="x")),
            title="church",
        )
    monkeypatch.setattr(sys, "argv", [str(ROOT / job), *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / job), run_name="__main__")
    assert not stop.value.code, capsys.readouterr().err
    assert parsed


def test_the_output_of_preprocessing_is_what_it_prints(
    ray_session: None,
    digits_lmdb: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of what takes longer, the test of the whole demo does the same."""
    shown = next(lines for lines in shown_output("jobs/README.md") if lines[0].startswith("preprocess: "))
    places = ["--source", str(digits_lmdb), "--output", str(tmp_path / "digits")]
    size = ["--image-size", "8", "--channels", "1", "--name", "digits"]
    assert run_job(monkeypatch, "preprocess.py", *places, *size) == 0
    assert missing(shown, capsys.readouterr().out) == []


def test_every_option_in_the_text_exists() -> None:
    sources = "".join(
        path.read_text() for folder in ("jobs", "pipelines", "ddpm_core") for path in (ROOT / folder).rglob("*.py")
    )
    for option in set(re.findall(r"`--([a-z.-]+)", TEXT)) - {"help"}:
        field = option.split(".")[-1].replace("-", "_")
        assert f"    {field}: " in sources, option
    assert os.path.exists(ROOT / "reports" / "example.png")


def test_every_package_of_the_pipelines_is_on_their_page() -> None:
    named = re.findall(r"^\| `([a-z]+)/` \|", PAGES["pipelines/README.md"], re.MULTILINE)
    assert sorted(named) == sorted(path.parent.name for path in (ROOT / "pipelines").glob("*/__init__.py"))


def test_every_file_that_a_page_links_to_exists() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1100


def test_the_python_example_runs_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = "assert images.shape == (2, 3, 32, 32) and images.isfinite().all()"
    subprocess.run(
        [sys.executable, "-c", f"{example}\n{check}"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_the_training_step_on_ddpm_cores_page_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGES["ddpm_core/README.md"], re.DOTALL)
    values: dict[str, Any] = {}
    exec(example, values)
    assert values["state"].step == 1
    assert values["metrics"].loss.isfinite()


def test_every_module_of_ddpm_core_is_on_its_page() -> None:
    modules = PAGES["ddpm_core/README.md"].split("## What is in it")[1].split("##")[0]
    named = {name.rstrip("/") for name in re.findall(r"`([a-z0-9_]+/?)`", modules)}
    assert named == {path.stem for path in (ROOT / "ddpm_core").iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    }


def test_every_job_is_in_the_table() -> None:
    jobs = {path.name for path in (ROOT / "jobs").glob("*.py")} - {"__init__.py", "cli.py", "help.py", "training.py"}
    assert jobs == set(re.findall(r"`jobs/([a-z0-9_]+\.py)`", PAGES["jobs/README.md"]))


def test_documents_name_no_machine() -> None:
    for name, text in {**PAGES, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text()}.items():
        assert not re.search(r"/(work|root|home|tmp)/", text), name


def table() -> list[tuple[str, str, str]]:
    """(paper, symbol, test) of each row of the table in ddpm_core's page."""
    text = PAGES["ddpm_core/README.md"].split("## From the paper")[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "`" in line]
    return [(paper, code.strip("`"), proof.strip("`")) for paper, _, code, proof in rows]


@pytest.mark.parametrize(("paper", "symbol", "proof"), table())
def test_the_paper_leads_to_the_line_and_to_the_test_that_proves_it(paper: str, symbol: str, proof: str) -> None:
    module, *path = symbol.split(".")
    thing = importlib.import_module(f"ddpm_core.{module}")
    for name in path:
        thing = getattr(thing, name)
    # The source of the thing names the equation, or, for a whole module's subject, the module's first lines do.
    source = inspect.getsource(thing) + (sys.modules[f"ddpm_core.{module}"].__doc__ or "")
    assert re.search(rf"\b{re.escape(paper)}\b", source), f"{symbol} does not name {paper}"
    file, *test = proof.split(".")
    (tests,) = (path.read_text() for path in (ROOT / "tests" / "core").rglob(f"{file}.py"))
    assert f"def {test[0]}(" in tests if test else "def test_" in tests


def test_the_table_has_every_equation_that_is_computed() -> None:
    assert {"Eq. 4", "Eq. 5", "Eq. 7", "Eq. 11", "Eq. 12", "Eq. 13", "Eq. 14", "Eq. 15"} <= {row[0] for row in table()}
