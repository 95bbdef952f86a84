"""A disk of so many KiB, which can be full."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted_disk(kibibytes: int) -> Iterator[Path]:
    """A tmpfs, outside the folders that pytest clears away; the test is skipped where none can be mounted."""
    disk = Path(tempfile.mkdtemp(prefix="ddpm-small-disk-"))
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(disk)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        disk.rmdir()
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
    disk.rmdir()
