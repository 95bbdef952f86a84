"""What protocols record of a feature extractor, for those that are known without their network; features.py has the networks."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ddpm_core.commit import sha256_file
from ddpm_core.inception.weights import CLASSES, FEATURES, WEIGHTS_SHA256_PREFIX, find_inception_weights
from ddpm_core.protocol import INCEPTION

PIXELS_SHA256 = hashlib.sha256(b"pixels v1: area-averaged to 8x8, channels first, float32, / 255").hexdigest()
RGB_OR_GREY = (1, 3)  # the channels that networks of photographs take


@dataclass(frozen=True)
class ExtractorFacts:
    """name: in metric names. sha256: of the weights, or of what stands for them. dim, num_logits: of the outputs, no logits if
    None. resize: that which is part of the map, in words."""

    name: str
    sha256: str
    dim: int
    num_logits: int | None
    resize: str


def pixels_facts(channels: int) -> ExtractorFacts:
    """Those of the image itself, averaged to 8x8."""
    return ExtractorFacts("pixels", PIXELS_SHA256, channels * 64, None, "area-8")


def inception_facts(path: Path) -> ExtractorFacts:
    """Those of the FID network with the weights of a file, which is named after its own sha256 if it is not the published one."""
    sha256 = sha256_file(path)
    name = INCEPTION if sha256.startswith(WEIGHTS_SHA256_PREFIX) else f"inception_{sha256[:8]}"
    return ExtractorFacts(name, sha256, FEATURES, CLASSES, "tf1-bilinear-299")


def known_facts(spec: str, channels: int) -> ExtractorFacts | None:
    """Those of an extractor for images of so many channels; None if it has to be loaded to be known, or to be tried: any file
    but the published one of the FID network. Raises InputError if that is not to be had."""
    if spec == "pixels":
        return pixels_facts(channels)
    if spec == "inception" and channels in RGB_OR_GREY:
        facts = inception_facts(find_inception_weights())
        return facts if facts.name == INCEPTION else None
    return None
