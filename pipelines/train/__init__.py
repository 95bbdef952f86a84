"""Ray Train: shards to checkpoints."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.train.driver import train

__all__ = ["train"]
__getattr__ = lazily(__name__, train="driver")
