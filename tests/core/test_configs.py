"""Configurations: importable without torch, refusing what does not fit, and naming a run as they always did."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.gaussian_case import unchecked

from ddpm_core.configs import DiffusionConfig, Execution, OptimConfig, UNetConfig
from ddpm_core.presets import PRESETS
from ddpm_core.protocol import fingerprint

ROOT = Path(__file__).resolve().parents[2]


def test_configurations_presets_and_protocols_load_no_torch() -> None:
    names = "configs, ddpm_core.presets, ddpm_core.protocol, ddpm_core.errors, ddpm_core.commit, ddpm_core.pixel_range"
    code = f"import sys, ddpm_core.{names}; print(*{{'torch', 'ray', 'mlflow', 'jaxtyping'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_owners_list_the_configurations_they_are_built_from() -> None:
    from ddpm_core import diffusion, training, unet

    assert (unet.UNetConfig, diffusion.DiffusionConfig) == (UNetConfig, DiffusionConfig)
    assert (training.OptimConfig, training.Execution) == (OptimConfig, Execution)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"schedule": "sigmoid"}, "schedule is 'sigmoid': it must be one of linear, quad,"),
        ({"num_timesteps": 0}, "num_timesteps is 0"),
        ({"beta_end": 1.5}, "beta_end is 1.5: give a number above 0, at most 1"),
        ({"beta_start": 0.0}, "beta_start is 0.0: give a number above 0"),
        ({"mean_type": "epsilon"}, "mean_type is 'epsilon': it must be one of eps,"),
        ({"var_type": "learned"}, "loss_type is 'mse' and var_type is 'learned'"),
        ({"loss_type": "hybrid"}, "loss_type is 'hybrid' and var_type is 'fixedlarge'"),
    ],
)
@unchecked()
def test_a_process_that_does_not_fit_together_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DiffusionConfig(**values)


@unchecked()
def test_a_beta_may_be_one_and_no_more() -> None:
    assert DiffusionConfig(beta_end=1.0).betas()[-1] == 1.0
    with pytest.raises(ValueError, match="give a number above 0, at most 1"):
        DiffusionConfig(beta_end=1.0000001)


def test_fingerprints_of_configurations_stay_what_they_were() -> None:
    """Runs, protocols and registered models are named by these: written down once, from the first version."""
    preset = PRESETS["cifar10"]
    assert fingerprint(preset.unet) == "456b21b02422"
    assert fingerprint(preset.diffusion) == "999e10df3e28"
    assert fingerprint(preset.optim) == "b2e0996f3e93"
    assert fingerprint(preset.optim.identity()) == "92f900d497c2"
    assert Execution().identity() == {}
