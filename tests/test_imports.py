"""What a process loads: a command line explains itself, and a preprocessing worker works, without what they do not use."""

import json
import subprocess
import sys

import pytest
from support.processes import ROOT

HEAVY = ("torch", "ray", "mlflow")
JOBS = sorted(
    path.name
    for path in (ROOT / "jobs").glob("*.py")
    if path.name not in ("__init__.py", "cli.py", "help.py", "training.py")
)
WORDS = {"train_lsun.py": ["tiny"], "sweep.py": ["schedules", "tiny"]}  # what stands before --help, to see all options
RUN = """
import contextlib, runpy, sys
sys.argv = {arguments!r}
with contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
LIST = "import json, sys; print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"


def loaded(code: str) -> set[str]:
    """The top-level packages that a fresh process has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LIST}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("job", JOBS)
def test_help_of_a_job_loads_neither_torch_nor_ray_nor_mlflow(job: str) -> None:
    arguments = [f"jobs/{job}", *WORDS.get(job, []), "--help"]
    run = RUN.format(arguments=arguments)
    assert not loaded(run) & set(HEAVY)


def test_a_plan_of_a_training_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    assert not loaded(RUN.format(arguments=["jobs/train_cifar10.py", "--shards", "x", "--dry-run"])) & set(HEAVY)


def test_preprocessing_loads_ray_torch_and_pandas_only_to_make_something() -> None:
    assert not loaded("import pipelines.preprocess.driver") & {*HEAVY, "pandas"}


def test_a_night_begins_without_what_measures() -> None:
    modules = loaded("import pipelines.nightly.driver")
    assert "mlflow" in modules
    assert not modules & {"torch", "ray", "torchmetrics", "matplotlib"}


def test_a_preprocessing_worker_loads_no_torch() -> None:
    modules = loaded("import pipelines.preprocess.worker")
    assert "pyarrow" in modules
    assert "torch" not in modules


def test_a_report_loads_neither_torch_nor_ray() -> None:
    modules = loaded("import reports.build")
    assert "mlflow" in modules
    assert not modules & {"torch", "ray"}


def test_the_checks_of_a_gpu_need_torch_numpy_safetensors_jaxtyping_and_pytest_alone() -> None:
    modules = loaded("import sys; sys.path.insert(0, 'tests'); import support.device_checks")
    assert "pytest" in modules
    absent = {"ray", "mlflow", "tyro", "pyarrow", "PIL", "scipy", "torchmetrics", "fsspec", "diffusers", "hypothesis"}
    assert not modules & absent
