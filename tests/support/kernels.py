"""How many kernels an eager computation would launch on a GPU."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._inductor import config, metrics
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

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
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    aot_function(run, keep, decompositions=select_decomp_table())(*args)
    [graph] = graphs
    lowering = GraphLowering(graph)
    metrics.reset()
    on_gpus = config.patch(realize_opcount_threshold=30)
    with on_gpus, V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
        lowering.run(*args)
        lowering.codegen()
        return metrics.generated_kernel_count, lowering.count_bytes()[0]
