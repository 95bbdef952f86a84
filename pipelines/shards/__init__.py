"""The shard format, and any image of a data set by its number."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.shards.dataset import ShardedDataset

__all__ = ["ShardedDataset"]
__getattr__ = lazily(__name__, ShardedDataset="dataset")
