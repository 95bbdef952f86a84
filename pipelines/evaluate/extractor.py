"""Feature extractors: what is known of them, and where they are loaded from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpm_core.errors import InputError, one_line
from ddpm_core.extractors import ExtractorFacts, known_facts
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.locations import location, open_url
from pipelines.storage.node_cache import on_this_node

if TYPE_CHECKING:
    from ddpm_core.features import FeatureExtractor


@dataclass(frozen=True)
class Extractor(ExtractorFacts):
    """What is known of a feature extractor without its network, which workers load by `spec`.

    spec: inception, dinov2, pixels, or the absolute path of a TorchScript file.
    """

    spec: str


def describe_extractor(given: str, dataset: ShardedDataset) -> Extractor:
    """The extractor that a person names, for this data set's images. Raises InputError if it cannot be had."""
    spec = str(location(given, option="--extractor")) if given.endswith(".pt") or "://" in given else given
    facts = known_facts(spec, channels=dataset.shape[2]) or load_for(spec, dataset)
    return Extractor(facts.name, facts.sha256, facts.dim, facts.num_logits, facts.resize, spec)


def load_for(spec: str, dataset: ShardedDataset) -> "FeatureExtractor":
    """The extractor with its network, for this data set's images. Raises InputError if it cannot be had."""
    from ddpm_core.features import load_extractor  # here: with torch

    height, width, channels = dataset.shape
    return load_extractor(local_spec(spec), (channels, height, width))


def local_spec(spec: str) -> str:
    """An extractor as this node loads it. Raises InputError for a URL with nothing there."""
    if "://" not in spec:
        return spec
    try:
        return str(on_this_node(open_url(spec)))
    except Exception as error:  # every store raises its own
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({one_line(error)})"
        raise InputError(f"the feature extractor {spec!r} {reason}: give the path or URL of a *.pt file") from error
