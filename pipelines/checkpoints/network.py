"""The network of a checkpoint, on the device where a worker runs it."""

import torch

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.configs import Precision, Weights
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.precision import in_precision


class NetworkHolder:
    """Holds one checkpoint's network and process at a time.

    precision: bfloat16 lets the network compute under autocast, as in training; it takes and gives float32 all the same.
    compile: torch.compile the network.
    """

    def __init__(self, weights: Weights, precision: Precision = "float32", *, compile: bool = False) -> None:
        self.weights, self.precision, self.compile = weights, precision, compile
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._held: tuple[object, GaussianDiffusion, DenoiseFn] | None = None

    def of(self, checkpoint: Checkpoint) -> tuple[GaussianDiffusion, DenoiseFn]:
        """(process, network in eval mode). Raises InputError if the weights are damaged or gone."""
        if self._held is None or self._held[0] != checkpoint.path:
            self._held = None  # before the next is loaded: there may not be room for two
            network = checkpoint.network(self.weights).to(self.device).eval()
            if self.compile:
                network.compile(fullgraph=True)
            process = checkpoint.diffusion_config().build().to(self.device)
            self._held = (checkpoint.path, process, in_precision(network, self.precision))
        return self._held[1:]
