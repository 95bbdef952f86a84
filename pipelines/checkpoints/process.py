"""The process that a checkpoint is sampled by: its own, or with another variance."""

from dataclasses import replace

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.configs import LEARNED, DiffusionConfig, FixedVariance
from ddpm_core.errors import InputError


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


def other_variance(checkpoint: Checkpoint, var_type: FixedVariance | None) -> FixedVariance | None:
    """The variance that is given, None if it is the checkpoint's own. Raises InputError as `process_of` does."""
    return None if process_of(checkpoint, var_type) == checkpoint.diffusion_config() else var_type
