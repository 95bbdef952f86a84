"""Alarms, their delivery, and when an alias moves: rules over numbers, without Ray."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.http_server import http_server

from ddpm_core.protocol import Protocol
from pipelines.evaluate.evaluation import Evaluation
from pipelines.nightly.alarms import Alarm, degenerate, is_worse, regressions
from pipelines.nightly.champion import replaces
from pipelines.nightly.ledger import Ledger
from pipelines.nightly.notify import WEBHOOK, notify

PROTOCOL = Protocol(
    num_samples=100,
    seed=0,
    purpose="selection",
    sampler="ddim",
    sampler_steps=10,
    spacing="uniform",
    clip_denoised=True,
    weights="ema",
    batch_size=10,
    precision="float32",
    extractor="pixels",
    extractor_sha256="0" * 64,
    resize="none",
    reference="digits",
    reference_sha256="1" * 64,
    reference_images=1797,
    against="train",
    neighbours=100,
)


def measured(step: int, distance: float, half: float | None = 1.0, **others: float) -> Evaluation:
    """An evaluation of a distance with an interval of some half width."""
    values = {"fd_pixels": distance, **others}
    if half is not None:
        values |= {"fd_pixels_ci_low": distance - half, "fd_pixels_ci_high": distance + half}
    return Evaluation(step, PROTOCOL, values, Path(f"step-{step:08d}"))


def alarming_steps(distances: list[float], intervals: float = 1.0) -> list[int]:
    """The steps, from 1 on, that an alarm is raised about."""
    evaluations = [measured(step, distance) for step, distance in enumerate(distances, 1)]
    keys = {f"worse run {step} {PROTOCOL.fingerprint}": step for step in range(1, len(distances) + 1)}
    return [keys[alarm.key] for alarm in regressions("run", evaluations, intervals)]


def test_a_checkpoint_is_worse_beyond_the_interval_of_the_difference() -> None:
    # Half widths 3 and 4 make one of 5.
    assert not is_worse(measured(2, 14.9, 3.0), measured(1, 10.0, 4.0), 1.0)
    assert is_worse(measured(2, 15.1, 3.0), measured(1, 10.0, 4.0), 1.0)
    assert not is_worse(measured(2, 15.1, 3.0), measured(1, 10.0, 4.0), 2.0)
    assert not is_worse(measured(2, 99.0, None), measured(1, 10.0, 4.0), 1.0)


def test_a_regression_stands_until_a_later_checkpoint_is_as_good_again() -> None:
    assert alarming_steps([10.0, 9.0, 8.0]) == []
    assert alarming_steps([10.0, 20.0]) == [2]
    assert alarming_steps([10.0, 20.0, 20.0, 21.0]) == [2]  # two nights' worth in one, and no recovery
    assert alarming_steps([10.0, 20.0, 11.0]) == []
    assert alarming_steps([10.0, 20.0, 30.0, 19.0]) == [2]
    assert alarming_steps([10.0, 20.0], intervals=10.0) == []
    assert alarming_steps([10.0]) == alarming_steps([]) == []


@given(st.lists(st.floats(0.0, 100.0), max_size=8))
def test_a_training_that_never_gets_worse_raises_no_alarm(distances: list[float]) -> None:
    assert alarming_steps(sorted(distances, reverse=True)) == []


def test_samples_that_are_alike_saturated_or_copies_raise_an_alarm() -> None:
    def faults(**values: float) -> list[str]:
        return [alarm.kind for alarm in degenerate("run", measured(1, 10.0, **values))]

    fine = {"spread_pixels": 0.95, "saturation": 0.5, "saturation_data": 0.45}
    assert faults() == faults(**fine) == []
    assert faults(**{**fine, "spread_pixels": 0.4}) == ["alike"]
    assert faults(**{**fine, "saturation": 0.8}) == ["saturated"]
    assert faults(memorized_ci_low=0.02) == ["copies"]
    assert faults(memorized_ci_low=0.02, memorized_held_out=0.03) == []


def test_an_alias_moves_beyond_intervals_or_to_an_earlier_step_of_its_run() -> None:
    held = measured(5, 10.0, 1.0)
    assert not replaces(measured(6, 8.1, 1.0), held, same_run=True)  # they meet at 9.05
    assert replaces(measured(6, 7.9, 1.0), held, same_run=True)
    assert replaces(measured(4, 9.9, 1.0), held, same_run=True)
    assert not replaces(measured(4, 9.9, 1.0), held, same_run=False)


def test_without_intervals_the_lower_distance_counts() -> None:
    assert replaces(measured(9, 9.9, None), measured(5, 10.0, None), same_run=True)
    assert not replaces(measured(9, 10.0, None), measured(5, 10.0, None), same_run=True)


ALARM = Alarm("worse", "run", "2 abc", 'step 2 is worse, by "much" & more')


def test_an_alarm_reaches_webhook_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "a b.json"
    command = f"{sys.executable} -c 'import sys; open(sys.argv[1], \"w\").write(sys.stdin.read())' '{copy}'"
    with http_server(lambda path: 200) as server:
        monkeypatch.setenv(WEBHOOK, f"{server.uri}/hook")
        assert notify([ALARM], {"experiment": "ddpm", "report": "r.html"}, command) == []
        (request,) = server.requests
    assert request.content_type == "application/json"
    for body in (request.body, copy.read_bytes()):
        assert json.loads(body) == {
            "experiment": "ddpm",
            "report": "r.html",
            "text": f"run: {ALARM.text}",
            "alarms": [{"key": "worse run 2 abc", "run": "run", "text": ALARM.text, "of_training": False}],
        }


def test_a_webhook_that_fails_is_reported_without_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_server(lambda path: int(path.strip("/"))) as server:
        for address, said in [
            (f"{server.uri}/500", "answers 500"),
            (f"{server.uri}/302", "answers 302"),
            ("http://127.0.0.1:9/secret", "was not reached"),
            ("http://secret.invalid:port/", "was not reached"),
            ("file:///etc/passwd?secret", "was not reached"),
            ("secret", "was not reached"),
        ]:
            monkeypatch.setenv(WEBHOOK, address)
            (sentence,) = notify([ALARM], {}, None)
            assert said in sentence
            assert "127.0.0.1" not in sentence
            assert "secret" not in sentence
        assert [request.path for request in server.requests] == ["/500", "/302"]  # no redirection is followed


def test_an_alarm_command_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WEBHOOK, raising=False)
    assert "the alarm command 'false' failed with exit code 1" in notify([ALARM], {}, "false")[0]
    assert "failed" in notify([ALARM], {}, "no-such-command")[0]
    assert "failed" in notify([ALARM], {}, "'unclosed")[0]


def test_an_alarm_is_new_until_delivered_and_again_after_it_was_over(tmp_path: Path) -> None:
    ledger, runs = Ledger(tmp_path), {"run"}
    assert ledger.new_alarms([ALARM], runs) == [ALARM]
    ledger.set_delivered({ALARM.key: ALARM.run})
    assert ledger.new_alarms([ALARM], runs) == []
    assert ledger.new_alarms([], {"another"}) == []  # of a night that looked at another training alone
    assert ledger.delivered() == {"worse run 2 abc": "run"}
    assert ledger.new_alarms([], runs) == []
    assert ledger.new_alarms([ALARM], runs) == [ALARM]


def test_what_earlier_versions_delivered_is_not_delivered_again(tmp_path: Path) -> None:
    keys = ["refused other cannot be read", "worse run 2 abc"]
    (tmp_path / "told.json").write_text(json.dumps({"told": keys}))
    ledger = Ledger(tmp_path)
    assert ledger.delivered() == {keys[0]: "other", keys[1]: "run"}
    assert ledger.new_alarms([ALARM], {"run", "other"}) == []
    assert ledger.delivered() == {keys[1]: "run"}  # the other is over
    assert set(json.loads((tmp_path / "told.json").read_text())["told"]) == {keys[1]}  # as they read it
