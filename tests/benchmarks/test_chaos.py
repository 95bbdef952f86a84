"""Training and evaluation as a person types them, with six kill -9 on the way: the same bits, nothing lost, nothing left."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from support.evaluation import numbers
from support.processes import ROOT, wait_for
from support.training import contents, result_of, starts
from torch import Tensor

from ddpm_core.checkpoint import list_checkpoints, list_steps
from pipelines.evaluate.evaluation import read_evaluation
from pipelines.storage.chunks import load_chunk

pytestmark = pytest.mark.bench
SEED = 2  # of what is killed when
TIMEOUT = 300.0  # seconds that a job may take to get to its next kill or its end
STEPS, SAMPLES, CHUNK = 300, 300, 20
DRIVER = "the driver with its cluster"
# By default drivers take 60 s to give up a lost GCS, and the GCS 15 s a lost raylet: a job would be done by then.
SHORT_TIMEOUTS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # Ray itself leaves them for a while if its GCS was killed
Kill = tuple[str, int]  # (what, after how many units of work)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command line, and how its progress is seen from outside."""

    name: str
    command: str
    total: int  # units of work
    unit: str
    worker: str  # what Ray calls the processes that do it
    head: tuple[str, ...]  # processes of Ray's without which a driver ends
    progress: Callable[[Path, str], int]  # (storage, what its driver has printed) -> units done
    committed: Callable[[Path], Any]  # storage -> what no kill may cost


@dataclass(frozen=True)
class Life:
    """What one driver of a job left: the lines that it printed, and what was committed at its end."""

    lines: list[str]
    committed: Any


def steps_taken(storage: Path, printed: str) -> int:
    counts = re.findall(r"^train: ([\d,]+) of", printed, re.MULTILINE)
    return int(counts[-1].replace(",", "")) if counts else 0


def newest_step(storage: Path) -> int:
    return max((step for run in storage.glob("train/*") for step in list_steps(run)), default=0)


def chunk_stamps(storage: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in storage.glob("evaluate/*/samples-*/step-*/chunk-*")}


def samples_made(storage: Path, printed: str) -> int:
    return CHUNK * len(chunk_stamps(storage))


TRAIN = Job(
    name="train",
    command=f"train_lsun.py tiny --steps {STEPS} --checkpoint-every 50 --keep-last 2 --log-every 5 --workers 2 "
    "--optim.batch-size 16 --unet.dropout 0.1 --horizontal-flip",
    total=STEPS,
    unit="steps",
    worker="ray::RayTrainWorker",
    head=("raylet", "gcs_server"),
    progress=steps_taken,
    committed=newest_step,
)
EVALUATE = Job(
    name="evaluate",
    command=f"evaluate.py --samples {SAMPLES} --chunk-size {CHUNK} --batch-size 10 --workers 2 --extractor pixels "
    "--sampler ddim --sampler-steps 30 --no-report --pictures 0",
    total=2 * SAMPLES,  # of the two checkpoints that the training keeps
    unit="samples",
    worker="ray::PoolWorker",
    head=("gcs_server",),  # not the raylet: without a node, the pool waits for one
    progress=samples_made,
    committed=chunk_stamps,
)


def draw_kills(job: Job, generator: random.Random) -> list[Kill]:
    """One of a worker, one of the driver and one of a process of the head, one in each third of the job. The head's is
    the first or the last: until it is missed, the work goes on."""
    victims = [job.worker, DRIVER]
    generator.shuffle(victims)
    victims.insert(generator.choice([0, 2]), generator.choice(job.head))
    third, margin = job.total // 3, job.total // 20
    moments = [generator.randint(i * third + margin, (i + 1) * third - margin) for i in range(3)]
    return list(zip(victims, moments, strict=True))


