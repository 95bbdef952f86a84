"""Places of every kind: on this disk, and in the object stores that can be had here."""

from pathlib import Path

import pytest

from pipelines.storage.locations import Location

STORES = {"s3": "s3_bucket", "azure": "azure_container"}  # kinds of stores that are servers, and their fixtures


def store_url(request: pytest.FixtureRequest, kind: str, folder: str) -> str:
    """The URL of a folder in a store of a kind: s3, azure or memory."""
    return f"{request.getfixturevalue(STORES[kind])}/{folder}" if kind in STORES else f"memory://{folder}"


def on_disk(place: Location) -> Path:
    """The same, for functions that take local paths only."""
    assert isinstance(place, Path)
    return place
