"""What --dry-run prints."""

import pytest

from ddpm_core.configs import Execution
from ddpm_core.presets import PRESETS
from ddpm_core.records import flatten
from pipelines.train.config import config_for
from pipelines.train.plan import describe_plan


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_plan_has_every_option_with_its_value_beside_it(preset: str) -> None:
    config = config_for(preset, shards="shards", execution=Execution(mode="exact"))
    printed = [line.split(maxsplit=1) for line in describe_plan(config, "A100", 0.3).splitlines()]
    for name, value in flatten(config).items():
        assert [name, str(value)] in printed


def test_a_plan_says_that_its_utilisation_is_assumed_and_of_which_peak() -> None:
    text = describe_plan(config_for("cifar10", shards="shards"), "A100", 0.3)
    assert "on 1 x A100, assumed to do 30% of 312 TFLOP/s, the data sheet's for A100 in bfloat16" in text
