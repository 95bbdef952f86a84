"""What kind of GPUs the cluster has, and how a network is best run on them."""

import os
import re

import ray
import torch
from ray._private.utils import read_ray_address

from ddpm_core.configs import Execution
from pipelines.runtime.cluster import connect
from pipelines.runtime.progress import Say

_BFLOAT16 = re.compile(r"(A10|A40|A100|A800|L4|L20|L40|H20|H100|H200|H800|GH200|B200|GB200|B300|GB300|RTX)")


def choose_execution(execution: Execution, say: Say) -> tuple[Execution, str]:
    """(an execution with every choice made, why). In mode auto it is fast if all GPUs of the cluster multiply in bfloat16,
    by what Ray says of them; then that is said."""
    if execution.mode != "auto":
        return execution.resolved(fast=execution.mode == "fast"), f"as asked for: {execution.mode}"
    fast, reason = _multiply_in_bfloat16()
    chosen = execution.resolved(fast=fast)
    if fast:
        say(
            f"{chosen.network_precision}, channels-last and torch.compile, for {reason}; mode exact takes none of these"
        )
    return chosen, reason


def _multiply_in_bfloat16() -> tuple[bool, str]:
    """(whether all GPUs of the cluster do, why it is thought so)."""
    if not _may_have_gpus() or not connect().gpus:
        return False, "there is no GPU"
    kinds = gpu_kinds()
    if not kinds:
        return False, "Ray does not say which GPUs there are"
    others = [kind for kind in kinds if not _BFLOAT16.match(kind)]
    if others:
        return False, f"GPUs {', '.join(others)} are not known to multiply in bfloat16"
    return True, f"GPUs {', '.join(kinds)}"


def _may_have_gpus() -> bool:
    """False if Ray would have to be started on this machine, which has no GPU: that takes seconds, and nothing of it."""
    started = ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS")) or bool(read_ray_address())
    return started or torch.cuda.is_available()


def gpu_kinds() -> list[str]:
    """Of the cluster, as Ray names them, such as H100."""
    kinds = (key.removeprefix("accelerator_type:") for key in ray.cluster_resources() if "accelerator_type:" in key)
    return sorted(kinds)
