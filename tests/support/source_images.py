"""Small images for the tests of sources, sources to put them in, and what is read from a source or by a process."""

import io
import pickle
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from PIL import Image

from pipelines.preprocess.sources.items import Source, Value


def random_image(seed: int, height: int = 8, width: int | None = None) -> np.ndarray:
    """uint8 [height,width,3] that no other seed has; square by default."""
    shape = (height, height if width is None else width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file of one of Pillow's formats."""
    stream = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(stream, kind, **options)
    return stream.getvalue()


def decoded(value: Value) -> np.ndarray:
    """The pixels of a value, encoded or not."""
    if isinstance(value, bytes):
        with Image.open(io.BytesIO(value)) as image:
            return np.asarray(image.convert("RGB"))
    assert isinstance(value, np.ndarray), value
    assert value.dtype == np.uint8
    return value


def write_lmdb(folder: Path, values: Mapping[str, bytes]) -> Path:
    """An LMDB as LSUN lays it out."""
    with lmdb.open(str(folder), map_size=1 << 28) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return folder


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w", format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of files; a name that ends in a slash is a folder."""
    with tarfile.open(path, mode, format=format) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read_all(source: Source) -> dict[str, Value]:
    """All values as a worker sees them, which gets the source and the items as pickles. Checks their order too."""
    items = source.items()
    keys = [item.key for item in items]
    assert keys == sorted(set(keys))
    copy, copied_items = pickle.loads(pickle.dumps((source, items)))
    assert copy == source
    pairs = list(copy.read(copied_items))
    assert [key for key, _ in pairs] == keys
    values = dict(pairs)
    for step in (3, max(1, len(items) // 2)):  # any ascending part reads the same as the whole
        part = items[1::step]
        for (key, value), item in zip(source.read(part), part, strict=True):
            assert key == item.key
            if isinstance(value, Exception):
                assert type(value) is type(values[key])
            else:
                np.testing.assert_array_equal(value, values[key])
    return values


def bytes_read(action: Callable[[], object], counter: str = "rchar") -> int:
    """How many bytes this process reads during an action: asked of files (rchar) or fetched from disk (read_bytes)."""
    accounts = Path("/proc/self/io")
    if not accounts.exists():
        pytest.skip("only Linux counts what a process reads")

    def count() -> int:
        match = re.search(rf"^{counter}: (\d+)$", accounts.read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1])

    before = count()
    action()
    return count() - before
