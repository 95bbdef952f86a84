"""Whether shards are what a network is trained on, before anything is started."""

import math
from pathlib import Path

from ddpm_core import records
from ddpm_core.configs import LEARNED
from ddpm_core.errors import InputError
from pipelines.shards.dataset import ShardedDataset
from pipelines.shards.reader import CACHE_BYTES
from pipelines.storage.locations import Location
from pipelines.train.config import TrainConfig


def check_dataset(config: TrainConfig, dataset: ShardedDataset) -> None:
    """Raises InputError if the shards' images are not the network's."""
    wanted = (config.unet.image_size, config.unet.image_size, config.unet.in_channels)
    if dataset.shape != wanted:
        raise InputError(
            f"shards {str(dataset.path)!r} hold images {'x'.join(map(str, dataset.shape))}, but preset {config.preset!r} wants "
            f"{'x'.join(map(str, wanted))}: preprocess with --image-size {wanted[0]} --channels {wanted[2]}"
        )
    if not contact_sheet_of(dataset).is_file():
        raise InputError(
            f"shards {str(dataset.path)!r} lack their file {contact_sheet_of(dataset).name!r}: copy it too, or make them again"
        )
    check_shuffle(config, dataset)
    channels = config.unet.in_channels * (2 if config.diffusion.var_type in LEARNED else 1)
    if (config.unet.out_channels or config.unet.in_channels) != channels:
        raise InputError(
            f"--diffusion.var-type is {config.diffusion.var_type!r}, which wants a network with {channels} output channels: "
            f"give --unet.out-channels {channels}"
        )


def check_shuffle(config: TrainConfig, dataset: ShardedDataset) -> None:
    """Raises InputError if each image would cost a whole row group again: data that is read by row groups, more of it than a
    process keeps, and no window that makes do with those."""
    if dataset.by_image or dataset.nbytes <= CACHE_BYTES:
        return
    fitting = CACHE_BYTES // 2 // math.prod(dataset.shape)  # a batch may end one window and begin the next
    if config.shuffle_window is None or config.shuffle_window > fitting:
        raise InputError(
            f"--shuffle-window is {config.shuffle_window} for {str(dataset.path)!r}, {dataset.nbytes / 1e9:.1f} GB that can only "
            f"be read by row groups: give at most {fitting}, or a local copy with storage uint8"
        )


def contact_sheet_of(dataset: ShardedDataset) -> Location:
    return dataset.path / Path(records.CONTACT_SHEET).name
