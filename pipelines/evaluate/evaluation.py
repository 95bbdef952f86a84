"""A finished evaluation, read from its folder and set beside another."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.checkpoint import NAME
from ddpm_core.commit import MANIFEST
from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from ddpm_core.ranges import Count
from ddpm_core.records import CI_HIGH, CI_LOW, KID, PRECISION, RECALL
from ddpm_core.verdicts import Interval, intervals_overlap, known_interval
from pipelines.evaluate.config import MIN_CHUNKS
from pipelines.storage.locations import Location, committed_in


class ChainValues(TypedDict):
    """What is known of the x_0 predicted at a timestep of the chain, beside its Frechet distance."""

    t: Count[int]
    distance: float


class EvaluationManifest(TypedDict):
    """What an evaluation's manifest.json holds."""

    step: Count[int]
    protocol: typed.JsonObject
    values: dict[str, float]
    weights_sha256: str
    progress: list[ChainValues]


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of one checkpoint."""

    step: int
    protocol: Protocol
    values: dict[str, float]
    folder: Location
    progress: tuple[dict[str, float], ...] = ()  # {"t", "distance"} of the x_0 predicted along the chain

    @property
    def distance(self) -> float:
        return self.values[self.protocol.distance]

    @property
    def interval(self) -> Interval | None:
        """95 % of the distance, None if the chunks were too few for one."""
        return known_interval(*(self.values.get(self.protocol.distance + end) for end in (CI_LOW, CI_HIGH)))

    def indistinguishable_from(self, other: "Evaluation") -> bool:
        """Whether the intervals overlap. InputError under another protocol."""
        if self.protocol.fingerprint != other.protocol.fingerprint:
            raise InputError(
                f"protocols {self.protocol.fingerprint} and {other.protocol.fingerprint} differ, and so do their numbers: "
                "compare results of one protocol"
            )
        return intervals_overlap(self.interval, other.interval) or False


def describe_distance(evaluation: Evaluation) -> str:
    """The distance with its interval, without its name."""
    interval = evaluation.interval
    return f"{evaluation.distance:.4g}" + (
        f" (95 % interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
    )


def describe_values(values: dict[str, float], protocol: Protocol) -> str:
    """The distance with its interval, and the others, in words."""
    name = protocol.distance
    text = f"{name} {values[name]:.4g}"
    if name + CI_LOW in values:
        text += f" (95 % interval {values[name + CI_LOW]:.4g} to {values[name + CI_HIGH]:.4g})"
    for other in (protocol.score, *(protocol.metric(metric) for metric in (KID, PRECISION, RECALL))):
        if other in values:
            text += f", {other} {values[other]:.3g}"
    return text


def compare(one: Evaluation, other: Evaluation, *, across_protocols: bool = False) -> str:
    """Two evaluations in words. InputError under different protocols, unless that is asked for; then it is said."""
    name, other_name = one.protocol.distance, other.protocol.distance
    difference = f"{one.folder}: {name} {one.distance:.4g}; {other.folder}: {other_name} {other.distance:.4g}"
    if one.protocol.fingerprint != other.protocol.fingerprint:
        pairs = ((key, value, getattr(other.protocol, key)) for key, value in vars(one.protocol).items())
        differing = ", ".join(
            f"{key} {value} and {other_value}" for key, value, other_value in pairs if value != other_value
        )
        if not across_protocols:
            raise InputError(
                f"the two were measured under different protocols ({differing}), so that their numbers do not compare: evaluate "
                "both alike, or give --across-protocols"
            )
        return f"{difference}; under DIFFERENT PROTOCOLS ({differing}), which may be all of the difference"
    if one.interval is None or other.interval is None:
        return f"{difference}; without intervals, for which an evaluation needs {MIN_CHUNKS} chunks"
    if one.indistinguishable_from(other):
        return f"{difference}; their 95 % intervals overlap: indistinguishable"
    better = min(one, other, key=lambda evaluation: evaluation.distance)
    return f"{difference}; their 95 % intervals do not overlap: {better.folder} is better"


def read_evaluation(folder: Location) -> Evaluation:
    """Raises InputError if there is no finished evaluation of this version."""
    try:
        facts = read_facts(folder)
        protocol = typed.build(Protocol, facts["protocol"])
        ends = [protocol.distance + end for end in (CI_LOW, CI_HIGH)]
        wanted = {protocol.distance, *(ends if any(end in facts["values"] for end in ends) else ())}
        if lacking := sorted(wanted - facts["values"].keys()):
            raise ValueError(f"values lacks {typed.shown(lacking[0])}")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(folder)!r} holds no finished evaluation ({error}): give a folder evaluate/RUN/PROTOCOL/step-... of the "
            "storage, or delete it and evaluate again"
        ) from error
    return Evaluation(
        facts["step"], protocol, facts["values"], folder, tuple(cast(list[dict[str, float]], facts["progress"]))
    )


def read_evaluations(folder: Location, known: Iterable[Evaluation] = ()) -> list[Evaluation]:
    """All finished evaluations under a protocol, by ascending step, those of deleted checkpoints too. folder: the protocol's.
    known: some of them, which an old listing may lack. Raises InputError if one is damaged."""
    by_name = {each.folder.name: each for each in known}
    names = {*by_name, *filter(NAME.fullmatch, committed_in(folder))}
    found = [by_name.get(name) or read_evaluation(folder / name) for name in names]
    return sorted(found, key=lambda evaluation: evaluation.step)


def read_facts(folder: Location) -> EvaluationManifest:
    """The manifest of a finished evaluation. Raises InputError if it is damaged, FileNotFoundError if there is none."""
    return typed.read_json(
        folder / MANIFEST, EvaluationManifest, what="evaluation", advice="delete it and evaluate again"
    )
