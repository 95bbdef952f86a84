"""Paths from the command line, made absolute: a job, its workers and MLflow each have a current folder of their own."""

from pathlib import Path

from ddpm_core.errors import InputError


def in_submitted_job() -> bool:
    """Whether the current folder is a temporary copy that `ray job submit --working-dir` uploaded."""
    return "runtime_resources" in Path.cwd().parts


def absolute(path: str, *, option: str) -> Path:
    """A local path from the command line, absolute. Inside a submitted job a relative one would point into the uploaded
    copy of the code, which Ray deletes: InputError."""
    if "://" in path:
        raise InputError(f"{option} is {path!r}: URLs are not supported yet, give a path that every node can reach")
    expanded = Path(path).expanduser()
    if not expanded.is_absolute() and in_submitted_job():
        raise InputError(
            f"{option} is {path!r}, a relative path: a submitted job runs in a temporary copy of the code, so give an "
            "absolute path that every node can reach"
        )
    return expanded.resolve()
