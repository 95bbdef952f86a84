"""A training's workers, as Ray Train runs them."""

import os
from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from ddpm_core.errors import InputError
from pipelines.runtime.cluster import has_dashboard, kept_by_ray
from pipelines.storage.layout import Run, Storage
from pipelines.train.worker import WorkerTask, run_worker


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's, without the process that keeps sets of Ray Data, for workers read shards themselves; and, if there is no dashboard
    for that to ask every second, without the watch for a controller that died: a Ray without one is this command's own, and
    ends with it, its placement groups too."""

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback,) if has_dashboard() else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]


def make_trainer(task: WorkerTask, run: Run, storage: Storage, *, use_gpu: bool) -> Trainer:
    config = task.config
    if not has_dashboard():  # a Ray of the command's own, which nobody tells that its node is about to go
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return Trainer(
        run_worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            **kept_by_ray(storage.ray),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def input_error(error: BaseException) -> InputError | None:
    """The InputError that a worker raised, such as for a full disk, from within what Ray made of it."""
    failures: list[BaseException] = [error]
    if isinstance(error, ray.train.WorkerGroupError):
        failures += [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
    return next((failure for failure in failures if isinstance(failure, InputError)), None)
