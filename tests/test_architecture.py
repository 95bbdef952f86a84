"""The house rules that a program can check: who may import whom, and how things are called."""

import ast
import zipfile
from pathlib import Path

import pytest

from ddpm_core import records

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


# package or module: what it stands on. As drawn in the packages' pages.
STAGE = {"runtime", "tracking", "shards", "checkpoints"}
LAYERS: dict[str, dict[str, set[str]]] = {
    "pipelines": {
        "storage": set(),
        "runtime": {"storage"},
        "tracking": {"runtime"},
        "shards": {"runtime"},
        "preprocess": {"runtime", "shards"},
        "demo": {"runtime", "shards"},
        "checkpoints": {"runtime", "tracking"},
        "train": STAGE,
        "evaluate": STAGE,
        "likelihood": STAGE,
        "compress": STAGE,
        "sweep": {"train", "evaluate", "shards"},
        "nightly": {"evaluate", "checkpoints"},
        "plan": {"preprocess", "train", "nightly"},
    },
    "reports": {
        "formatting": set(),
        "records": set(),
        "verdicts": {"records", "formatting"},
        "drawing": {"verdicts"},
        "sections": {"drawing"},
        "summary": {"sections"},
        "build": {"sections", "summary"},
    },
}


def modules(path: Path) -> set[str]:
    """The modules that a module names, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    """The top-level packages a module names."""
    return {name.split(".")[0] for name in modules(path)}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_only_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = imported(path)
    assert names & PACKAGES <= ALLOWED[package]
    assert not names & FORBIDDEN[package]


@pytest.mark.parametrize("top", LAYERS)
def test_packages_import_only_those_below_them(top: str) -> None:
    """As drawn: each package's own arrows, and those of what it stands on."""
    drawn = LAYERS[top]
    for name, below in below_each(drawn).items():
        assert name not in below, f"{top}/{name} stands on itself"
        for path in [*(ROOT / top / name).rglob("*.py"), *(ROOT / top).glob(f"{name}.py")]:
            used = {module.split(".")[1] for module in modules(path) if module.startswith(f"{top}.")}
            assert used <= {name, *below}, named(path)
    packages = {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
    assert packages | {path.stem for path in (ROOT / top).glob("[!_]*.py")} == set(drawn)


def below_each(drawn: dict[str, set[str]]) -> dict[str, set[str]]:
    """Every package with all that it stands on, at whatever depth."""
    below = {package: set(direct) for package, direct in drawn.items()}
    for _ in drawn:
        below = {package: direct.union(*(below[other] for other in direct)) for package, direct in below.items()}
    return below


def test_no_package_is_too_large_to_see_at_once() -> None:
    sizes = {str(path.parent.relative_to(ROOT)) for path in FILES if len(list(path.parent.glob("[!_]*.py"))) > 12}
    assert sizes <= {"ddpm_core", "jobs"}


def test_no_public_class_name_is_given_twice() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(named(path))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_only_tracking_talks_to_mlflow() -> None:
    users = {named(path) for path in FILES if "mlflow" in imported(path) and "reports" not in path.parts}
    assert users
    assert all(name.startswith("pipelines/tracking/") for name in users)


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


def strings(path: Path) -> list[str]:
    """A module's strings, parts of f-strings among them, without docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


# Names in MLflow, but for metrics and kinds that are plain words: those have other uses too.
NAMES = {value for name, value in vars(records).items() if name.isupper() and not value.isalpha()}
PARTS = {end for end in NAMES if end.startswith("_")} | {
    path.format(0).partition("/")[0] + "/"
    for path in (
        records.samples_path(0), records.chain_path(0), records.neighbours_path(0), records.pictures_path(0),
        records.likelihood_path(0), records.rung_path(0), records.training_samples_path(0),
    )
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [path for path in FILES if named(path).startswith(("pipelines/", "reports/"))], ids=named
)
def test_names_in_mlflow_are_written_in_one_place(path: Path) -> None:
    texts = strings(path)
    assert not NAMES & set(texts)
    assert not [text for text in texts for part in PARTS if part in text]


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
