"""The whole workflow at laptop size, through the same commands a cluster runs, on a Ray cluster of its own.

Handwritten digits (scikit-learn's copy of the UCI set) stand in for LSUN: they are written out as LSUN ships its images.
What is finished is not done again; when everything is, nothing is started.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core.commit import committed_file, sha256_file, write_json
from ddpm_core.errors import InputError
from ddpm_core.protocol import fingerprint
from pipelines.runtime.progress import Say, duration
from pipelines.shards.dataset import ShardedDataset

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "demo"
TRAIN = {"--steps": "1200", "--checkpoint-every": "300", "--log-every": "20", "--workers": "2"}
SWEEP = {"--train.steps": "200", "--train.seed": "1", "--train.log-every": "20", "--train.checkpoint-every": "200"}
PROTOCOL = {
    "--samples": "1000",
    "--chunk-size": "100",
    "--batch-size": "100",
    "--sampler": "ddim",
    "--sampler-steps": "20",
}
NEAREST = "200"  # samples whose nearest training images are looked up
OURS = re.compile(r"(preprocess|reference|train|evaluate|sweep|report|error|diverged): ")
PREFIX = re.compile(r"^(\x1b\[\d+m)?\([^)]*pid=\d+[^)]*\)(\x1b\[0m)? ?")  # of a remote process's output


@dataclass(frozen=True)
class DemoResult:
    """What a person looks at next."""

    report: Path
    best: str


def demo(storage: Path, say: Say) -> DemoResult:
    """Run every stage that is not finished. InputError with the end of its log where one fails."""
    home = storage / "demo"
    finished = home / "finished.json"
    identity = fingerprint({"train": TRAIN, "sweep": SWEEP, "protocol": PROTOCOL, "nearest": NEAREST})
    result = read_finished(finished, identity)
    if result is not None:
        say("Everything is there: nothing to do.")
        return result
    started = time.monotonic()
    source, shards, extractor = home / "digits_train_lmdb", home / "digits", home / "digits.pt"
    report = home / "report.html"
    say("[1/7] images: 1,797 handwritten digits as an LSUN-layout LMDB of WebP files")
    if not (source / "data.mdb").is_file():
        write_lmdb(source)
    with ray_cluster() as environment:
        stages = Stages(environment, home / "logs", say)
        size = {"--image-size": "8", "--channels": "1", "--name": "digits", "--images-per-shard": "256"}
        stages.run(
            "[2/7] preprocess: LMDB to 8x8 shards, with Ray Data",
            ["python", "jobs/preprocess.py", "--source", str(source), "--output", str(shards), *flat(size)],
        )
        if not extractor.is_file():
            accuracy = train_extractor(extractor, ShardedDataset.open(shards))
            say(f"a small classifier to measure with: {accuracy:.1%} right on digits it has not seen")
        place = {"--storage": str(storage), "--experiment": EXPERIMENT}
        measure = {**PROTOCOL, "--extractor": str(extractor)}
        last = stages.run(
            "[3/7] train: a submitted job, two data-parallel workers under Ray Train",
            [
                *("ray", "job", "submit", "--working-dir", ".", "--"),
                *("python", "jobs/train_lsun.py", "tiny", "--shards", str(shards), *flat(TRAIN), *flat(place)),
            ],
        )
        run = last.split("--run ")[1].split()[0]
        stages.run(
            "[4/7] sweep: linear against quadratic betas under Ray Tune, two short trials",
            [
                *("python", "jobs/sweep.py", "schedules", "tiny", "--schedules", "linear", "quad", "--no-matched"),
                *("--train.shards", str(shards), *flat(SWEEP)),
                *(*flat(under("train", place)), *flat(under("evaluate", {**measure, "--pictures": "0"}))),
            ],
        )
        last = stages.run(
            "[5/7] evaluate: every checkpoint, 1,000 samples each, fanned out over workers",
            ["python", "jobs/evaluate.py", "--run", run, "--nearest", NEAREST, *flat(measure), *flat(place)],
        )
        best = f"{run}, {last.removeprefix('evaluate: best is ')}"
        stages.run(
            "[6/7] report: one HTML file from what MLflow holds",
            ["python", "jobs/report.py", "--output", str(report), *flat(place)],
        )
        say("[7/7] stopping Ray")
    watched = [source / "data.mdb", extractor, report, *shards.iterdir(), *storage.rglob("manifest.json")]
    files = {str(path): sha256_file(path) for path in sorted(set(watched)) if path.is_file()}
    write_json(finished, {"identity": identity, "report": str(report), "best": best, "files": files})
    say(f"Done in {duration(time.monotonic() - started)}.")
    return DemoResult(report, best)


def read_finished(path: Path, identity: str) -> DemoResult | None:
    """The result of an earlier demo, if all that it made is still there, byte for byte."""
    try:
        facts = json.loads(path.read_text())
        whole = all(sha256_file(Path(name)) == sha256 for name, sha256 in facts["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return DemoResult(Path(facts["report"]), facts["best"]) if whole and facts["identity"] == identity else None


def flat(options: Mapping[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


def under(prefix: str, options: Mapping[str, str]) -> dict[str, str]:
    """Options of a nested configuration: --steps as --train.steps."""
    return {f"--{prefix}.{option[2:]}": value for option, value in options.items()}


@contextlib.contextmanager
def ray_cluster() -> Iterator[dict[str, str]]:
    """A Ray head of this machine's, on free ports of 127.0.0.1, with a token of its own; yields the environment in which
    commands find it. It ends with this process, whatever ends it."""
    address = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    interpreter = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.update(address, PATH=interpreter, RAY_worker_maximum_startup_concurrency="16")
    os.environ.pop("RAY_ADDRESS", None)
    import ray  # here, not above: Ray reads the token's environment when it is imported

    context = ray.init(
        num_cpus=max(2, os.cpu_count() or 2),
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=free_port(),
        object_store_memory=256 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        # Commands and drivers find the cluster by its GCS address, `ray job submit` by the dashboard's.
        found = {
            "RAY_ADDRESS": str(context.address_info["gcs_address"]),
            "RAY_API_SERVER_ADDRESS": f"http://{context.dashboard_url}",
        }
        yield {**os.environ, **found, "PYTHONUNBUFFERED": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    finally:
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Stages:
    """Runs the demo's commands one after the other, from the repository's root."""

    environment: Mapping[str, str]
    logs: Path
    say: Say

    def run(self, title: str, command: Sequence[str]) -> str:
        """Show the command and its progress; everything else goes to its log. Its last line, or InputError with the end
        of the log where it fails."""
        self.say(title)
        self.say(f"  $ {shlex.join(shorten(word) for word in command)}")
        started, last = time.monotonic(), ""
        log_path = self.logs / f"{title.split(']')[0][1]}-{title.split()[1].rstrip(':')}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with (
            log_path.open("w") as log,
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(self.environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    log.write(line)
                    text = PREFIX.sub("", line).strip()
                    if OURS.match(text):
                        last = text
                        self.say(f"  {text}")
            except BaseException:
                process.terminate()
                raise
        if process.returncode != 0:
            tail = "\n".join(log_path.read_text().splitlines()[-30:])
            raise InputError(
                f"{title.split('] ')[1].split(':')[0]} failed with exit code {process.returncode}; run make demo again after "
                f"repairing what its log, {str(log_path)!r}, says; it ends:\n{tail}"
            )
        self.say(f"  {duration(time.monotonic() - started)}")
        return last


def shorten(word: str) -> str:
    """A path below the repository as a person at its root would type it."""
    return str(Path(word).relative_to(ROOT)) if word.startswith(str(ROOT)) else word


def digit_key(number: int) -> str:
    """The key of digit `number`: 40 hex digits, as LSUN's."""
    return hashlib.sha1(f"digit-{number}".encode()).hexdigest()


