"""A Ray head of this machine's own, which ends with this process."""

import contextlib
import functools
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock


@contextlib.contextmanager
def ray_cluster(variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A Ray head on free ports of 127.0.0.1, with a token of its own; yields the environment in which commands find it.
    variables: of the environment of its processes, those of submitted jobs and workers among them."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    interpreter = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.update(token, PATH=interpreter, **variables)
    os.environ.pop("RAY_ADDRESS", None)
    import ray  # here, not above: Ray reads the token's environment when it is imported
    from ray._private import parameter
    from ray._private.utils import write_ray_address

    # The agent that takes submitted jobs listens on 52365 of every Ray of a machine, and ray.init has no argument for
    # it (`ray start` has): beside another Ray no job could be submitted.
    any_agent_port = functools.partial(parameter.RayParams, dashboard_agent_listen_port=free_port())
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path, for there are sockets in it
    with mock.patch.object(parameter, "RayParams", any_agent_port):
        context = ray.init(
            _temp_dir=folder,
            num_cpus=max(2, os.cpu_count() or 2),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=free_port(),
            object_store_memory=256 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    # A submitted job goes to the Ray that this file names; without it, to any Ray of the machine.
    write_ray_address(str(context.address_info["gcs_address"]), folder)
    for name in variables:  # this process is none of them
        del os.environ[name]
    try:
        # Commands and drivers find the cluster by its GCS address, `ray job submit` by the dashboard's.
        addresses = {
            "RAY_ADDRESS": str(context.address_info["gcs_address"]),
            "RAY_API_SERVER_ADDRESS": f"http://{context.dashboard_url}",
        }
        yield {**os.environ, **variables, **addresses, "PYTHONUNBUFFERED": "1"}
    finally:
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)  # after an error, what Ray wrote may say why


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
