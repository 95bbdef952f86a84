"""Messages to a driver from those processes of Ray's that work for it."""

import contextlib
import queue as queues
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import ray.util.queue

WAIT = 0.5  # seconds for a message, before the next look at whether the block is left


class MessageQueue(Protocol):
    """What is used of ray.util.queue.Queue."""

    def put(self, item: Any) -> None: ...
    def get(self, block: bool = True, timeout: float | None = None) -> Any: ...


@contextlib.contextmanager
def message_queue() -> "Iterator[ray.util.queue.Queue]":
    """A queue for the block, which processes on other nodes may be handed."""
    import ray.util.queue  # here and below: a driver with nothing to do does not load Ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver, which it cannot outlive anyway: on another node it would die with that.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = ray.util.queue.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    try:
        yield queue
    finally:
        queue.shutdown()


class Listener(ABC):
    """Takes the messages off a queue in a thread of its own while it is entered. When it is left, none is in the queue."""

    def __init__(self, inbox: MessageQueue) -> None:
        self.inbox = inbox
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)

    @abstractmethod
    def take(self, message: Any) -> None:
        """What a message is for."""

    def between(self) -> None:  # noqa: B027  # most have nothing to do
        """What is done besides, before each wait for a message."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        self._thread.join()

    def _listen(self) -> None:
        import ray.exceptions

        while True:
            self.between()
            left = self._left.is_set()  # looked at before the queue is emptied, so that nothing is left in it
            try:
                message = self.inbox.get(timeout=WAIT)
            except (queues.Empty, ray.exceptions.RayError) as error:
                if left:
                    return
                if isinstance(error, ray.exceptions.RayError):  # which does not wait
                    self._left.wait(WAIT)
            else:
                self.take(message)
