"""What a process of its own has loaded."""

import json
import subprocess
import sys

from support.processes import ROOT

RUN = """
import contextlib, runpy, sys
sys.argv = {arguments!r}
with contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
LIST = "import json, sys; print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"


def loaded(code: str) -> set[str]:
    """The top-level packages that a fresh process has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LIST}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def loaded_by_job(*arguments: str) -> set[str]:
    """The same after a job: its file in jobs/, and its options."""
    return loaded(RUN.format(arguments=[f"jobs/{arguments[0]}", *arguments[1:]]))