def processes_of(session: int) -> dict[int, str]:
    """The live processes of a session: id -> the program's name, or what it calls itself."""
    names = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == session and (command := (entry / "cmdline").read_text()):
                names[int(entry.name)] = command.split("\0")[0].rsplit("/", 1)[-1]
    return names


def kill_all(session: int) -> None:
    def gone() -> bool:
        alive = processes_of(session)
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not alive

    wait_for(gone, 60)


@contextlib.contextmanager
def driver_of(command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job in a session of its own, which Ray's processes do not leave. None of them outlives this."""
    temporary = tempfile.mkdtemp(prefix="ray-")  # a short path, for sockets lie in it
    environment = {**os.environ, **SHORT_TIMEOUTS, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": temporary}
    script, *arguments = command.split()
    with log.open("wb") as output:
        driver = subprocess.Popen(
            [sys.executable, f"jobs/{script}", *arguments],
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield driver
    finally:
        kill_all(driver.pid)
        driver.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def wait_until_gone(session: int, but: set[str]) -> None:
    wait_for(lambda: set(processes_of(session).values()) <= but, 60)


def run_with_kills(job: Job, options: str, storage: Path, kills: Sequence[Kill]) -> tuple[float, list[Life]]:
    """Run a job's command again until it succeeds, with `kills` on the way: the seconds, and the life of each driver."""
    began, waiting, lives = time.monotonic(), deque(kills), list[Life]()
    while True:
        log, victim = storage.with_name(f"{storage.name}-{job.name}-{len(lives)}.log"), job.worker
        with driver_of(f"{job.command} {options} --storage {storage}", log) as driver:
            while waiting and victim == job.worker:  # a driver replaces its workers and goes on
                victim, moment = waiting.popleft()
                done = kill_at(victim, moment, job, storage, driver, log)
                seconds = time.monotonic() - began
                print(f"{job.name}: kill -9 of {victim} after {seconds:.0f} s, at {done} of {job.total} {job.unit}")
            code = driver.wait(TIMEOUT)
            wait_until_gone(driver.pid, but=AGENTS if victim == "gcs_server" else set())
        lives.append(Life(log.read_text().splitlines(), job.committed(storage)))
        if code == 0:
            assert not waiting, log.read_text()
            return time.monotonic() - began, lives
        assert victim != job.worker, log.read_text()  # it failed by itself


def kill_at(victim: str, moment: int, job: Job, storage: Path, driver: subprocess.Popen[bytes], log: Path) -> int:
    """Kill -9 when the job has done `moment` units of work: how many it had done then."""

    def due() -> list[int]:
        assert driver.poll() is None, log.read_text()
        if job.progress(storage, log.read_text()) < moment:
            return []
        alive = processes_of(driver.pid).items()
        return [process for process, name in alive if victim == DRIVER or name.startswith(victim)]

    first, *_ = wait_for(due, TIMEOUT)
    if victim == DRIVER:
        kill_all(driver.pid)
    else:
        os.kill(first, signal.SIGKILL)
    return job.progress(storage, log.read_text())


def train_and_evaluate(
    shards: Path, storage: Path, generator: random.Random | None
) -> tuple[float, list[Life], list[Life]]:
    """Train and evaluate, with kills if there is a generator to draw them: the seconds, and the lives of the drivers."""
    kills = [draw_kills(job, generator) if generator else [] for job in (TRAIN, EVALUATE)]
    seconds, training = run_with_kills(TRAIN, f"--shards {shards}", storage, kills[0])
    (run,) = (storage / "train").iterdir()
    more, evaluation = run_with_kills(EVALUATE, f"--run {run.name}", storage, kills[1])
    return seconds + more, training, evaluation


def last_checkpoint(storage: Path) -> dict[str, bytes]:
    """The last checkpoint, and every loss."""
    (run,) = (storage / "train").iterdir()
    return contents(result_of(run, list_checkpoints(run)))


def measured_values(storage: Path) -> list[dict[str, float]]:
    manifests = sorted(storage.glob("evaluate/*/*/step-*/manifest.json"))
    return numbers(tuple(read_evaluation(path.parent) for path in manifests))


def sample_chunks(storage: Path) -> dict[tuple[str, int], dict[str, Tensor]]:
    """(checkpoint, first index) -> the tensors of every chunk file, which hold each index of a checkpoint once."""
    chunks = {}
    for folder in storage.glob("evaluate/*/samples-*/step-*"):
        ranges = [range(*map(int, path.stem.split("-")[1:])) for path in folder.iterdir()]
        assert sorted(index for indices in ranges for index in indices) == list(range(SAMPLES))
        for indices in ranges:
            tensors, _ = load_chunk(folder, indices)
            assert len(tensors["features"]) == len(indices)
            chunks[folder.name, indices.start] = tensors
    return chunks


def mlflow_runs(storage: Path) -> list[tuple[str, str, list[tuple[int, float]]]]:
    """What MLflow holds: (name, status, losses or distances by step) of every run."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("ddpm")
    assert experiment is not None
    runs = []
    for run in client.search_runs([experiment.experiment_id]):
        histories = [client.get_metric_history(run.info.run_id, key) for key in ("train/loss", "fd_pixels")]
        values = sorted((metric.step, metric.value) for history in histories for metric in history)
        runs.append((str(run.info.run_name), str(run.info.status), values))
    return sorted(runs)


def relative_files(storage: Path) -> set[Path]:
    return {path.relative_to(storage) for part in ("train", "evaluate") for path in (storage / part).rglob("*")}


def assert_the_same(killed: Path, whole: Path) -> None:
    """Two storages hold the same numbers, samples and weights, and nothing besides."""
    assert last_checkpoint(killed) == last_checkpoint(whole)
    assert measured_values(killed) == measured_values(whole)
    assert mlflow_runs(killed) == mlflow_runs(whole)
    assert relative_files(killed) == relative_files(whole)
    chunks, undisturbed = sample_chunks(killed), sample_chunks(whole)
    assert chunks.keys() == undisturbed.keys()
    for key, tensors in undisturbed.items():
        assert chunks[key].keys() == tensors.keys()
        assert all(torch.equal(chunks[key][name], tensor) for name, tensor in tensors.items())


def assert_nothing_is_made_again(training: Sequence[Life], evaluation: Sequence[Life]) -> None:
    """Each driver began with what was committed at the end of the one before."""
    begun = [[step for step, _ in starts(life.lines)] or [STEPS] for life in training]  # or found it done
    assert [steps[0] for steps in begun[1:]] == [life.committed for life in training[:-1]]
    assert sum(map(len, begun)) == len(training) + 1  # once more for the lost worker
    for life in evaluation[:-1]:
        assert life.committed
        assert {path: path.stat().st_mtime_ns for path in life.committed} == life.committed


@pytest.mark.timeout(1500)  # half of that on two cores; this is for ones that others use as well
def test_six_kills_cost_time_and_nothing_else(digits_lmdb: Path, tmp_path: Path) -> None:
    shards, whole, killed = (tmp_path / name for name in ("digits", "whole", "killed"))
    sizes = "--image-size 8 --channels 1 --images-per-shard 400"
    with driver_of(f"preprocess.py --source {digits_lmdb} --output {shards} {sizes}", tmp_path / "log") as driver:
        assert driver.wait(TIMEOUT) == 0
    print()
    undisturbed, *_ = train_and_evaluate(shards, whole, None)
    seconds, training, evaluation = train_and_evaluate(shards, killed, random.Random(SEED))
    drivers = len(training) + len(evaluation)
    ratio = seconds / undisturbed
    print(f"with {drivers} drivers for 2: {seconds:.0f} s for {undisturbed:.0f}, {ratio:.1f} times the wall time")
    assert_the_same(killed, whole)
    assert_nothing_is_made_again(training, evaluation)
