"""A checkpoint as a model of MLflow: mlflow.pyfunc.load_model("models:/NAME@best-fid").predict(n) draws n images.

MLflow calls this module by the name that a model's file, MLmodel, gives (tracking/run.py). That file refers to the weights,
which stay in their storage; nothing of a model is executed but this project's code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_core import images, rng
from ddpm_core.checkpoint import Checkpoint, open_checkpoint
from ddpm_core.commit import MANIFEST
from ddpm_core.configs import Weights
from ddpm_core.errors import InputError
from ddpm_core.samplers import sample
from pipelines.checkpoints.network import NetworkHolder
from pipelines.storage.locations import Location, location

BATCH = 4  # images that are always drawn together: float32 results depend on that in the last digits


@dataclass(frozen=True)
class ImageModel:
    """Draws images from a checkpoint by ancestral sampling."""

    checkpoint: Checkpoint
    weights: Weights
    networks: NetworkHolder = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "networks", NetworkHolder(self.weights))

    def predict(self, data: Any, params: Mapping[str, int] | None = None) -> np.ndarray:
        """uint8 images [n,h,w,c], of which the i-th depends on i, the seed and the steps alone: it is sample i of an evaluation
        that selects with the same. data: n, or a table or array of that one number. params: seed, by default 0; steps, by
        default all T.

        Raises InputError for an n, seed or steps that cannot be.
        """
        numbers = np.asarray(data).reshape(-1)
        if len(numbers) != 1 or int(numbers[0]) < 1:
            raise InputError(f"predict() got {numbers.tolist()}: give one number of images, 1 or more")
        count = int(numbers[0])
        unet, T = self.checkpoint.unet_config(), self.checkpoint.diffusion_config().num_timesteps
        given = {"seed": 0, "steps": T, **(params or {})}
        seed, steps = int(given["seed"]), int(given["steps"])
        if not 1 <= steps <= T:
            raise InputError(f"predict() got steps {steps}: give 1 to {T}")
        diffusion, network = self.networks.of(self.checkpoint)
        shape = (unet.in_channels, unet.image_size, unet.image_size)
        drawn = []
        for start in range(0, count, BATCH):
            indices = torch.arange(start, start + BATCH, device=self.networks.device)
            noise = rng.SampleNoise(seed, indices, shape, purpose="selection")
            x = sample(diffusion, network, (BATCH, *shape), noise=noise, method="ancestral", steps=steps)
            drawn.append(images.to_uint8(x).cpu())
        return torch.cat(drawn)[:count].numpy()


def _load_pyfunc(path: str, model_config: Mapping[str, str]) -> ImageModel:
    """What MLflow calls. path: of the model's files. model_config: from MLmodel, but for what the caller gave instead.

    Raises InputError if the checkpoint is not there or another one.
    """
    place = find_checkpoint(Path(path), model_config["storage"], model_config["checkpoint"])
    checkpoint = open_checkpoint(place)
    weights: Weights = "raw" if model_config["weights"] == "raw" else "ema"
    if checkpoint.weights_sha256(weights) != model_config["sha256"]:
        raise InputError(
            f"checkpoint {str(place)!r} was made anew since MLflow recorded this model: evaluate it again, and load the model "
            "then"
        )
    return ImageModel(checkpoint, weights)


def find_checkpoint(files: Path, storage: str, checkpoint: str) -> Location:
    """Where a checkpoint, given by its path in the storage, lies: in that storage, or in the one that the model's files lie in
    now. Raises InputError if in neither."""
    given = location(storage, option="storage") / checkpoint
    for place in (given, *(folder / checkpoint for folder in files.absolute().parents)):
        if (place / MANIFEST).is_file():
            return place
    raise InputError(
        f"the weights of this model are not at {str(given)!r}: if their storage has moved, give its path as "
        'load_model(..., model_config={"storage": PATH}), and if the training has deleted them, choose another model'
    )
