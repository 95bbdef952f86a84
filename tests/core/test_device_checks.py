"""The checks that tests/gpu makes of a GPU, made of the CPU, where they hold too: so they still run when a GPU is there."""

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
        device_checks.check_several_networks_go_through_one_compiled_graph(CPU, "eager")


@pytest.mark.slow
def test_a_deterministic_training_resumes_bit_for_bit_on_the_cpu(tmp_path: Path) -> None:
    device_checks.check_a_resumed_training_is_the_undisturbed_one(CPU, tmp_path)
