"""A training over the nodes of a cluster on one machine, each in a folder of its own, while some of them go or one comes:
"lost" announces the end of one and kills another, "grown" starts one.

Run in a process of its own, for a second Ray cannot start in the process of the first: node_scenarios.py SCENARIO SHARDS
FOLDER CHANGES. The last line that it prints is the checkpoint's path.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import conftest  # the token, before ray is imported
import ray
from ray.cluster_utils import Cluster

from pipelines.shards.dataset import ShardedDataset
from pipelines.train.driver import train
from support.training import config

assert conftest.ROOT.is_dir()
NOTICE = 2.0  # seconds between the notice of a preemption and the end of the node


def in_folder(folder: Path) -> None:
    """Processes that are started from here on have another current folder."""
    folder.mkdir()
    os.chdir(folder)


def drain(node_id: str) -> None:
    """What a cloud's notice of a preemption becomes in Ray."""
    from ray.core.generated import autoscaler_pb2

    accepted, reason = ray._private.worker.global_worker.gcs_client.drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the cloud wants its machine back",
        int((time.time() + NOTICE) * 1000),
    )
    assert accepted, reason


def main(scenario: str, shards: str, folder: Path, changes: str) -> None:
    in_folder(folder / "head")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = []
    for number in range({"lost": 4, "grown": 1}[scenario]):
        in_folder(folder / f"node-{number}")
        nodes.append(cluster.add_node(num_cpus=1))
    cluster.wait_for_nodes()
    in_folder(folder / "driver")
    ray.init(address=cluster.address, log_to_driver=False)
    seen = {step: threading.Event() for step in (40, 120)}

    def say(line: str) -> None:
        print(line, flush=True)
        for step, event in seen.items():
            if line.startswith(f"train: {step} of "):
                event.set()

    settings = config(ShardedDataset.open(shards), Path("runs"), **json.loads(changes))
    result = []
    training = threading.Thread(target=lambda: result.append(train(settings, say)))
    training.start()
    # Nodes are started and stopped on the main thread, which alone may set the handlers of signals.
    assert seen[40].wait(120)
    if scenario == "lost":
        drain(busy(nodes).node_id)
        assert seen[120].wait(120)
        cluster.remove_node(busy(nodes), allow_graceful=False)
    else:
        in_folder(folder / "joining")
        cluster.add_node(num_cpus=1)
        os.chdir(folder / "driver")
    training.join()
    print(result[0].last.path, flush=True)
    ray.shutdown()
    cluster.shutdown()


def busy(nodes: Sequence[Any]) -> Any:
    """A node with a training worker on it."""
    free = ray._private.state.available_resources_per_node()
    return next(node for node in nodes if node.node_id in free and free[node.node_id].get("CPU", 0.0) < 1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
