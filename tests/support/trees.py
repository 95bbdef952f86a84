"""The CPU time of a command with all that it starts."""

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence

import psutil

POLL = 0.05  # seconds, the most of a process's time that is missed at its end


def tree_seconds(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """(CPU seconds of a command's whole tree, seconds). It must succeed.

    Processes are looked at while they run: Ray's raylet does not wait for its workers, so that what the kernel adds up for
    parents lacks them.
    """
    seconds: dict[psutil.Process, float] = {}
    known: set[psutil.Process] = set()
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                known = {*seconds, root, *root.children(recursive=True)}
            for each in known:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    seconds[each] = times.user + times.system
            time.sleep(POLL)
    assert process.returncode == 0
    return sum(seconds.values()), time.perf_counter() - started
