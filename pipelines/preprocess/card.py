"""A data set's card: its facts on half a page."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipelines.preprocess.colour import UNUSABLE
from pipelines.preprocess.sources.open import describe_others
from pipelines.shards.dataset import ShardedDataset


def describe_dataset(dataset: ShardedDataset) -> str:
    """The data set's facts as aligned lines, from its manifest alone."""
    manifest = dataset.manifest
    height, width, channels = dataset.shape
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    shards = len(manifest["shards"])
    channel_names = ("R", "G", "B") if channels == 3 else ("grey",)

    def by_channel(values: list[float]) -> str:
        return "  ".join(f"{name} {value:+.4f}" for name, value in zip(channel_names, values, strict=True))

    rows = [
        ("data set", f"{dataset.name}, from {manifest['source']}"),
        ("images", f"{len(dataset):,} of {manifest['source_images']:,} in the source{describe_choice(manifest)}"),
        ("shape", f"{height} x {width} x {channels}, centre crop, {manifest['filter']} resize"),
        ("stored", f"{manifest['storage']} in {shards:,} shard{'' if shards == 1 else 's'}, {_bytes(size)}"),
        ("mean", by_channel(manifest["mean"])),
        ("std", by_channel(manifest["std"])),
        ("E[x0^2]", f"{manifest['second_moment']:.4f}"),
        ("sha256", f"{dataset.sha256} (keys and pixels)"),
        ("source", f"{manifest['source_fingerprint']} (fingerprint)"),
    ]
    others, profiles = (manifest.get(key, {}) for key in ("source_others", "colour_profiles"))  # not in older manifests
    if others:
        rows.append(("not read", describe_others(others)))
    rows += [
        ("profiles", f"{number:,} with {name}" + ("" if name == UNUSABLE else ", converted to sRGB"))
        for name, number in profiles.items()
    ]
    kinds = Counter(entry["kind"] for entry in manifest["skipped"])
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    rows.append(("skipped", counts or "none"))
    keys_and_reasons = [(entry["key"], entry["reason"]) for entry in manifest["skipped"][:5]]
    rows += [("", f"{key if key.isprintable() else repr(key)}: {reason}") for key, reason in keys_and_reasons]
    if len(manifest["skipped"]) > 5:
        rows.append(("", f"and {len(manifest['skipped']) - 5:,} more in manifest.json"))
    return "\n".join(f"{name:<10}{value}" for name, value in rows)


def describe_choice(manifest: Mapping[str, Any]) -> str:
    """Which of the source's images were asked for, as the end of a phrase; nothing if all were."""
    chosen = manifest.get("chosen")
    if chosen is None:
        return ""
    how = "the first by key" if chosen["seed"] is None else f"drawn with seed {chosen['seed']}"
    return f": {chosen['images']:,} were asked for, {how}"


def _bytes(size: float) -> str:
    """A number of bytes with three digits and a decimal unit: 36.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"
