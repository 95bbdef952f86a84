"""The container's image: what the manifests take for granted of it, and steps that a shell understands."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.processes import ROOT

from jobs.cluster.kinds import CronJob

FILE = ROOT / "jobs" / "cluster" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest of it), lines that go on joined, comments left out."""
    text = re.sub(r"^#.*\n", "", FILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line]


def named(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def test_the_image_has_the_user_and_the_checkout_that_manifests_name() -> None:
    kind = CronJob(image="registry.internal/ddpm:1", address="http://ray:8265")
    assert named("WORKDIR") == [kind.project]
    assert named("USER") == [str(kind.user)]
    assert any(
        f"useradd --uid {kind.user} --create-home {Path(kind.project).parent.name}" in run for run in named("RUN")
    )


def test_the_image_holds_every_package_and_what_its_build_reads() -> None:
    copied = {word for rest in named("COPY") for word in rest.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= copied
    assert {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= copied
    assert all((ROOT / name).exists() for name in copied)


def test_no_index_or_registry_is_named() -> None:
    assert "://" not in FILE.read_text()
    assert named("FROM") == ["python:${PYTHON}-slim"]
    assert {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "TORCH=torch==2.13.0"} <= set(named("ARG"))
    torch = re.findall(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch == ["torch==2.13.0"]  # the same


@pytest.mark.parametrize("run", named("RUN"))
def test_each_step_is_one_that_a_shell_understands(run: str) -> None:
    subprocess.run(["sh", "-n", "-c", run], check=True)


def test_the_dependencies_that_are_installed_are_the_projects(tmp_path: Path) -> None:
    (step,) = (run for run in named("RUN") if "tomllib" in run)
    listing = shlex.split(step.split(" > ")[0])
    done = subprocess.run([sys.executable, *listing[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert done.stdout.splitlines() == project["project"]["dependencies"]


def test_extras_are_asked_for_as_pip_writes_them() -> None:
    (step,) = (run for run in named("RUN") if "EXTRAS" in run)
    asked = step.split("--editable ")[1].split(" &&")[0]
    for extras, wanted in (("", "."), ("s3", ".[s3]")):
        done = subprocess.run(
            ["sh", "-c", f"printf %s {asked}"], env={"EXTRAS": extras}, capture_output=True, text=True, check=True
        )
        assert done.stdout == wanted
