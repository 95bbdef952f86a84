"""What tests share: a Ray of their own, small real images, and the samples that may lie beside the repository."""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.runtime.environment import prepare

# Before ray is imported: a token of this session's, so that no file is written into the home folder.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
prepare()
os.environ["DDPM_PROGRESS_SECONDS"] = "0"
# Credentials of nobody, and an address where s3_bucket may start a server: no test talks to a store elsewhere.
with socket.create_server(("127.0.0.1", 0)) as found:
    S3_PORT = found.getsockname()[1]
os.environ.update(AWS_ACCESS_KEY_ID="tests", AWS_SECRET_ACCESS_KEY="tests", AWS_DEFAULT_REGION="us-east-1")
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{S3_PORT}"
for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DDPM_INCEPTION_WEIGHTS"):
    os.environ.pop(variable, None)

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Small matrices: more threads than one only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and a trained network, where they lie beside the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the folder shared/data with real samples is not beside this repository")
    return path


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that need one: four logical CPUs, whatever the machine has."""
    import ray

    from pipelines.runtime.cluster import connect

    ray.init(
        "local", num_cpus=4, num_gpus=0, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False
    )
    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def digits_lmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as an LSUN-layout LMDB: non-square WebP images."""
    from pipelines.demo.digits import write_lmdb

    path = tmp_path_factory.mktemp("source") / "digits_train_lmdb"
    write_lmdb(path)
    return path


@pytest.fixture(scope="session")
def digits(ray_session: None, digits_lmdb: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those images as shards of 8x8, made by the real pipeline."""
    from pipelines.preprocess.config import PreprocessConfig
    from pipelines.preprocess.driver import preprocess

    output = tmp_path_factory.mktemp("shards") / "digits"
    config = PreprocessConfig(
        source=str(digits_lmdb), output=str(output), image_size=8, channels=1, images_per_shard=400
    )
    return preprocess(config)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """An S3 server of this session's own, support.s3_server.S3Server."""
    from support.s3_server import S3Server

    server = S3Server(S3_PORT)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_bucket(s3_server: Any) -> str:
    """The URL of an empty bucket on it."""
    import s3fs

    s3fs.S3FileSystem().mkdir("ddpm-tests")
    return "s3://ddpm-tests"


@pytest.fixture(scope="session")
def azure_container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty container on Azurite, Microsoft's emulator, where that and adlfs are installed."""
    adlfs = pytest.importorskip("adlfs", reason="adlfs is not installed: pip install '.[azure]'")
    program = Path(os.environ.get("DDPM_NODE_MODULES", "node_modules")) / ".bin" / "azurite-blob"
    if not program.exists():
        pytest.skip("Azurite is not in DDPM_NODE_MODULES: npm install azurite")
    from support.processes import wait_for

    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # everybody's
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};"
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    )
    place = ["--location", str(tmp_path_factory.mktemp("azurite")), "--blobPort", str(port)]
    server = subprocess.Popen([str(program), "--silent", "--skipApiVersionCheck", *place])
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
    adlfs.AzureBlobFileSystem().mkdir("ddpm-tests")
    yield "abfs://ddpm-tests"
    server.kill()
    server.wait()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of all contests with peers, if benchmarks ran."""
    contest = sys.modules.get("support.contest")
    if contest is not None and contest.ROWS:
        terminalreporter.section("ours against peers: their time over ours")
        terminalreporter.write_line(contest.table())
