"""Checkpoints: saved while the training goes on, kept by a rule, found by name, exported."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.checkpoints.foreign import export_checkpoint

__all__ = ["export_checkpoint"]
__getattr__ = lazily(__name__, export_checkpoint="foreign")
