"""Ray Data: raw images -> shards of [-1, 1] images."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.preprocess.card import describe_dataset
    from pipelines.preprocess.driver import preprocess

__all__ = ["describe_dataset", "preprocess"]
__getattr__ = lazily(__name__, describe_dataset="card", preprocess="driver")
