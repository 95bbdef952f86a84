"""A training of some seconds, and what must be equal between two of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.training import OptimConfig
from ddpm_core.unet import UNetConfig
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import Storage
from pipelines.train.config import TrainConfig, config_for
from pipelines.train.session import TrainResult

NETWORK = UNetConfig(
    image_size=8, in_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dropout=0.1
)


OPTIM = OptimConfig(batch_size=8, lr=1e-3, warmup_steps=2, ema_decay=0.9)


def config(digits: ShardedDataset, storage: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "shards": str(digits.path),
        "storage": str(storage),
        "unet": NETWORK,
        "optim": OPTIM,
        "horizontal_flip": True,
        "steps": 12,
        "workers": 2,
        "checkpoint_every": 4,
        "log_every": 2,
    }
    return config_for("tiny", **{**values, **changes})


# Long enough to be killed on the way: some ten seconds.
LONG: dict[str, Any] = {"steps": 200, "log_every": 40, "checkpoint_every": 100, "keep_last": 1, "keep_every": None}


def result_of(folder: Path, checkpoints: Sequence[Checkpoint]) -> TrainResult:
    """What a training in a folder left, as if train() had just returned."""
    storage = Storage(folder.parent.parent)
    return TrainResult(storage, storage.run(folder.name), "", tuple(checkpoints))


def contents(result: TrainResult) -> dict[str, bytes]:
    """What must be equal: weights, EMA and optimizer of the last checkpoint, and every logged loss."""
    names = ("model.safetensors", "ema.safetensors", "optimizer.pt")
    return {name: (result.last.path / name).read_bytes() for name in names} | {"losses": repr(losses(result)).encode()}


def losses(result: TrainResult) -> list[tuple[float, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in result.last.history]


def starts(lines: list[str]) -> list[tuple[int, int]]:
    """(first step, workers) of each time that the training began or went on."""
    words = [line.split() for line in lines if " from step " in line]
    return [(int(line[-4].replace(",", "")), int(line[-2])) for line in words]
