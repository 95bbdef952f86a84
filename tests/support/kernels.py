"""How many kernels an eager computation would launch on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import config, metrics
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_core.precision import UNCUT
from support.gaussian_case import unchecked

# Allocate, or read nothing but a shape.
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}


class KernelCount(TorchDispatchMode):
    """Counts the operators that compute something, one kernel each; views and allocations are none. A foreach operator is
    one, though a GPU may launch a few for it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.names: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NOTHING:
            self.count += 1
            self.names[name] = self.names.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def kernels(run: Callable[[], Any]) -> int:
    """Of a function's call, if nothing is compiled."""
    with KernelCount() as counter:
        run()
    return counter.count


def compiled(run: Callable[..., Tensor], *args: Tensor) -> tuple[int, int]:
    """(how many kernels the inductor generates for a function of these tensors, how many bytes those read and write). They
    are not built. Expressions are cut where they would be for a GPU, which is sooner than for a CPU."""
    [(graph, inputs)] = graphs(run, *args)
    return _lowered(graph, inputs, {"realize_opcount_threshold": 30})


def compiled_gradient(run: Callable[..., Tensor], *args: Tensor) -> tuple[int, int]:
    """The same of the gradient by those tensors that want one, compiled as a network is."""
    _, (graph, inputs) = graphs(run, *args)
    return _lowered(graph, inputs, UNCUT)


def graphs(run: Callable[..., Tensor], *args: Any) -> list[tuple[GraphModule, list[Tensor]]]:
    """The operators that the inductor gets of a function, then of its gradient if one is wanted, and the inputs of each,
    without values."""
    found: list[tuple[GraphModule, list[Tensor]]] = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Any:
        found.append((graph, list(inputs)))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    with unchecked():
        out = torch.compile(run, fullgraph=True, dynamic=False, backend=backend)(*args)
        if out.requires_grad:
            out.backward(torch.ones_like(out))
    return found


def _lowered(graph: GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> tuple[int, int]:
    metrics.reset()
    with config.patch(options), V.set_fake_mode(detect_fake_mode(inputs)):
        lowering = GraphLowering(graph)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering.codegen()
            return metrics.generated_kernel_count, lowering.count_bytes()[0]