def write_lmdb(folder: Path) -> None:
    """scikit-learn's 1,797 digits as LSUN ships images: WebP, shorter side 256, any aspect, 40-hex keys."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with lmdb.open(str(temporary), map_size=1 << 28) as environment, environment.begin(write=True) as transaction:
        for number, digit in enumerate(load_digits().images):
            ink = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8)).resize(
                (256, 256), Image.Resampling.NEAREST
            )
            margin = 8 * (number % 9)  # 0 to 64 pixels at each end of the longer side
            upright = number % 2 == 0
            canvas = Image.new("L", (256, 256 + 2 * margin) if upright else (256 + 2 * margin, 256))
            canvas.paste(ink, (0, margin) if upright else (margin, 0))
            encoded = io.BytesIO()
            canvas.convert("RGB").save(encoded, format="WEBP", quality=90, method=0)
            transaction.put(digit_key(number).encode(), encoded.getvalue())
    temporary.rename(folder)


class DigitNetwork(nn.Module):
    """uint8 [N,1,8,8] -> (features [N,64], logits [N,10])."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(32 * 6 * 6, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images.to(torch.float32) / 255.0)
        return features, self.head(features)


def train_extractor(path: Path, dataset: ShardedDataset) -> float:
    """Train a digit classifier on four fifths of the shards, write it as TorchScript; its accuracy on the rest."""
    labels_by_key = {digit_key(number): int(label) for number, label in enumerate(load_digits().target)}
    keys = [key for shard in range(len(dataset.manifest["shards"])) for key in dataset.keys(shard)]
    labels = torch.tensor([labels_by_key[key] for key in keys])
    pixels = torch.from_numpy(dataset.pixels(range(len(dataset)))).permute(0, 3, 1, 2).contiguous()
    held_out = torch.arange(len(keys)) % 5 == 0  # keys are hashes, so this is a random fifth
    train_pixels, train_labels = pixels[~held_out], labels[~held_out]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DigitNetwork()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for epoch in range(15):
        for batch in rng.permutation(0, "digits", epoch, len(train_labels)).split(64):
            loss = nn.functional.cross_entropy(network(train_pixels[batch])[1], train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        right = network(pixels[held_out])[1].argmax(1) == labels[held_out]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is what a downloaded extractor comes as
        scripted = torch.jit.script(network)
        with committed_file(path) as temporary:
            torch.jit.save(scripted, str(temporary))
    return float(right.float().mean())
