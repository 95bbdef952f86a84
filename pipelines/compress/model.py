"""A checkpoint as a codec."""

import json
from dataclasses import asdict
from typing import NamedTuple

import torch

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.codec import Codec
from ddpm_core.codec.format import model_digest
from ddpm_core.unet import UNet
from pipelines.checkpoints.select import find_checkpoint
from pipelines.compress.config import ModelConfig
from pipelines.storage.layout import Run, open_storage
from pipelines.tracking.uri import tracking_uri


class LoadedModel(NamedTuple):
    """A checkpoint as a codec, and the network in it, which computes in float64. storage: the absolute path."""

    storage: str
    run: Run
    checkpoint: Checkpoint
    codec: Codec
    network: UNet


def load_model(config: ModelConfig) -> LoadedModel:
    """The model that a configuration names. Raises InputError if it names no checkpoint, or several."""
    storage = open_storage(config.storage)
    run, checkpoint = find_checkpoint(config.run, config.checkpoint, storage, tracking_uri(config, storage))
    unet, process = checkpoint.unet_config(), checkpoint.diffusion_config()
    network = checkpoint.network(config.weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device, torch.float64).eval()  # sender and receiver must predict alike: float64 differs by about 1e-13
    configs = [json.dumps(asdict(part), sort_keys=True) for part in (unet, process)]
    digest = model_digest(checkpoint.weights_sha256(config.weights), *configs)
    shape = (unet.in_channels, unet.image_size, unet.image_size)
    return LoadedModel(
        str(storage.root), run, checkpoint, Codec(process.build().to(device), network, shape, digest), network
    )
