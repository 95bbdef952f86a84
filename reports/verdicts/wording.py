"""Measured values in words: names of metrics, distances with the digits that their intervals support."""

from ddpm_core.protocol import Protocol
from reports.formatting import NOT_MEASURED, decimals_for, fixed
from reports.verdicts.ranking import Entry


def metric_name(name: str) -> str:
    """A metric as people write it: FID, Inception score; other extractors keep the name they are logged by."""
    names = {"fid": "FID", "fid_test": "FID (test set)", "is": "Inception score", "is_test": "Inception score"}
    names |= {"fd_dinov2-vitl14": "FD-DINOv2", "fd_dinov2-vitl14_test": "FD-DINOv2 (test set)"}
    return names.get(name, name)


def decimals_of(entry: Entry) -> int:
    """The decimals that an entry's distance deserves."""
    point = entry.checkpoint
    return decimals_for(point.distance, point.low, point.high)


def distance_text(entry: Entry) -> str:
    """A measured distance with the digits its interval supports."""
    return fixed(entry.checkpoint.distance, decimals_of(entry))


def interval_text(entry: Entry, decimals: int | None = None) -> str:
    """Both ends of the 95 % interval; "not measured" without one."""
    interval = entry.checkpoint.interval
    if interval is None:
        return NOT_MEASURED
    digits = decimals_of(entry) if decimals is None else decimals
    return " to ".join(fixed(end, digits) for end in interval)


def score_text(entry: Entry) -> str:
    """The score with its spread over splits."""
    point = entry.checkpoint
    if point.score is None:
        return NOT_MEASURED
    if point.score_std is None:
        return fixed(point.score, 2)
    decimals = decimals_for(point.score, 0, 2 * point.score_std)
    return f"{fixed(point.score, decimals)} ± {fixed(point.score_std, decimals)}"


def sampler_words(protocol: Protocol) -> str:
    """A sampler without the number of its steps."""
    eta = f", η {protocol.eta:g}" if protocol.sampler == "ddim" else ""
    variance = f", {protocol.var_type}" if protocol.var_type else ""
    return f"{protocol.sampler}{eta}{variance}, {protocol.spacing}"
