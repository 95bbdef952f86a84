"""The FID network: Inception v3 as of 2015-12-05."""

from ddpm_core.inception.network import (
    CLASSES,
    FEATURES,
    InceptionV3,
    load_inception,
    tf1_resize_bilinear,
)

__all__ = ["CLASSES", "FEATURES", "InceptionV3", "load_inception", "tf1_resize_bilinear"]
