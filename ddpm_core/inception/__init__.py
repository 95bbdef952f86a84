"""The FID network: Inception v3 as of 2015-12-05."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from ddpm_core.inception.network import InceptionV3

__all__ = ["InceptionV3"]
__getattr__ = lazily(__name__, InceptionV3="network")
