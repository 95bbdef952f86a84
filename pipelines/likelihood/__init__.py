"""Bits/dim, rate and distortion of a data set under checkpoints."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.likelihood.driver import measure_likelihood

__all__ = ["measure_likelihood"]
__getattr__ = lazily(__name__, measure_likelihood="driver")
