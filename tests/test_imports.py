"""What a process loads: a command line explains itself, and a preprocessing worker works, without what they do not use."""

import contextlib
import ctypes
from pathlib import Path

import pytest
from support.imports import loaded, loaded_by_job
from support.processes import ROOT

HEAVY = ("torch", "ray", "mlflow")
JOBS = sorted(
    path.name
    for path in (ROOT / "jobs").glob("*.py")
    if path.name not in ("__init__.py", "cli.py", "help.py", "training.py")
)
WORDS = {"train_lsun.py": ["tiny"], "sweep.py": ["schedules", "tiny"]}  # what stands before --help, to see all options


@pytest.mark.parametrize("job", JOBS)
def test_help_of_a_job_loads_neither_torch_nor_ray_nor_mlflow(job: str) -> None:
    assert not loaded_by_job(job, *WORDS.get(job, []), "--help") & set(HEAVY)


def test_a_plan_of_a_training_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    assert not loaded_by_job("train_cifar10.py", "--shards", "x", "--dry-run") & set(HEAVY)


def test_preprocessing_loads_ray_torch_and_pandas_only_to_make_something() -> None:
    assert not loaded("import pipelines.preprocess.driver") & {*HEAVY, "pandas"}


@pytest.mark.parametrize("module", ["train.session", "evaluate.driver", "likelihood.driver", "nightly.driver"])
def test_what_is_done_is_looked_for_without_what_trains_samples_and_measures(module: str) -> None:
    modules = loaded(f"import pipelines.{module}")
    assert "mlflow" in modules
    assert not modules & {"torch", "ray", "torchmetrics", "matplotlib"}


@pytest.mark.parametrize("stage", ["train", "sweep"])
def test_shards_are_checked_before_mlflow_is_loaded_too(stage: str) -> None:
    modules = loaded(f"import pipelines.{stage}.driver")
    assert "pyarrow" in modules
    assert not modules & {*HEAVY, "pandas"}


def test_that_this_machine_has_no_gpu_is_known_without_torch_and_ray(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has the driver of a GPU")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where no Ray has left its address
    choose = "from pipelines.runtime.cluster import choose_execution; choose_execution(Execution(), print)"
    assert not loaded(f"from ddpm_core.configs import Execution; {choose}") & {"torch", "ray"}


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
