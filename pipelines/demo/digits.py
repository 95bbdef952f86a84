"""Handwritten digits (scikit-learn's copy of the UCI set) as LSUN ships its images, and a small network that knows them."""

import hashlib
import io
import shutil
import warnings
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core.commit import committed_file
from pipelines.shards.dataset import ShardedDataset


def digit_key(number: int) -> str:
    """The key of digit `number`: 40 hex digits, as LSUN's."""
    return hashlib.sha1(f"digit-{number}".encode()).hexdigest()


def write_lmdb(folder: Path) -> None:
    """scikit-learn's 1,797 digits as LSUN ships images: WebP, shorter side 256, any aspect, 40-hex keys."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with lmdb.open(str(temporary), map_size=1 << 28) as environment, environment.begin(write=True) as transaction:
        for number, digit in enumerate(load_digits().images):
            ink = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8)).resize(
                (256, 256), Image.Resampling.NEAREST
            )
            margin = 8 * (number % 9)  # 0 to 64 pixels at each end of the longer side
            upright = number % 2 == 0
            canvas = Image.new("L", (256, 256 + 2 * margin) if upright else (256 + 2 * margin, 256))
            canvas.paste(ink, (0, margin) if upright else (margin, 0))
            encoded = io.BytesIO()
            canvas.convert("RGB").save(encoded, format="WEBP", quality=90, method=0)
            transaction.put(digit_key(number).encode(), encoded.getvalue())
    temporary.rename(folder)


class DigitNetwork(nn.Module):
    """uint8 [N,1,8,8] -> (features [N,64], logits [N,10])."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(32 * 6 * 6, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images.to(torch.float32) / 255.0)
        return features, self.head(features)


def train_extractor(path: Path, dataset: ShardedDataset) -> float:
    """Train a digit classifier on four fifths of the shards, write it as TorchScript; its accuracy on the rest."""
    labels_by_key = {digit_key(number): int(label) for number, label in enumerate(load_digits().target)}
    keys = [key for shard in range(len(dataset.manifest["shards"])) for key in dataset.keys(shard)]
    labels = torch.tensor([labels_by_key[key] for key in keys])
    pixels = torch.from_numpy(dataset.pixels(range(len(dataset)))).permute(0, 3, 1, 2).contiguous()
    held_out = torch.arange(len(keys)) % 5 == 0  # keys are hashes, so this is a random fifth
    train_pixels, train_labels = pixels[~held_out], labels[~held_out]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DigitNetwork()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for epoch in range(15):
        for batch in rng.permutation(0, "digits", epoch, len(train_labels)).split(64):
            loss = nn.functional.cross_entropy(network(train_pixels[batch])[1], train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        right = network(pixels[held_out])[1].argmax(1) == labels[held_out]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is what a downloaded extractor comes as
        scripted = torch.jit.script(network)
        archive = io.BytesIO()  # a file's name would stand in the archive, and its sha256 depend on it
        torch.jit.save(scripted, archive)
    with committed_file(path) as temporary:
        temporary.write_bytes(archive.getvalue())
    return float(right.float().mean())
