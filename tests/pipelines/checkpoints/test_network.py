"""The process that a checkpoint's network is sampled with."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.training import NETWORK, OPTIM

from ddpm_core.checkpoint import Checkpoint, snapshot, write_checkpoint
from ddpm_core.configs import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.training import TrainState
from ddpm_core.unet import UNet
from pipelines.checkpoints.process import process_of


def checkpoint_of(process: DiffusionConfig, folder: Path) -> Checkpoint:
    network = replace(NETWORK, out_channels=2 if "learned" in process.var_type else 1)
    config = {"unet": asdict(network), "diffusion": asdict(process)}
    return write_checkpoint(folder / "run", snapshot(TrainState(UNet(network), OPTIM)), config)


def test_a_fixed_variance_can_be_replaced_and_a_learned_one_not(tmp_path: Path) -> None:
    large = DiffusionConfig(num_timesteps=10)
    fixed = checkpoint_of(large, tmp_path / "fixed")
    assert process_of(fixed) == process_of(fixed, "fixedlarge") == large
    assert process_of(fixed, "fixedsmall") == replace(large, var_type="fixedsmall")
    learned = checkpoint_of(replace(large, var_type="learned_range", loss_type="hybrid"), tmp_path / "learned")
    assert process_of(learned).var_type == "learned_range"
    with pytest.raises(InputError, match=r"--var-type is fixedsmall, but the network of .* has learned its variance"):
        process_of(learned, "fixedsmall")
