"""The protocol: what a number depends on, its name and its fingerprint."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pytest
from support.gaussian_case import unchecked

from ddpm_core.protocol import INCEPTION, Protocol, fingerprint

PAPER = Protocol(
    num_samples=50_000,
    seed=0,
    sampler="ancestral",
    sampler_steps=1000,
    spacing="uniform",
    clip_denoised=True,
    weights="ema",
    batch_size=256,
    precision="float32",
    extractor=INCEPTION,
    extractor_sha256="6726825d" + "0" * 56,
    resize="tf1-bilinear",
    reference="cifar10-train",
    reference_sha256="0123abcd" + "f" * 56,
    reference_images=50_000,
)


def test_a_fingerprint_is_the_hash_of_canonical_json() -> None:
    plain = {name: value for name, value in asdict(PAPER).items() if name not in ("eta", "var_type", "ema_length")}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    assert PAPER.fingerprint == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_fingerprints_never_change() -> None:
    """Golden values: a change here would part every stored number from new ones of the same protocol."""
    assert PAPER.fingerprint == "33a154e4b448"
    assert fingerprint({"b": [1, 2.5, None], "a": "é"}) == "84afbf1d4853"
    assert fingerprint({"a": "é", "b": [1, 2.5, None]}) == "84afbf1d4853"


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return "x" if value is None else value + ("x" if isinstance(value, str) else 1)


@pytest.mark.parametrize("name", [field.name for field in fields(Protocol)])
@unchecked()
def test_protocols_that_differ_anywhere_do_not_share_a_fingerprint(name: str) -> None:
    changed = replace(PAPER, **{name: other(getattr(PAPER, name))})
    assert changed.fingerprint != PAPER.fingerprint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eta": 0.5, "sampler": "ddim"}, "eta 0.5"),
        ({"var_type": "fixedsmall"}, "sigma^2 fixedsmall"),
        ({"ema_length": 0.1}, "EMA weights of length 0.1, "),
    ],
)
def test_a_later_choice_is_a_part_of_the_samples_and_is_said(changes: dict[str, Any], said: str) -> None:
    changed = replace(PAPER, **changes)
    assert changed.samples_fingerprint != replace(PAPER, sampler=changed.sampler).samples_fingerprint
    assert said in changed.describe()


def test_dataclasses_count_as_their_fields() -> None:
    @dataclass(frozen=True)
    class Inner:
        b: tuple[int, ...]

    @dataclass(frozen=True)
    class Outer:
        a: Inner

    assert fingerprint(Outer(Inner((1, 2)))) == fingerprint({"a": {"b": [1, 2]}})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_json_cannot_name_has_no_fingerprint(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"lr": value})


def test_only_the_2015_inception_network_makes_an_fid() -> None:
    assert (PAPER.distance, PAPER.score) == ("fid", "is")
    stand_in = replace(PAPER, extractor="resnet18")
    assert (stand_in.distance, stand_in.score) == ("fd_resnet18", "is_resnet18")


def test_the_sentence_names_all_a_number_depends_on() -> None:
    sentence = PAPER.describe()
    for part in (
        "50,000 samples",
        "ancestral with 1,000 steps",
        "EMA weights",
        "x0 clipped",
        "half-up",
        "float32",
        "seed 0",
    ):
        assert part in sentence
    for part in (INCEPTION, "6726825d", "tf1-bilinear", "cifar10-train", "0123abcd", "batch 256"):
        assert part in sentence
    assert "not clipped" in replace(PAPER, clip_denoised=False).describe()
    assert "raw weights" in replace(PAPER, weights="raw").describe()
    assert "KID" not in sentence
    assert "KID, precision and recall of 50,000" in replace(PAPER, neighbours=50_000).describe()
