"""A scheduler of diffusers is taken for the process it is, or refused by the key that makes it another."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: nothing is fetched

import diffusers
import pytest
import torch

from ddpm_core.configs import DiffusionConfig
from ddpm_core.errors import InputError
from pipelines.checkpoints.foreign import CLASSES, FIXED, HONOURED, SAMPLING, scheduler_of

# scheduler_config.json of google/ddpm-cifar10-32 as published.
PUBLISHED: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "timestep_values": None,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


def read(folder: Path, values: Any) -> DiffusionConfig:
    (folder / "scheduler_config.json").write_text(json.dumps(values))
    return scheduler_of(folder)


def test_the_published_scheduler_is_the_papers_process(tmp_path: Path) -> None:
    assert read(tmp_path, PUBLISHED) == DiffusionConfig()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_scheduler_as_diffusers_saves_it_is_its_betas_here(name: str, tmp_path: Path) -> None:
    if not hasattr(diffusers, name) or name == "DPMSolverSDEScheduler":  # that one asks for another library
        pytest.skip(f"this diffusers has no {name}")
    values: dict[str, Any] = {"beta_schedule": "scaled_linear", "num_train_timesteps": 500, "beta_end": 0.03}
    if name == "HeunDiscreteScheduler":
        values["clip_sample"] = True  # which it alone does not by default
    scheduler = getattr(diffusers, name)(**values)
    scheduler.save_pretrained(tmp_path)
    torch.testing.assert_close(
        scheduler_of(tmp_path).betas().float(), torch.as_tensor(scheduler.betas).float(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_key_of_a_scheduler_is_honoured_or_known_or_refused_by_name(name: str, tmp_path: Path) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    keys = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self", "kwargs"}
    for key in sorted(keys - HONOURED - SAMPLING):
        with pytest.raises(InputError, match=rf"has {key} = 'another', which has no counterpart here"):
            read(tmp_path, {"_class_name": name, key: "another"})
    assert not (HONOURED & SAMPLING | HONOURED & FIXED.keys() | SAMPLING & FIXED.keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr = True, which has no counterpart here"),
        ({"trained_betas": [0.1, 0.2]}, r"has trained_betas = \[0.1, 0.2\]"),
        ({"clip_sample": False}, "has clip_sample = False"),
        ({"clip_sample_range": 2.0}, "has clip_sample_range = 2.0"),
        ({"thresholding": True}, "has thresholding = True"),
        ({"beta_schedule": "sigmoid"}, "has beta_schedule = 'sigmoid'"),
        ({"beta_start": None}, "has beta_start = None"),
        ({"beta_end": [0.02]}, r"has beta_end = \[0.02\]"),
        ({"num_train_timesteps": 10.5}, "has num_train_timesteps = 10.5"),
        ({"num_train_timesteps": 0}, "num_timesteps is 0"),
        ({"prediction_type": "flow"}, "has prediction_type = 'flow'"),
        ({"predict_epsilon": False}, "has predict_epsilon = False"),
        ({"variance_type": "learned_range"}, "has variance_type = 'learned_range'"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "has _class_name = 'ScoreSdeVeScheduler'"),
        ({"_class_name": None}, "has _class_name = None"),
        ({"zeta_scale": 3}, "has zeta_scale = 3"),
    ],
)
def test_a_value_of_another_process_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, PUBLISHED | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"timestep_spacing": "trailing", "steps_offset": 1},  # --spacing decides
        {"rescale_betas_zero_snr": False, "thresholding": False, "clip_sample_range": 1.0, "sample_max_value": 5.0},
        {"_name_or_path": "/somewhere"},
    ],
)
def test_what_is_without_effect_here_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, PUBLISHED | changes) == DiffusionConfig()


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '"DDPMScheduler"'])
def test_a_damaged_scheduler_is_refused_in_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text(content)
    with pytest.raises(InputError, match=r"is damaged \(.*\): fetch it again$"):
        scheduler_of(tmp_path)
