"""Checkpoints: a folder of safetensors and JSON, complete or absent.

model.safetensors  ema.safetensors   weights, float32
optimizer.pt                         optimizer state, tensors only, read with weights_only
manifest.json                        step, configuration, every file's sha256; written last
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_core.commit import committed_folder, read_manifest, verify_files
from ddpm_core.diffusion import DiffusionConfig
from ddpm_core.errors import InputError
from ddpm_core.training import TrainState
from ddpm_core.unet import UNetConfig

WHAT = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint on disk; nothing is read but its manifest until it is asked for."""

    path: Path
    step: int
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, float | int]]  # the log records since the checkpoint before
    files: Mapping[str, Mapping[str, Any]]

    def unet_config(self) -> UNetConfig:
        """The network that the weights fit."""
        return UNetConfig(**_tuples(self.config["unet"]))

    def diffusion_config(self) -> DiffusionConfig:
        """The process that the network was trained for."""
        return DiffusionConfig(**self.config["diffusion"])

    def weights(self, kind: Literal["ema", "raw"] = "ema") -> dict[str, Tensor]:
        """The network's weights, after a check of their sha256. InputError where the file is damaged."""
        name = self._weights_file(kind)
        verify_files(self.path, {"files": {name: self.files[name]}}, what=WHAT)
        return load_file(self.path / name)

    def weights_sha256(self, kind: Literal["ema", "raw"] = "ema") -> str:
        return str(self.files[self._weights_file(kind)]["sha256"])

    def _weights_file(self, kind: Literal["ema", "raw"]) -> str:
        name = "ema.safetensors" if kind == "ema" else "model.safetensors"
        if name not in self.files:
            raise InputError(f"{WHAT} {str(self.path)!r} holds no {name}: it is the folder of something else")
        return name

    def restore(self, state: TrainState) -> None:
        """Put model, EMA, optimizer and step back into `state`. InputError where a file is damaged."""
        verify_files(self.path, {"files": self.files}, what=WHAT)
        try:
            optimizer = torch.load(self.path / "optimizer.pt", weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{WHAT} {str(self.path)!r} has an optimizer.pt that holds more than tensors and numbers, which could run "
                "code when it is loaded: take a checkpoint that this program wrote"
            ) from error
        state.load_state_dict(
            {
                "model": load_file(self.path / "model.safetensors"),
                "ema": load_file(self.path / "ema.safetensors"),
                "optimizer": optimizer,
                "step": self.step,
            }
        )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def save_checkpoint(
    folder: Path, state: TrainState, config: Mapping[str, Any], history: Sequence[Mapping[str, float | int]] = ()
) -> Checkpoint:
    """Write `state` to folder/step-00001234. It appears whole, under its final name, or not at all."""
    path = folder / f"step-{state.step:08d}"
    saved = state.state_dict()
    with committed_folder(path, {"step": state.step, "config": config, "history": list(history)}) as temporary:
        for kind in ("model", "ema"):
            weights = {name: tensor.contiguous() for name, tensor in saved[kind].items()}
            save_file(weights, temporary / f"{kind}.safetensors")
        torch.save(saved["optimizer"], temporary / "optimizer.pt")
    return open_checkpoint(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """InputError where there is no finished checkpoint at `path`."""
    manifest = read_manifest(path, what=WHAT)
    missing = {"step", "config", "history", "files"} - manifest.keys()
    if missing:
        raise InputError(
            f"{WHAT} {str(path)!r} has a manifest without {', '.join(sorted(missing))}: it is the folder of something "
            "else; give one named step-..."
        )
    return Checkpoint(path, manifest["step"], manifest["config"], manifest["history"], manifest["files"])


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The finished checkpoints of a run, by ascending step; what a killed writer left is not among them."""
    paths = sorted(path.parent for path in folder.glob("step-*/manifest.json"))
    return sorted((open_checkpoint(path) for path in paths), key=lambda checkpoint: checkpoint.step)
