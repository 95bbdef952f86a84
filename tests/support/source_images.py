"""Small pictures for the tests of sources, how to look at what a source gives, and what a process has read."""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.preprocess.sources.items import Item, Source, Value


def picture(seed: int, size: int = 8) -> np.ndarray:
    """uint8 [size, size, 3] that no other seed has."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def decoded(value: Value) -> np.ndarray:
    """The pixels of a value, whichever form it comes in."""
    if isinstance(value, bytes):
        with Image.open(io.BytesIO(value)) as image:
            return np.asarray(image.convert("RGB"))
    assert isinstance(value, np.ndarray), value
    assert value.dtype == np.uint8
    return value


def everything(source: Source) -> dict[str, Value]:
    """All values as a worker sees them, which gets the source and the items as pickles. Checks the order on the way."""
    items: list[Item] = source.items()
    keys = [item.key for item in items]
    assert keys == sorted(set(keys))
    there, wanted = pickle.loads(pickle.dumps((source, items)))
    assert there == source
    read = list(there.read(wanted))
    assert [key for key, _ in read] == keys
    for step in (3, max(1, len(items) // 2)):  # any ascending part reads the same as the whole
        part = items[1::step]
        for (key, value), item in zip(source.read(part), part, strict=True):
            assert key == item.key
            if isinstance(value, Exception):
                assert type(value) is type(dict(read)[key])
            else:
                np.testing.assert_array_equal(value, dict(read)[key])
    return dict(read)


def bytes_asked_for(action: Callable[[], object], counter: str = "rchar") -> int:
    """How many bytes this process reads from files meanwhile: asked for (rchar) or fetched from disk (read_bytes)."""
    accounts = Path("/proc/self/io")
    if not accounts.exists():
        pytest.skip("only Linux counts what a process reads")

    def count() -> int:
        found = re.search(rf"^{counter}: (\d+)$", accounts.read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])

    before = count()
    action()
    return count() - before
