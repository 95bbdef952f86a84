"""The network of a checkpoint, on the device where a worker runs it."""

from dataclasses import replace
from typing import cast

import torch
from upath import UPath

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.commit import ReadablePath
from ddpm_core.configs import FixedVariance, Precision, Weights
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.precision import compile_network, in_precision, in_slices
from ddpm_core.unet import UNet
from pipelines.checkpoints.process import process_of
from pipelines.storage.node_cache import NodeFolder

# Of the images that a network sees at once on a GPU, whatever the batch of the chain: 64 of 256x256, which need 20 GiB, and
# 4,096 of 32x32. A function of their size alone, so that a batch size names the same numbers on every GPU.
PIXELS_AT_ONCE = 1 << 22


def fetched(checkpoint: Checkpoint) -> Checkpoint:
    """The same, to be read from this node's disk: several workers of a node load it."""
    if isinstance(checkpoint.path, UPath):
        return replace(checkpoint, path=cast(ReadablePath, NodeFolder(checkpoint.path)))
    return checkpoint


class NetworkHolder:
    """Holds one checkpoint's network and process at a time. Checkpoints of one configuration go through the same network, so
    that it is compiled once.

    precision: bfloat16 lets the network compute under autocast, as in training; it takes and gives float32 all the same.
    channels_last: NHWC storage. compile: torch.compile the network. var_type: in place of the checkpoint's own.
    """

    def __init__(
        self,
        weights: Weights,
        precision: Precision = "float32",
        *,
        compile: bool = False,
        channels_last: bool = False,
        var_type: FixedVariance | None = None,
    ) -> None:
        self.weights, self.precision, self.var_type = weights, precision, var_type
        self.compile, self.channels_last = compile, channels_last
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network: UNet | None = None
        self._held: tuple[object, GaussianDiffusion, DenoiseFn] | None = None  # of the checkpoint whose weights it has

    def of(self, checkpoint: Checkpoint) -> tuple[GaussianDiffusion, DenoiseFn]:
        """(process, network in eval mode). Raises InputError if the weights are damaged or gone."""
        if self._held is None or self._held[0] != checkpoint.path:
            self._held = None
            if self._network is not None and self._network.config == checkpoint.unet_config():
                self._network.load_state_dict(fetched(checkpoint).network(self.weights).state_dict())
            else:
                self._network = None  # before the next is loaded: there may not be room for two
                self._network = self._prepare(fetched(checkpoint).network(self.weights))
            network = in_precision(self._network, self.precision)
            if self.device.type == "cuda":
                network = in_slices(network, max(1, PIXELS_AT_ONCE // self._network.config.image_size**2))
            process = process_of(checkpoint, self.var_type).build().to(self.device)
            self._held = (checkpoint.path, process, network)
        return self._held[1:]

    def _prepare(self, network: UNet) -> UNet:
        if self.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network.to(self.device).eval()
        if self.compile:
            compile_network(network)
        return network
