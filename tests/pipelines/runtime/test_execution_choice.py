"""How a network is executed, by what Ray says of the cluster's GPUs."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ddpm_core.configs import Execution
from pipelines.runtime import cluster as module
from pipelines.runtime.cluster import Resources, choose_execution
from pipelines.train.config import config_for
from pipelines.train.plan import describe_plan

FAST = Execution(mode="exact", precision="bfloat16", channels_last=True, compile=True)
EXACT = Execution(mode="exact", precision="float32")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A cluster with GPUs of these kinds."""
    kinds: list[str] = request.param
    resources = {"CPU": 8.0, "GPU": float(len(kinds)), **{f"accelerator_type:{kind}": 1.0 for kind in kinds if kind}}
    monkeypatch.setattr(module, "_may_have_gpus", lambda: True)
    monkeypatch.setattr(module, "connect", lambda: Resources(cpus=8.0, gpus=resources["GPU"]))
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)


@pytest.mark.parametrize(
    ("cluster", "fast", "why"),
    [
        ([], False, "there is no GPU"),
        (["H100"], True, "GPUs H100"),
        (["A100-80G", "L40S"], True, "GPUs A100-80G, L40S"),
        (["H100", "V100"], False, "GPUs V100 are not known to multiply in bfloat16"),
        (["T4"], False, "GPUs T4 are not known to multiply in bfloat16"),
        ([""], False, "Ray does not say which GPUs there are"),
    ],
    indirect=["cluster"],
)
def test_execution_is_fast_where_all_gpus_multiply_in_bfloat16_and_it_says_so(
    cluster: None, fast: bool, why: str
) -> None:
    said: list[str] = []
    assert choose_execution(Execution(), said.append) == (FAST if fast else EXACT, why)
    assert len(said) == fast
    assert choose_execution(Execution(precision="float32"), said.append)[0].precision == "float32"


@pytest.mark.parametrize("cluster", [["H100"]], indirect=True)
def test_exact_is_what_the_options_say_on_every_gpu(cluster: None) -> None:
    for asked in (Execution(mode="exact"), Execution(mode="exact", precision="bfloat16", compile=True)):
        chosen, _ = choose_execution(asked, lambda line: None)
        assert chosen == replace(asked, precision=asked.network_precision)
        assert choose_execution(chosen, lambda line: None)[0] == chosen


def test_nothing_is_started_to_learn_that_this_machine_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(module, "connect", lambda: pytest.fail("Ray was started"))
    assert choose_execution(Execution(), lambda line: None) == (EXACT, "there is no GPU")


def test_a_ray_that_was_started_on_this_machine_is_asked_for_its_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray._private.utils import read_ray_address, write_ray_address

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "ray").mkdir()
    write_ray_address("10.0.0.1:6379", str(tmp_path / "ray"))
    assert read_ray_address() == "10.0.0.1:6379"  # as Ray finds it
    monkeypatch.setattr(module, "connect", lambda: Resources(cpus=8.0, gpus=1.0))
    monkeypatch.setattr(module, "gpu_kinds", lambda: ["H100"])
    assert choose_execution(Execution(), lambda line: None)[0].precision == "bfloat16"


@pytest.mark.parametrize("cluster", [[]], indirect=True)
def test_a_choice_keeps_the_name_of_a_run_without_gpus(cluster: None) -> None:
    """Its identity is that of before there was a choice."""
    chosen, _ = choose_execution(Execution(), lambda line: None)
    assert Execution().identity() == chosen.identity() == {}
    assert FAST.identity() == {"precision": "bfloat16"}
    assert set(asdict(chosen)) == set(asdict(Execution()))


def test_a_plan_is_of_what_the_gpu_would_be_given() -> None:
    auto = describe_plan(config_for("tiny", shards="shards"), "A100", 0.3)
    assert "data sheet's for A100 in bfloat16" in auto
    exact = config_for("tiny", shards="shards", execution=Execution(mode="exact"))
    assert "data sheet's for A100 in TF32" in describe_plan(exact, "A100", 0.3)
