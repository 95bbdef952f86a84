"""The network of a checkpoint, on the device where a worker runs it."""

from dataclasses import replace

import torch

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.configs import LEARNED, DiffusionConfig, FixedVariance, Precision, Weights
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.errors import InputError
from ddpm_core.precision import in_precision


def process_of(checkpoint: Checkpoint, var_type: FixedVariance | None = None) -> DiffusionConfig:
    """A checkpoint's process, with the variance that is given in place of its own. Raises InputError if its network has
    learned one."""
    process = checkpoint.diffusion_config()
    if var_type is None:
        return process
    if process.var_type in LEARNED:
        raise InputError(
            f"--var-type is {var_type}, but the network of {str(checkpoint.path)!r} has learned its variance "
            f"({process.var_type}): leave it out"
        )
    return replace(process, var_type=var_type)


class NetworkHolder:
    """Holds one checkpoint's network and process at a time.

    precision: bfloat16 lets the network compute under autocast, as in training; it takes and gives float32 all the same.
    compile: torch.compile the network. var_type: in place of the checkpoint's own.
    """

    def __init__(
        self,
        weights: Weights,
        precision: Precision = "float32",
        *,
        compile: bool = False,
        var_type: FixedVariance | None = None,
    ) -> None:
        self.weights, self.precision, self.compile, self.var_type = weights, precision, compile, var_type
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._held: tuple[object, GaussianDiffusion, DenoiseFn] | None = None

    def of(self, checkpoint: Checkpoint) -> tuple[GaussianDiffusion, DenoiseFn]:
        """(process, network in eval mode). Raises InputError if the weights are damaged or gone."""
        if self._held is None or self._held[0] != checkpoint.path:
            self._held = None  # before the next is loaded: there may not be room for two
            network = checkpoint.network(self.weights).to(self.device).eval()
            if self.compile:
                network.compile(fullgraph=True)
            process = process_of(checkpoint, self.var_type).build().to(self.device)
            self._held = (checkpoint.path, process, in_precision(network, self.precision))
        return self._held[1:]
