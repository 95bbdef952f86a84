"""Checkpoints: a folder of safetensors and JSON, complete or absent.

model.safetensors  ema.safetensors   weights, float32
averages.safetensors                 the averages that post-hoc EMA is made of, if they are tracked
optimizer.pt                         optimizer state, tensors only, read with weights_only
history.jsonl                        the run's log records up to here, from its first step on, one a line
manifest.json                        step, configuration, every file's sha256; written last

A file is read once and what was read is checked, so that a checkpoint that is deleted or replaced beneath its reader
gives its own values or an error. Torch is imported where tensors are read or written: to list checkpoints takes none.
"""

import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypeVar, cast

from safetensors import SafetensorError
from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.commit import (
    MANIFEST,
    FileFacts,
    Manifest,
    ReadablePath,
    check_manifest,
    committed_folder,
    read_manifest,
)
from ddpm_core.configs import DiffusionConfig, UNetConfig, Weights
from ddpm_core.errors import InputError, one_line
from ddpm_core.ranges import Count
from ddpm_core.records import checkpoint_name as checkpoint_name

if TYPE_CHECKING:
    import torch

    import ddpm_core.training
    import ddpm_core.unet

WHAT = "checkpoint"
HISTORY = "history.jsonl"
AVERAGES = "averages.safetensors"
NAME = re.compile(r"step-(\d{8,})")
Part = TypeVar("Part")


class CheckpointManifest(Manifest):
    step: Count[int]
    config: dict[str, Any]


