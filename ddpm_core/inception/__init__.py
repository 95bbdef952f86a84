"""The FID network: Inception v3 as of 2015-12-05."""

from ddpm_core.inception.network import InceptionV3

__all__ = ["InceptionV3"]
