"""Jobs as a person types them."""

import runpy
import sys

import pytest

from support.processes import ROOT


def run_job(monkeypatch: pytest.MonkeyPatch, job: str, *arguments: str) -> int:
    """Run a job in this process as `python jobs/<job> ...` would; its exit code."""
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "jobs" / job), run_name="__main__")
    return int(stop.value.code or 0)
