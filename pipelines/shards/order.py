"""Which images belong to which training step: a function of the data set's row groups, the seed and the step."""

import functools
import threading

import numpy as np


def epoch_order(groups: np.ndarray, seed: int, epoch: int, window: int | None) -> np.ndarray:
    """The order in which an epoch visits every image once, uint32 [sum(groups)] (int64 beyond 2^32 images).

    groups: the number of images in each row group. Without a window the order is uniform over all images. With one, the
    groups are shuffled, consecutive ones are gathered into windows of at least `window` images, and the order is uniform
    within each: a reader then needs the groups of one window at a time.
    """
    from ddpm_core import rng  # here: who trains nothing does without torch

    images = int(groups.sum())
    dtype = np.uint32 if images <= 2**32 else np.int64
    if window is None:
        return rng.permutation(seed, "epoch", epoch, images).numpy().astype(dtype)
    shuffled = rng.permutation(seed, "epoch groups", epoch, len(groups)).numpy()
    sizes = groups[shuffled]
    # The images in the order of the shuffled groups. Position p lies in the group that starts there at position s and
    # in the data set at image f: it is image f - s + p.
    shifts = (np.cumsum(groups) - groups)[shuffled] - (np.cumsum(sizes) - sizes)
    stream = np.repeat(shifts, sizes) + np.arange(images)
    # A uniform order of everything, sorted stably by window, is a uniform and independent order within each.
    uniform = rng.permutation(seed, "epoch windows", epoch, images).numpy()
    windows = np.repeat(_windows(sizes, window), sizes)
    return stream[uniform[np.argsort(windows[uniform], kind="stable")]].astype(dtype)


def _windows(sizes: np.ndarray, window: int) -> np.ndarray:
    """The number of each row group's window, from 0. Groups left at the end, too few for a window, join the last one."""
    result = np.zeros(len(sizes), np.int32)
    number = images = 0
    for group, size in enumerate(sizes.tolist()):
        result[group] = number
        images += size
        if images >= window:
            number, images = number + 1, 0
    return np.minimum(result, max(0, number - 1))


class BatchOrder:
    """The batches of one data set. It keeps the orders of the two newest epochs, so that a step costs its batch alone."""

    def __init__(self, groups: np.ndarray) -> None:
        self._images = int(groups.sum())
        self._order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, groups))
        self._lock = threading.Lock()

    def global_batch(self, seed: int, step: int, batch_size: int, window: int | None) -> np.ndarray:
        """The images of training step `step`, int64 [batch_size]. A batch may end one epoch and begin the next."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, offsets = np.divmod(positions, self._images)
        batch = np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            with self._lock:  # threads that enter an epoch together make its order once
                order = self._order(seed, int(epoch), window)
            batch[in_epoch] = order[offsets[in_epoch]]
        return batch


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that belongs to worker `rank`: contiguous, and at most one image longer than any other."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
