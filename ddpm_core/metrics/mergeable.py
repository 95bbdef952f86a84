"""The base of the metrics: a torchmetrics Metric whose state is a value that merges, saves and loads.

Workers update their own metric, hand over `statistics()` (a flat dict of tensors, ready for safetensors),
and one process merges them in any order or grouping. States are float64 sums, or samples addressed by their
index, so the order changes a state by rounding alone, less than 1e-12 of it, and a result by as much times
its own conditioning (`frechet_distance` says how it does; a score or KID, by 1e-12). Merging in one fixed
order gives the same bits.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class Mergeable(Metric):
    """A Metric with a merge that accepts stored statistics, and without torchmetrics' traps around merging.

    Those are: a cached result that survives a merge, a warning that `compute` came before `update` (a merged
    metric may never see one), and dict states that are added without a look at their shapes.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)

    @property
    def update_called(self) -> bool:
        return True  # an empty metric says so itself, with an error

    def statistics(self) -> dict[str, Tensor]:
        """The state as one tensor a name; `merge_state` of a fresh metric takes it back exactly."""
        return {
            name: (torch.cat(value) if value else torch.empty(0)) if isinstance(value, list) else value.clone()
            for name, value in self.metric_state.items()
        }

    def merge_state(self, incoming_state: "Mapping[str, Tensor] | Mergeable") -> None:
        """Add another metric's state, or stored `statistics()`. Raises ValueError if names or shapes differ."""
        statistics = incoming_state.statistics() if isinstance(incoming_state, Mergeable) else incoming_state
        own = self.metric_state
        if set(statistics) != set(own):
            raise ValueError(
                f"incoming_state must hold {sorted(own)} to merge into {type(self).__name__}; "
                f"it holds {sorted(statistics)}"
            )
        prepared: dict[str, Tensor | list[Tensor]] = {}
        for name, state in own.items():
            incoming = statistics[name].to(self.device)
            if isinstance(state, list):
                prepared[name] = [incoming] if incoming.numel() else []
            elif incoming.shape != state.shape:
                raise ValueError(
                    f"incoming_state[{name!r}] must be {list(state.shape)} to merge into "
                    f"{type(self).__name__}; it is {list(incoming.shape)}"
                )
            else:
                prepared[name] = incoming.to(state.dtype)
        super().merge_state(prepared)


class IndexedFeatures(Mergeable):
    """Features of samples with their indices: for metrics that look at subsets or at neighbours.

    Keeps every feature in the precision it came in (50,000 x 2048 float32: 400 MB); arithmetic is float64.
    """

    features: list[Tensor]
    indices: list[Tensor]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.add_state("features", default=[], dist_reduce_fx="cat")
        self.add_state("indices", default=[], dist_reduce_fx="cat")

    def update(self, features: Float[Tensor, "n d"], indices: Int[Tensor, " n"]) -> None:
        """Add n samples. Raises ValueError if a feature is not finite or the shapes do not fit."""
        check_features(features, self.dim)
        if indices.shape != features.shape[:1]:
            raise ValueError(f"indices must be [{len(features)}], one a sample; they are {list(indices.shape)}")
        self.features.append(features.detach().clone())
        self.indices.append(indices.detach().to(features.device, torch.int64))

    def ordered(self) -> Float[Tensor, "n d"]:
        """All features in the order of their indices. Raises ValueError if an index came twice, or none came."""
        features, indices = _joined(self.features), _joined(self.indices)
        if not isinstance(features, Tensor) or not isinstance(indices, Tensor):
            raise ValueError(f"{type(self).__name__} has seen no samples: call update first")
        indices, order = torch.sort(indices)
        check_features(features, self.dim)  # merged ones have not been looked at
        twice = indices[1:][indices[1:] == indices[:-1]]
        if len(twice):
            raise ValueError(f"indices must be distinct; sample {int(twice[0])} came more than once")
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return features  # itself: there may be 400 MB of them
        return features[order]


def _joined(state: "list[Tensor] | Tensor") -> "Tensor | list[Tensor]":
    """A state as one tensor, which torchmetrics makes it when it gathers ranks; an empty list stays one."""
    if isinstance(state, Tensor) or not state:
        return state
    return state[0] if len(state) == 1 else torch.cat(state)


def check_features(features: Tensor, dim: int, name: str = "features") -> None:
    """ValueError unless floating point [N, dim] and finite."""
    if not features.is_floating_point() or features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"{name} must be floating-point [N, {dim}]; they are {features.dtype} {list(features.shape)}")
    if not is_finite(features):
        row = int((~torch.isfinite(features)).any(1).nonzero()[0])
        raise ValueError(f"{name} must be finite; row {row} holds NaN or infinity")


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # NaN and infinity survive a sum, which is 20 times as fast; a sum may also overflow.
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())
