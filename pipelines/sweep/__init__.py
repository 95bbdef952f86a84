"""Ray Tune: the same training and evaluation over many values."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.sweep.driver import sweep

__all__ = ["sweep"]
__getattr__ = lazily(__name__, sweep="driver")
