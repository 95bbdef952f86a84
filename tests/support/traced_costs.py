"""What a network costs by running it on shapes alone: FLOPs and parameters as PyTorch counts them, bytes that autograd keeps."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core.configs import Precision
from ddpm_core.dropout import dropout_keys
from ddpm_core.precision import autocast
from ddpm_core.unet import UNet, UNetConfig


def parameters(unet: UNetConfig) -> int:
    return sum(p.numel() for p in _on_meta(unet).parameters())


def forward_flops(unet: UNetConfig) -> int:
    with FlopCounterMode(display=False) as counter:
        _on_meta(unet)(*_inputs(unet, 2, "meta"))
    return counter.get_total_flops() // 2


def training_flops(unet: UNetConfig) -> int:
    with FlopCounterMode(display=False) as counter:
        _on_meta(unet)(*_inputs(unet, 2, "meta")).sum().backward()
    return counter.get_total_flops() // 2


def saved(unet: UNetConfig, batch: int, precision: Precision, checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, the weights' own left out. Checkpointed: the
    layers' inputs and what lies between layers, and at the fullest moment one layer's own."""
    with FakeTensorMode():
        model = UNet(unet)
        kept = _Kept(model, checkpointing)
        x, t, *key = _inputs(unet, batch, "cpu")
        with (
            torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
            autocast(torch.device("cpu"), precision),
        ):
            kept.add(model(x, t, *key), None)
    return kept.bytes_at_the_fullest()


class _Kept:
    """The storages that one forward pass of a network keeps, by the layer that keeps them; None for those between layers."""

    def __init__(self, model: UNet, checkpointing: bool) -> None:
        self.checkpointing = checkpointing
        self.sizes: dict[int, int] = {}  # of each storage
        self.by_layer: dict[nn.Module | None, set[int]] = defaultdict(set)
        self.layer: nn.Module | None = None  # the one that runs now
        self._alive: list[Tensor] = []  # a freed storage's number would be another's soon
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        for layer in (*model.down, model.mid1, model.mid2, *model.up):
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def add(self, tensor: Any, layer: nn.Module | None) -> None:
        """Count what a tensor lies in, unless it is a weight."""
        if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._weights:
            storage = tensor.untyped_storage()
            self._alive.append(tensor)
            self.sizes[storage._cdata] = storage.nbytes()
            self.by_layer[layer].add(storage._cdata)

    def pack(self, tensor: Tensor) -> Tensor:
        """autograd's hook: it keeps this tensor."""
        self.add(tensor, self.layer)
        return tensor

    def bytes_at_the_fullest(self) -> int:
        """What lies between layers and in all of them; checkpointed, in the one that keeps most."""
        between = self.by_layer[None]
        inside = [
            sum(self.sizes[storage] for storage in storages - between)
            for layer, storages in self.by_layer.items()
            if layer is not None
        ]
        return sum(self.sizes[storage] for storage in between) + (max(inside) if self.checkpointing else sum(inside))

    def _enter(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.layer = layer

    def _leave(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.layer = None
        if self.checkpointing:
            self.add(output, None)  # the next layer's input, and a skip


def _on_meta(unet: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(unet)


def _inputs(unet: UNetConfig, batch: int, device: str) -> list[Tensor]:
    x = torch.zeros(batch, unet.in_channels, unet.image_size, unet.image_size, device=device)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    return [x, t, dropout_keys(0, t, unet.dropout_layers)] if unet.dropout_layers else [x, t]
