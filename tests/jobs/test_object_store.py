"""The whole chain in an object store that refuses, waits, cuts connections and shows old listings, every job killed once."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_job
from support.nodes_without_disk import MEASURING as OVER_NODES
from support.nodes_without_disk import WORKERS
from support.processes import IMPORTED, ROOT
from support.s3_server import S3Server
from support.training import config
from upath import UPath

from ddpm_core.checkpoint import open_checkpoint
from ddpm_core.records import SAMPLES_PER_SECOND
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.driver import evaluate
from pipelines.evaluate.evaluation import Evaluation, read_evaluations
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.locations import committed_in, entries, open_url
from pipelines.train.driver import train

pytestmark = pytest.mark.timeout(1800)  # for the chain alone is a dozen jobs
FAULTS = 25  # one in so many requests fails
TRAINING = {"steps": "4", "checkpoint-every": "2", "optim.batch-size": "16", "workers": "2", "cpus-per-worker": "0.5"}
MEASURING = {"extractor": "pixels", "samples": "80", "chunk-size": "20", "batch-size": "20", "sampler": "ddim"}
MEASURING |= {"sampler-steps": "4", "workers": "1"}


def options(values: dict[str, str], part: str = "") -> list[str]:
    return [word for name, value in values.items() for word in (f"--{part}{name}", value)]


@dataclass
class Chain:
    """Jobs over one storage in a bucket."""

    server: S3Server
    root: UPath
    place: dict[str, str]
    monkeypatch: pytest.MonkeyPatch
    trained: str = ""
    killed: list[str] = field(default_factory=list)

    def run(self, job: str, *arguments: str, killed_at: str, code: int = 0) -> None:
        """Run a job and kill it as soon as an object has been put whose key matches; then give the same command again."""
        import ray

        there = threading.Event()
        self.server.written = lambda key: there.set() if re.search(killed_at, key) else None
        address = ray.get_runtime_context().gcs_address
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [sys.executable, f"jobs/{job}", *arguments],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": address},
                stdout=log,
                stderr=log,
            )
            came = there.wait(300.0)
            process.send_signal(signal.SIGKILL)
            log.seek(0)
            assert came, log.read().decode()
        if process.wait() == -signal.SIGKILL:
            self.killed.append(job)
        assert run_job(self.monkeypatch, job, *arguments) == code


@pytest.fixture(scope="module")
def chain(
    ray_session: None, s3_server: S3Server, s3_bucket: str, digits_lmdb: Path, tmp_path_factory: Any
) -> Iterator[Chain]:
    """Every stage, each killed once, in a folder of the bucket whose name holds what a URL would escape."""
    folder = tmp_path_factory.mktemp("chain")
    root = open_url(f"{s3_bucket}/{folder.name}/a b%20ü")
    place = {"storage": f"{root}/runs", "tracking-uri": f"sqlite:///{folder}/mlflow.db"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        chain = Chain(s3_server, root, place, patch)
        s3_server.every = FAULTS
        source = {"source": str(digits_lmdb), "image-size": "8", "channels": "1", "images-per-shard": "400"}
        shards = f"{root}/digits"
        chain.run("preprocess.py", *options(source | {"output": shards}), killed_at=r"shards/shard-.*\.parquet$")
        trained = options({"shards": shards} | TRAINING | place)
        chain.run("train_lsun.py", "tiny", *trained, killed_at=r"step-00000002/manifest\.json$")
        s3_server.every = 0
        (run,) = committed_runs(root)
        chain.trained, s3_server.every = run, FAULTS
        measured = options({"run": run, "pictures": "1"} | MEASURING | place)
        chain.run("evaluate.py", *measured, killed_at=r"/samples-[^/]+/step-00000004/chunk")
        of_sweep = options({"shards": shards} | TRAINING | {"workers": "1"} | place, "train.")
        of_sweep += options(MEASURING | {"pictures": "0"}, "evaluate.")
        points = ["schedules", "tiny", "--schedules", "linear", "quad", "--no-matched"]
        chain.run("sweep.py", *points, *of_sweep, killed_at=r"/sweep/.*/step-00000004/[01]-seed-0\.json$")
        chain.run(
            "nightly_eval.py",
            *options({"run": run, "seed": "1", "pictures": "0"} | MEASURING | place),
            killed_at=r"/samples-[^/]+/step-00000002/chunk",
            code=3,  # these samples look wrong, and the night says so
        )
        chain.run("report.py", *options({"output": f"{root}/report.html"} | place), killed_at=r"/report\.html$")
        s3_server.every, s3_server.written = 0, lambda key: None
        yield chain


@pytest.mark.slow
def test_nodes_without_a_common_disk_make_what_one_disk_holds(
    digits: ShardedDataset, s3_bucket: str, tmp_path: Path
) -> None:
    """Four nodes train, then measure while one of them dies and another joins."""
    root = open_url(f"{s3_bucket}/{tmp_path.name}/nodes")
    root.fs.put(str(digits.path), f"{root.path}/digits", recursive=True)
    temporary = tempfile.mkdtemp(prefix="ray-")  # a short path, for sockets lie in it
    places = [
        f"{root}/digits",
        f"{root}/runs",
        f"sqlite:///{tmp_path}/mlflow.db",
        str(tmp_path / "disks"),
        os.environ["AWS_ENDPOINT_URL"],
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "nodes_without_disk.py"), *places],
        env={**os.environ, "PYTHONPATH": IMPORTED, "RAY_TMPDIR": temporary},
        capture_output=True,
        text=True,
        timeout=400,
    )
    shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    there = open_url(done.stdout.splitlines()[-1])
    settings = config(digits, tmp_path / "runs", workers=WORKERS, cpus_per_worker=1.0)
    here = train(settings)
    for kind in ("ema", "raw"):
        assert open_checkpoint(there).weights_sha256(kind) == here.last.weights_sha256(kind)
    place: dict[str, Any] = {"storage": settings.storage, "tracking_uri": f"sqlite:///{tmp_path}/runs/mlflow.db"}
    measured = evaluate(EvaluateConfig(run=str(here.last.path), **place, **OVER_NODES)).best
    remote = root / "runs" / "evaluate" / here.run.name / measured.protocol.fingerprint
    assert without_timing(read_evaluations(remote)) == without_timing([measured])


def without_timing(evaluations: Sequence[Evaluation]) -> list[dict[str, float]]:
    return [{name: value for name, value in each.values.items() if name != SAMPLES_PER_SECOND} for each in evaluations]


def committed_runs(root: UPath) -> list[str]:
    return [folder.name for folder in entries(root / "runs" / "train")]


def test_every_job_goes_on_after_a_kill_over_a_store_that_fails(chain: Chain) -> None:
    assert {"preprocess.py", "train_lsun.py", "evaluate.py", "sweep.py", "nightly_eval.py"} <= set(chain.killed)
    assert {"refuse", "wait", "cut before", "cut after", "cut within", "stale"} == set(chain.server.faults)
    assert len(committed_runs(chain.root)) == 2  # that of linear betas is the training's own
    for run in committed_runs(chain.root):
        assert committed_in(chain.root / "runs" / "train" / run) == ["step-00000002", "step-00000004"]
    assert (chain.root / "report.html").read_bytes().startswith(b"<!DOCTYPE html>")
    assert (chain.root / "runs" / "nightly" / "ddpm" / "report.json").is_file()


def test_the_numbers_are_those_of_a_disk(chain: Chain, tmp_path: Path) -> None:
    run = chain.trained
    measured = options({"run": f"{chain.root}/runs/train/{run}"} | MEASURING | {"pictures": "0"})
    where = options({"storage": str(tmp_path / "runs"), "tracking-uri": f"sqlite:///{tmp_path}/mlflow.db"})
    assert run_job(chain.monkeypatch, "evaluate.py", *measured, *where) == 0
    (results,) = (
        folder for folder in (tmp_path / "runs" / "evaluate" / run).iterdir() if len(committed_in(folder)) == 2
    )
    there = read_evaluations(chain.root / "runs" / "evaluate" / run / results.name)
    assert without_timing(read_evaluations(results)) == without_timing(there)
