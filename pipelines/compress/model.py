"""A checkpoint as a codec."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.codec import Codec
from ddpm_core.codec.format import model_digest
from ddpm_core.errors import InputError
from ddpm_core.unet import UNet
from pipelines.checkpoints.select import find_checkpoints
from pipelines.compress.config import ModelConfig
from pipelines.runtime.layout import Run, local_storage
from pipelines.tracking.uri import tracking_uri


class Model(NamedTuple):
    """A checkpoint of a run as a codec, and its network, which computes in float64."""

    run: Run[Path]
    checkpoint: Checkpoint
    codec: Codec
    network: UNet


def load_model(config: ModelConfig) -> Model:
    """The model that a configuration names. Raises InputError if it names no checkpoint, or several."""
    storage = local_storage(config.storage)
    run, chosen = find_checkpoints(config.run, config.checkpoint, storage, tracking_uri(config, storage))
    if len(chosen) != 1:
        raise InputError(
            f"--checkpoint {config.checkpoint} of run {run.name!r} is {len(chosen)} checkpoints: give one step"
        )
    checkpoint, unet = chosen[0], chosen[0].unet_config()
    network = UNet(unet)
    network.load_state_dict(checkpoint.weights(config.weights))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device, torch.float64).eval()
    process = checkpoint.diffusion_config()
    facts = [json.dumps(asdict(each), sort_keys=True) for each in (unet, process)]
    digest = model_digest(checkpoint.weights_sha256(config.weights), *facts)
    shape = (unet.in_channels, unet.image_size, unet.image_size)
    return Model(run, checkpoint, Codec(process.build().to(device), network, shape, digest), network)
