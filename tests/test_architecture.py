"""The house rules that a program can check: who may import whom, and how things are called."""

import ast
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ddpm_core", "pipelines", "jobs", "reports"}
# jobs -> {pipelines, reports} -> ddpm_core
ALLOWED = {
    "ddpm_core": {"ddpm_core"},
    "pipelines": {"pipelines", "ddpm_core"},
    "reports": {"reports", "ddpm_core"},
    "jobs": {"jobs", "pipelines", "reports", "ddpm_core"},
}
FORBIDDEN = {
    "ddpm_core": {"ray", "mlflow", "torchvision", "diffusers"},
    "pipelines": {"torchvision", "diffusers"},
    "reports": {"ray", "torch", "torchvision", "torchmetrics", "diffusers"},
    "jobs": {"ray", "mlflow", "torch", "torchvision", "diffusers"},
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level packages a module names, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_only_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = imported(path)
    assert names & PACKAGES <= ALLOWED[package]
    assert not names & FORBIDDEN[package]


def test_only_tracking_writes_to_mlflow() -> None:
    writers = {named(path) for path in FILES if "mlflow" in imported(path) and "reports" not in path.parts}
    assert writers == {f"pipelines/tracking/{name}.py" for name in ("client", "run", "tracker", "registry", "queries")}


def test_only_images_converts_between_pixels_and_floats() -> None:
    assert [named(path) for path in FILES if "127.5" in code_without_strings(path)] == ["ddpm_core/pixel_range.py"]


def code_without_strings(path: Path) -> str:
    """A module's numbers as Python reads them, without comments and docstrings."""
    numbers = [
        repr(node.value)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, float)
    ]
    return " ".join(numbers)


def test_no_file_has_a_name_that_says_nothing() -> None:
    python_files = [*FILES, *(ROOT / "tests").rglob("*.py")]
    assert not {path.stem for path in python_files} & {"utils", "helpers", "common"}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_print_stays_in_jobs(path: Path) -> None:
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    if path.parts[-2] != "jobs" and named(path) != "pipelines/runtime/console.py":
        assert "print" not in calls


def test_what_a_submitted_job_uploads_is_small(tmp_path: Path) -> None:
    """The working tree as it is here, with its .venv and runs: Ray leaves out what .gitignore names."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        top = {name.split("/")[0] for name in package.namelist()}
    assert {"jobs", "pipelines", "ddpm_core", "reports"} <= top
    assert not top & {".git", ".venv", "runs", "data"}
    assert (tmp_path / "package.zip").stat().st_size < 2 << 20
