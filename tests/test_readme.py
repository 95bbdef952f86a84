"""The pages stay true: commands, options, packages, examples."""

import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    """The job command lines in the pages' code blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("python ")[1] for line in lines if "python jobs/" in line]


def test_every_make_target_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "ui"} <= named <= TARGETS


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_job_understands(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, *words = command.split("#")[0].split()
    recipe = [word for word in words[:1] if not word.startswith("-")]
    monkeypatch.setattr(sys, "argv", [job, *recipe, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / job), run_name="__main__")
    assert not stop.value.code
    out = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}[ ,]", out), option


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
    named = {name.rstrip("/") for name in re.findall(r"`([a-z_]+/?)`", modules)}
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
