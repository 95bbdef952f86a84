"""A training by four workers on four nodes, and an evaluation while one node dies and another joins, all over an object store: no
node has a folder in common with another.

Run in a process of its own, for a second Ray cannot start in the process of the first: nodes_without_disk.py SHARDS STORAGE
TRACKING FOLDER ENDPOINT. The last line that it prints is the checkpoint's URL.
"""

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest  # the token, before ray is imported
import ray
from ray.cluster_utils import Cluster

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.driver import evaluate
from pipelines.shards.dataset import ShardedDataset
from pipelines.train.driver import train
from support.node_scenarios import busy, in_folder
from support.training import config

assert conftest.ROOT.is_dir()
WORKERS = 4
MEASURING: dict[str, Any] = {
    "extractor": "pixels",
    "samples": 400,
    "chunk_size": 10,
    "batch_size": 10,
    "sampler": "ddim",
    "sampler_steps": 100,
    "pictures": 0,
}


def with_a_disk(folder: Path) -> None:
    """Processes that are started from here on have everything in a folder of their own."""
    in_folder(folder)
    os.environ["HOME"], os.environ["XDG_CACHE_HOME"] = str(folder), str(folder / "cache")


def main(shards: str, storage: str, tracking: str, folder: Path) -> None:
    folder.mkdir()
    with_a_disk(folder / "head")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = []
    for number in range(WORKERS):
        with_a_disk(folder / f"node-{number}")
        nodes.append(cluster.add_node(num_cpus=1))
    cluster.wait_for_nodes()
    with_a_disk(folder / "driver")
    ray.init(address=cluster.address, log_to_driver=False)
    place: dict[str, Any] = {"storage": storage, "tracking_uri": tracking}
    asked = config(ShardedDataset.open(shards), Path(), workers=WORKERS, cpus_per_worker=1.0)
    trained = train(replace(asked, **place))
    begun = threading.Event()

    def say(line: str) -> None:
        print(line, flush=True)
        if " samples |" in line:
            begun.set()

    measured = EvaluateConfig(run=str(trained.last.path), **place, **MEASURING)
    measuring = threading.Thread(target=lambda: evaluate(measured, say))
    measuring.start()
    assert begun.wait(120)
    cluster.remove_node(busy(nodes), allow_graceful=False)
    with_a_disk(folder / "joining")
    cluster.add_node(num_cpus=1)
    measuring.join()
    print(trained.last.path, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ["AWS_ENDPOINT_URL"] = sys.argv[5]  # conftest has given this process one of its own
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
