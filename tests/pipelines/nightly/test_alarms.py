"""What is told in the morning, and when an alias moves: rules over numbers, without Ray."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.protocol import Protocol
from pipelines.evaluate.evaluation import Evaluation
from pipelines.nightly.alarms import WEBHOOK, Alarm, degenerate, deliver, regressions, worse
from pipelines.nightly.champion import replaces

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


def told(distances: list[float], intervals: float = 1.0) -> list[int]:
    """The steps that an alarm is about."""
    evaluations = [measured(step, distance) for step, distance in enumerate(distances, 1)]
    return [int(alarm.key.split()[2]) for alarm in regressions("run", evaluations, intervals)]


def test_a_checkpoint_is_worse_beyond_the_interval_of_the_difference() -> None:
    # Half widths 3 and 4 make one of 5.
    assert not worse(measured(2, 14.9, 3.0), measured(1, 10.0, 4.0), 1.0)
    assert worse(measured(2, 15.1, 3.0), measured(1, 10.0, 4.0), 1.0)
    assert not worse(measured(2, 15.1, 3.0), measured(1, 10.0, 4.0), 2.0)
    assert not worse(measured(2, 99.0, None), measured(1, 10.0, 4.0), 1.0)


def test_a_regression_stands_until_a_later_checkpoint_is_as_good_again() -> None:
    assert told([10.0, 9.0, 8.0]) == []
    assert told([10.0, 20.0]) == [2]
    assert told([10.0, 20.0, 20.0, 21.0]) == [2]  # two nights' worth in one, and no recovery
    assert told([10.0, 20.0, 11.0]) == []
    assert told([10.0, 20.0, 30.0, 19.0]) == [2]
    assert told([10.0, 20.0], intervals=10.0) == []
    assert told([10.0]) == told([]) == []


@given(st.lists(st.floats(0.0, 100.0), max_size=8))
def test_a_training_that_never_gets_worse_is_never_told_of(distances: list[float]) -> None:
    assert told(sorted(distances, reverse=True)) == []


def test_samples_that_are_alike_saturated_or_copies_are_told_of() -> None:
    def faults(**values: float) -> list[str]:
        return [alarm.key.split()[0] for alarm in degenerate("run", measured(1, 10.0, **values))]

    fine = {"spread_pixels": 0.95, "saturation": 0.5, "saturation_data": 0.45}
    assert faults() == faults(**fine) == []
    assert faults(**{**fine, "spread_pixels": 0.4}) == ["alike"]
    assert faults(**{**fine, "saturation": 0.8}) == ["saturated"]
    assert faults(memorized_ci_low=0.02) == ["copies"]
    assert faults(memorized_ci_low=0.02, memorized_held_out=0.03) == []


def test_an_alias_moves_beyond_the_intervals_or_to_an_earlier_step_of_the_same_training() -> None:
    held = measured(5, 10.0, 1.0)
    assert not replaces(measured(6, 8.1, 1.0), held, same_run=True)  # they meet at 9.05
    assert replaces(measured(6, 7.9, 1.0), held, same_run=True)
    assert replaces(measured(4, 9.9, 1.0), held, same_run=True)
    assert not replaces(measured(4, 9.9, 1.0), held, same_run=False)


def test_without_intervals_the_lower_distance_counts() -> None:
    assert replaces(measured(9, 9.9, None), measured(5, 10.0, None), same_run=True)
    assert not replaces(measured(9, 10.0, None), measured(5, 10.0, None), same_run=True)


class Listener(http.server.BaseHTTPRequestHandler):
    """Keeps what it is sent; answers as its path says."""

    received: list[bytes]

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def listener() -> Iterator[tuple[str, list[bytes]]]:
    Listener.received = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Listener.received
        server.shutdown()
        thread.join()


ALARM = Alarm("worse run 2 abc", "run", 'step 2 is worse, by "much" & more')


def test_an_alarm_reaches_webhook_and_command(
    listener: tuple[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = listener
    monkeypatch.setenv(WEBHOOK, f"{url}/200")
    copy = tmp_path / "a b.json"
    command = f"{sys.executable} -c 'import sys; open(sys.argv[1], \"w\").write(sys.stdin.read())' '{copy}'"
    assert deliver([ALARM], {"experiment": "ddpm", "report": "r.html"}, command) == []
    for body in (received[0], copy.read_bytes()):
        message = json.loads(body)
        assert message["text"] == f"run: {ALARM.text}"
        assert message["alarms"][0]["key"] == ALARM.key
        assert message["report"] == "r.html"


def test_what_cannot_be_delivered_is_said_without_the_address(
    listener: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = listener
    for address, said in [
        (f"{url}/500", "answers 500"),
        ("http://127.0.0.1:9/secret", "was not reached"),
        ("file:///etc/passwd?secret", "was not reached"),
    ]:
        monkeypatch.setenv(WEBHOOK, address)
        (sentence,) = deliver([ALARM], {}, None)
        assert said in sentence
        assert "127.0.0.1" not in sentence
        assert "secret" not in sentence
    monkeypatch.delenv(WEBHOOK)
    assert "the alarm command 'false' failed" in deliver([ALARM], {}, "false")[0]
    assert "failed" in deliver([ALARM], {}, "no-such-command")[0]
    assert "failed" in deliver([ALARM], {}, "'unclosed")[0]
