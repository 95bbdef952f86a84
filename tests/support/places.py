"""Places that tests know to be on this disk."""

from pathlib import Path

from pipelines.runtime.locations import Location


def on_disk(place: Location) -> Path:
    """The same, for functions that take local paths only."""
    assert isinstance(place, Path)
    return place
