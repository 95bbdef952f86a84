"""The network of a checkpoint, on the device where a worker runs it."""

from typing import Literal

import torch

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.unet import UNet


class NetworkHolder:
    """Holds one checkpoint's network and process at a time."""

    def __init__(self, weights: Literal["ema", "raw"]) -> None:
        self.weights = weights
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._held: tuple[object, GaussianDiffusion, UNet] | None = None

    def of(self, checkpoint: Checkpoint) -> tuple[GaussianDiffusion, UNet]:
        """(process, network in eval mode). InputError where the weights are damaged or gone."""
        if self._held is None or self._held[0] != checkpoint.path:
            self._held = None  # before the next is loaded: there may not be room for two
            network = UNet(checkpoint.unet_config())
            network.load_state_dict(checkpoint.weights(self.weights))
            network.to(self.device).eval()
            self._held = (checkpoint.path, checkpoint.diffusion_config().build().to(self.device), network)
        return self._held[1:]
