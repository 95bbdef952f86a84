"""The demo's own pieces; the whole of it is `make demo`."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
import torch
from PIL import Image
from support.pages import missing, shown_output
from support.processes import ROOT

from ddpm_core.commit import sha256_file
from ddpm_core.features import load_extractor
from pipelines.demo.digits import digit_key, train_extractor
from pipelines.demo.driver import Clock, demo, read_finished
from pipelines.shards.dataset import ShardedDataset


def test_the_digits_are_laid_out_as_lsun_ships_its_images(digits_lmdb: Path) -> None:
    import io

    sizes = set()
    with lmdb.open(str(digits_lmdb), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert environment.stat()["entries"] == 1797
        for number in range(20):
            value = transaction.get(digit_key(number).encode())
            with Image.open(io.BytesIO(bytes(value or b""))) as image:
                assert image.format == "WEBP"
                sizes.add(image.size)
    assert all(min(size) == 256 for size in sizes)
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_the_classifier_knows_unseen_digits_and_is_an_extractor(digits: ShardedDataset, tmp_path: Path) -> None:
    accuracy = train_extractor(tmp_path / "digits.pt", digits)
    assert accuracy > 0.9  # a nearest-mean classifier has 0.9 on these digits
    extractor = load_extractor(str(tmp_path / "digits.pt"), (1, 8, 8))
    features, logits = extractor(torch.from_numpy(digits.pixels([0, 1])).permute(0, 3, 1, 2).contiguous())
    assert (extractor.name, features.shape) == ("digits", (2, 64))
    assert logits is not None
    assert logits.shape == (2, 10)


def test_a_finished_demo_is_recognised_only_while_all_of_it_is_there(tmp_path: Path) -> None:
    made = tmp_path / "report.html"
    made.write_text("x")
    finished = tmp_path / "finished.json"
    facts = {"identity": "a", "report": str(made), "best": "b", "files": {str(made): sha256_file(made)}}
    finished.write_text(json.dumps(facts))
    assert read_finished(finished, "a") is not None
    assert read_finished(finished, "another") is None
    made.write_text("y")
    assert read_finished(finished, "a") is None
    made.unlink()
    assert read_finished(finished, "a") is None


def test_the_demo_tells_what_share_of_its_time_each_stage_took(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 12.0, 72.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    clock = Clock()
    assert [clock.lap(stage) for stage in ("images", "train", "sweep")] == [2.0, 60.0, 38.0]
    done, *lines = clock.describe()
    assert done == "Done in 1:40:"
    assert [line.split()[:3] for line in lines] == [
        ["images", "0:02", "2%"], ["train", "1:00", "60%"], ["sweep", "0:38", "38%"],
    ]  # fmt: skip
    bars = [line.count("#") for line in lines]
    assert bars == [1, 30, 19]


SUBMIT = """
import subprocess
from pipelines.demo.local_ray import ray_cluster
with ray_cluster({}) as environment:
    print("of the demo:", environment["RAY_ADDRESS"], flush=True)
    show = "import os; print('of the job:', os.environ['RAY_ADDRESS'])"
    for _ in range(4):  # Ray's own choice among several is by chance
        subprocess.run(["ray", "job", "submit", "--", "python", "-c", show], env=environment, check=True)
"""
OTHER = "import ray; ray.init(num_cpus=1, include_dashboard=False); print('up', flush=True); input()"


@pytest.mark.slow
def test_a_submitted_job_finds_the_demos_ray_beside_another_of_the_machine() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with socket.socket() as agent, another_ray(own):
        agent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # held by a Ray of this machine, which is as good
            agent.bind(("0.0.0.0", 52365))
            agent.listen()
        command = [sys.executable, "-c", SUBMIT]
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wanted,) = re.findall(r"of the demo: (\S+)", done.stdout)
    assert re.findall(r"of the job: (\S+)", done.stdout) == [wanted] * 4


@contextlib.contextmanager
def another_ray(environment: dict[str, str]) -> Iterator[None]:
    """A Ray of this machine that is not the demo's."""
    command, pipe = [sys.executable, "-c", OTHER], subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert "up" in process.stdout.read(3)
        yield
        process.communicate("\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_runs_and_a_second_time_finds_everything_there(tmp_path: Path) -> None:
    root = ROOT
    command = [sys.executable, "jobs/demo.py", "--storage", str(tmp_path)]
    first = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    shown = shown_output("jobs/README.md")
    assert len(shown) == 3
    for block in shown:
        assert missing(block, first.stdout) == []
    page = (tmp_path / "demo" / "report.html").read_text().partition("<script>")[0]
    assert "not measured" not in page.lower()
    assert len(re.findall(r"<li>[^<]*</li>", page.partition('<ul class="absent">')[2])) == 1  # the paper's tables
    lines: list[str] = []
    demo(tmp_path, lines.append)
    assert lines == ["Everything is there: nothing to do."]
