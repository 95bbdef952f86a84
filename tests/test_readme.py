"""The README and CONTRIBUTING stay true: commands, options, files."""

import importlib
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands() -> list[str]:
    """The job command lines in the README's code blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("python ")[1] for line in lines if "python jobs/" in line]


def test_every_make_target_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
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
        assert f"{option} " in out


def test_every_option_in_the_text_exists() -> None:
    import os

    sources = "".join(
        path.read_text() for folder in ("jobs", "pipelines", "ddpm_core") for path in (ROOT / folder).rglob("*.py")
    )
    for option in set(re.findall(r"`--([a-z.-]+)", README)) - {"help"}:
        field = option.split(".")[-1].replace("-", "_")
        assert f"    {field}: " in sources, option
    assert os.path.exists(ROOT / "reports" / "example.png")


def test_the_file_tree_names_every_package() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    section, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0] if line.split() else ""
        if name.endswith("/"):
            section = name if not line.startswith(" ") else section
            named.add(name if section == name else f"{section}{name}")
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for top in ("ddpm_core", "pipelines", "jobs", "reports")
        for path in (ROOT / top).rglob("__init__.py")
        if len(path.parent.relative_to(ROOT).parts) <= 2
    }
    assert named - {"tests/"} == packages


def test_every_job_is_in_the_table() -> None:
    jobs = {path.name for path in (ROOT / "jobs").glob("*.py")} - {"__init__.py", "cli.py", "training.py"}
    assert jobs == set(re.findall(r"`jobs/([a-z0-9_]+\.py)`", README))


def test_documents_name_no_machine() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text()
        assert not re.search(r"/(work|root|home|tmp)/", text), name


def table() -> list[tuple[str, str, str]]:
    """(paper, symbol, test) of each row of CONTRIBUTING's table."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## From the paper")[1]
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
