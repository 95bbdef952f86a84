"""Which images belong to which training step: a function of the data set's row groups, the seed and the step."""

import functools
import threading

import numpy as np

from ddpm_core import rng


def epoch_order(groups: np.ndarray, seed: int, epoch: int, window: int | None) -> np.ndarray:
    """The order in which an epoch visits every image once, uint32 [sum(groups)] (int64 beyond 2^32 images).

    `groups` are the row groups' sizes. Without a window the order is uniform over all images. With one, the groups are
    shuffled, consecutive ones are gathered into windows of at least `window` images, and the order is uniform within
    each: a reader then needs the groups of one window at a time.
    """
    images = int(groups.sum())
    dtype = np.uint32 if images <= 2**32 else np.int64
    if window is None:
        return rng.permutation(seed, "epoch", epoch, images).numpy().astype(dtype)
    shuffled = rng.permutation(seed, "epoch groups", epoch, len(groups)).numpy()
    sizes = groups[shuffled]
    stream = np.repeat((np.cumsum(groups) - groups)[shuffled] - (np.cumsum(sizes) - sizes), sizes) + np.arange(images)
    # A uniform order of everything, sorted stably by window, is a uniform and independent order within each.
    uniform = rng.permutation(seed, "epoch windows", epoch, images).numpy()
    windows = np.repeat(_windows(sizes, window), sizes)
    return stream[uniform[np.argsort(windows[uniform], kind="stable")]].astype(dtype)


def _windows(sizes: np.ndarray, window: int) -> np.ndarray:
    """The window of each row group, from 0. What is left at the end joins the last window."""
    result = np.zeros(len(sizes), np.int32)
    number = held = 0
    for place, size in enumerate(sizes.tolist()):
        result[place] = number
        held += size
        if held >= window:
            number, held = number + 1, 0
    return np.minimum(result, max(0, number - 1))


class BatchOrder:
    """The batches of one data set. It keeps the orders of the newest epochs, so that a step costs its batch alone."""

    def __init__(self, groups: np.ndarray) -> None:
        self._groups = groups
        self._images = int(groups.sum())
        self._order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, groups))
        self._lock = threading.Lock()

    def global_batch(self, seed: int, step: int, batch_size: int, window: int | None) -> np.ndarray:
        """The images of training step `step`, int64 [batch_size]. A batch may end one epoch and begin the next."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, offsets = np.divmod(positions, self._images)
        batch = np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            with self._lock:  # threads that enter an epoch together make its order once
                order = self._order(seed, int(epoch), window)
            batch[at] = order[offsets[at]]
        return batch


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch that belongs to a worker; the parts differ by at most one image."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