class LogRecord(TypedDict):
    """A line of the history: the values that were logged at a step, or what a step under way has measured so far."""

    step: NotRequired[Count[int]]


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint; nothing is read but its manifest until it is asked for."""

    path: ReadablePath
    step: int
    config: Mapping[str, Any]
    files: Mapping[str, FileFacts]

    @property
    def made_of(self) -> Mapping[str, Any] | None:
        """Of an EMA that was put together after the training: its `length`, the `steps` of the averages it was made of, and the
        relative `error` of its profile."""
        return self.config.get("made_of")

    def unet_config(self) -> UNetConfig:
        """The network that the weights fit. Raises InputError if the manifest does not say."""
        return self._part_of_config("unet", UNetConfig)

    def diffusion_config(self) -> DiffusionConfig:
        """The process that the network was trained for. Raises InputError if the manifest does not say."""
        return self._part_of_config("diffusion", DiffusionConfig)

    def _part_of_config(self, key: str, kind: Callable[..., Part]) -> Part:
        try:
            return typed.build(kind, self.config.get(key))
        except ValueError as error:
            raise InputError(
                f"{WHAT} {str(self.path)!r} has a {MANIFEST} with a damaged {key!r} in its config ({error}): take another"
            ) from error

    def weights(self, kind: Weights = "ema") -> dict[str, "torch.Tensor"]:
        """The network's weights, on the CPU. Raises InputError if the file is damaged or gone."""
        return self._tensors(_weights_file(kind))

    def averages(self) -> dict[str, "torch.Tensor"]:
        """The tracked averages, by length and name, on the CPU. Raises InputError if there are none, or they are damaged."""
        return self._tensors(AVERAGES)

    def _tensors(self, file: str) -> dict[str, "torch.Tensor"]:
        from safetensors.torch import load

        try:
            return load(self._read(file))
        except SafetensorError as error:
            raise self._damaged(file, error) from error

    def network(self, kind: Weights = "ema") -> "ddpm_core.unet.UNet":
        """The network with its weights, on the CPU. Raises InputError if a file is damaged or gone, or the weights are another
        network's."""
        from ddpm_core.unet import UNet

        network, weights = UNet(self.unet_config()), self.weights(kind)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:  # other names or shapes
            raise self._damaged(_weights_file(kind), "it does not fit the network of its manifest") from error
        return network

    def weights_sha256(self, kind: Weights) -> str:
        """The sha256 of the weights' file, as the manifest states it: what protocols and chunks are keyed by."""
        return str(self._facts(_weights_file(kind))["sha256"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log records of the run so far, in order, read anew. Raises InputError if the file is damaged or gone."""
        try:
            records = [typed.parse_json(line, LogRecord) for line in self._read(HISTORY).splitlines()]
        except InputError:
            raise
        except ValueError as error:
            raise self._damaged(HISTORY, error) from error
        return cast(list[dict[str, Any]], records)

    def restore(self, state: "ddpm_core.training.TrainState") -> None:
        """Put model, EMA, optimizer, step and, if it tracks them, averages back into `state`. Raises InputError if a file is
        damaged or gone; `state` stays as it was then."""
        import torch

        model, ema = self.weights("raw"), self.weights("ema")
        averages = self.averages() if state.averages else {}
        content = io.BytesIO(self._read("optimizer.pt"))
        try:
            optimizer = torch.load(content, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{WHAT} {str(self.path)!r} has an optimizer.pt that holds more than tensors and numbers, which could run "
                "code when it is loaded: take a checkpoint that this program wrote"
            ) from error
        except Exception as error:  # torch's reader raises whatever the bytes lead it to
            raise self._damaged("optimizer.pt", f"{type(error).__name__}: {one_line(error)}") from error
        try:
            state.load_state_dict(
                {"model": model, "ema": ema, "optimizer": optimizer, "step": self.step, "averages": averages}
            )
        except (RuntimeError, LookupError, ValueError, TypeError) as error:  # other names or shapes than the state's
            raise InputError(
                f"{WHAT} {str(self.path)!r} holds the state of another network or optimizer: take another"
            ) from error

    def _damaged(self, name: str, reason: object) -> InputError:
        return InputError(f"{WHAT} {str(self.path)!r} has a damaged file {name!r} ({reason}): take another")

    def _facts(self, name: str) -> FileFacts:
        if name not in self.files:
            raise InputError(f"{WHAT} {str(self.path)!r} holds no {name}: it is the folder of something else")
        return self.files[name]

    def _read(self, name: str) -> bytes:
        """A file's bytes, of the sha256 that the manifest states."""
        facts = self._facts(name)
        try:
            content = typed.read_whole(self.path / name)
        except FileNotFoundError as error:
            raise InputError(
                f"{WHAT} {str(self.path)!r} lacks its file {name!r}, for instance because the run has deleted it "
                "meanwhile: take another, or have the run keep more"
            ) from error
        except Exception as error:  # every file system raises its own
            raise InputError(
                f"{WHAT} {str(self.path)!r} has a file {name!r} that cannot be read ({type(error).__name__}: {error}): "
                "try again, or take another"
            ) from error
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise InputError(
                f"{WHAT} {str(self.path)!r} has a damaged file {name!r} (sha256 differs): take another, or make it again"
            )
        return content


def _weights_file(kind: Weights) -> str:
    return "ema.safetensors" if kind == "ema" else "model.safetensors"


def snapshot(state: "ddpm_core.training.TrainState", into: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """state.state_dict() copied to the CPU's memory, which later steps leave alone.

    into: an earlier snapshot that is no longer needed. Its memory is written over, for new memory costs many times the
    copy. What lies on a GPU goes to pinned memory, all of it under way at once, with one synchronisation.
    """
    import torch

    saved: dict[str, Any] = _copied(state.state_dict(), into)
    device = next(state.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return saved


def _copied(value: Any, into: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        fits = isinstance(into, torch.Tensor) and (into.dtype, into.shape, into.stride()) == (
            value.dtype,
            value.shape,
            value.stride(),
        )
        buffer = into if fits else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffer.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        earlier = into if isinstance(into, Mapping) else {}
        return {key: _copied(item, earlier.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, None) for item in value)
    return value


def write_checkpoint(
    folder: Path,
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
) -> Checkpoint:
    """Write a snapshot(), or of weights to evaluate alone its step and EMA, to folder/step-00001234, with all records of the run
    so far. It appears whole, under its final
    name, or not at all. Raises OSError if the disk is full or gone. Its calls let other threads run all the while."""
    from safetensors.torch import save_file

    path = folder / checkpoint_name(saved["step"])
    with committed_folder(path, {"step": saved["step"], "config": config}) as temporary:
        for kind in ("model", "ema", "averages"):
            if kind not in saved:
                continue
            weights = {name: tensor.contiguous() for name, tensor in saved[kind].items()}
            try:
                save_file(weights, temporary / f"{kind}.safetensors")
            except SafetensorError as error:  # safetensors wraps the OSError of a full disk in its own
                raise OSError(str(error)) from error
        if "optimizer" in saved:
            _save_tensors(saved["optimizer"], temporary / "optimizer.pt")
        with (temporary / HISTORY).open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in history)
    return open_checkpoint(path)


def _save_tensors(value: Any, path: Path) -> None:
    """torch.save(), with an OSError of the disk as such, and without holding the interpreter's lock."""
    import torch

    try:
        with path.open("wb") as file:  # given a name, torch.save writes with the interpreter locked
            torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # what stopped it, before it fell over its own half of a file
            raise error.__context__ from None
        raise


def open_checkpoint(path: ReadablePath) -> Checkpoint:
    """The checkpoint at `path`. Raises InputError if there is no finished one."""
    manifest = check_manifest(path, read_manifest(path, what=WHAT), CheckpointManifest, what=WHAT)
    return Checkpoint(path, manifest["step"], manifest["config"], manifest["files"])


def list_steps(folder: ReadablePath) -> list[int]:
    """The steps of a run's finished checkpoints, ascending; what a killed writer left is not among them."""
    if not folder.is_dir():
        return []
    named = [(path, match) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return sorted(int(match[1]) for path, match in named if (path / MANIFEST).is_file())


def list_checkpoints(folder: ReadablePath, steps: Iterable[int] | None = None) -> list[Checkpoint]:
    """The finished checkpoints of a run, by ascending step, without those that are deleted in this moment. steps: as they are
    known, by default as `list_steps` finds them."""
    checkpoints = []
    for step in list_steps(folder) if steps is None else steps:
        try:
            checkpoints.append(open_checkpoint(folder / checkpoint_name(step)))
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return checkpoints
