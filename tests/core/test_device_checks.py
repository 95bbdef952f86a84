"""The checks that tests/gpu makes of a GPU, made of the CPU, where they hold too: so they still run when a GPU is there."""

import json
import runpy
from pathlib import Path

import pytest
from support import device_checks
from support.device_checks import CHECKS, CPU, EXECUTIONS
from support.gaussian_case import unchecked


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_holds_on_the_cpu(name: str) -> None:
    CHECKS[name](CPU)


@pytest.mark.parametrize("name", EXECUTIONS)
def test_ten_steps_on_the_cpu_are_those_in_float64(name: str) -> None:
    device_checks.check_ten_steps_are_the_cpus_in_float64(CPU, *EXECUTIONS[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_several_networks_go_through_one_graph_on_the_cpu() -> None:
    with unchecked():
        device_checks.check_several_networks_go_through_one_compiled_graph(
            CPU, lambda network: network.compile(fullgraph=True, backend="eager")
        )


@pytest.mark.slow
def test_a_deterministic_training_resumes_bit_for_bit_on_the_cpu(tmp_path: Path) -> None:
    device_checks.check_a_resumed_training_is_the_undisturbed_one(CPU, tmp_path)


def test_the_benchmark_of_a_gpu_runs_at_toy_size_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part leaves its numbers, in the table and in the file."""
    path = Path(__file__).parents[1] / "gpu" / "bench.py"
    with unchecked():
        runpy.run_path(str(path))["main"](["--device", "cpu", "--tiny", "--output", str(tmp_path / "bench.json")])
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [row for row in rows if "left out" in row] == []
    assert len(rows) >= 15
    shown = capsys.readouterr().out
    assert all(row["what"] in shown for row in rows)
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(value >= 0.0 for value in numbers)
        assert numbers or row["what"] == "card"
