"""Every job on a disk that is too small, and a little less so each time: a sentence each time, and then the same result."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import run_job
from support.small_disk import mounted_disk

from pipelines.shards.dataset import ShardedDataset

RUN = (
    "tiny --steps 4 --checkpoint-every 2 --log-every 2 --unet.ch 32 --unet.ch-mult 1 --unet.num-res-blocks 1 "
    "--optim.batch-size 8"
)
MEASURE = (
    "--extractor pixels --samples 130 --chunk-size 20 --batch-size 10 --sampler ddim --sampler-steps 3 --pictures 0 "
    "--no-report --workers 1"
)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk of no room at all, which grow() enlarges."""
    with mounted_disk(16) as path:
        yield path


def grow(disk: Path, kibibytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", str(disk)], check=True)


@pytest.fixture(scope="module")
def storage(digits: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a trained run, and its evaluation, made on a disk with room."""
    path = tmp_path_factory.mktemp("whole") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        assert run_job(patch, "train_lsun.py", *RUN.split(), "--shards", str(digits.path), "--storage", str(path)) == 0
        assert run_job(patch, "evaluate.py", "--run", run_of(path), *MEASURE.split(), "--storage", str(path)) == 0
    return path


def run_of(storage: Path) -> str:
    (run,) = (storage / "train").iterdir()
    return run.name


def results(storage: Path) -> dict[str, object]:
    """What must be equal: the weights by their hashes, and every number but the speed."""
    found: dict[str, object] = {}
    for path in storage.rglob("manifest.json"):
        facts = json.loads(path.read_text())
        values = {key: value for key, value in facts.get("values", {}).items() if key != "samples_per_second"}
        found[str(path.relative_to(storage))] = values or {
            name: file["sha256"] for name, file in facts.get("files", {}).items() if name.endswith("safetensors")
        }
    return found


COMMANDS = {
    "preprocess": "preprocess.py --source {source} --output {disk}/out --image-size 8 --channels 1",
    "train": f"train_lsun.py {RUN} --shards {{digits}} --storage {{disk}}/runs",
    "evaluate": f"evaluate.py --run {{run}} {MEASURE} --storage {{disk}}/runs",
    "likelihood": "evaluate.py likelihood --run {run} --images 20 --strata 2 --workers 1 --storage {disk}/runs",
    "nightly": f"nightly_eval.py {MEASURE} --storage {{disk}}/runs",
    "export": "export.py {run} --output {disk}/exported --storage {storage}",
    "report": "report.py --output {disk}/report.html --storage {storage}",
    "curve": "compress.py curve --run {run} --data {digits} --images 2 --steps 4 --output {disk}/curve --storage {disk}/runs",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_on_a_full_disk_ends_with_a_sentence_and_goes_on_when_there_is_room(
    name: str,
    storage: Path,
    digits: ShardedDataset,
    digits_lmdb: Path,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = storage / "train" / run_of(storage)
    values = {"source": digits_lmdb, "digits": digits.path, "storage": storage, "run": run, "disk": disk}
    job, *arguments = COMMANDS[name].format(**values).split()
    if name == "nightly":
        grow(disk, 1 << 16)
        shutil.copytree(storage / "train", disk / "runs" / "train")
        shutil.copy(storage / "mlflow.db", disk / "runs" / "mlflow.db")
        used = shutil.disk_usage(disk).used >> 10
        grow(disk, used + 4)
        size = used + 8
    else:
        size = 64
    refused = 0
    while (code := run_job(monkeypatch, job, *arguments)) not in (0, 3):  # 3: an alarm about a network of four steps
        said = capfd.readouterr()
        assert code == 2, f"{said.out}\n{said.err}"
        assert "Traceback" not in said.err + said.out, said
        assert said.err.splitlines()[-1].startswith("error: "), said
        refused += 1
        assert size < 1 << 17, said
        size += max(16, size // 3)
        grow(disk, size)
    assert refused
    capfd.readouterr()
    if name in ("train", "evaluate"):
        wanted = results(storage)
        assert results(disk / "runs") == {key: value for key, value in wanted.items() if key.startswith(name)}
