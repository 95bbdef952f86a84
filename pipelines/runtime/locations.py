"""Where things lie: a local path or a URL such as s3://bucket/folder, absolute, with one way to commit a file there.

pathlib's interface throughout: `pathlib.Path` for what is local, `UPath` (fsspec) for everything else.
"""

import contextlib
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from upath import UPath

from ddpm_core.commit import committed_file, write_json
from ddpm_core.errors import InputError

Location = Path | UPath

# What the libraries of networks and object stores raise when they fail, and with them what disks raise.
NETWORK_ERRORS: tuple[type[Exception], ...] = ()
with contextlib.suppress(ImportError):
    from aiohttp import ClientError  # a part of ray[default]; gcsfs raises it

    NETWORK_ERRORS += (ClientError,)
with contextlib.suppress(ImportError):
    from botocore.exceptions import BotoCoreError  # comes with s3fs

    NETWORK_ERRORS += (BotoCoreError,)
STORAGE_ERRORS: tuple[type[Exception], ...] = (OSError, *NETWORK_ERRORS)
ANSWER = 10.0  # seconds that a web server may take to answer


def in_submitted_job() -> bool:
    """Whether the current folder is a temporary copy that `ray job submit --working-dir` uploaded."""
    return "runtime_resources" in Path.cwd().parts


def holds_password(url: str) -> bool:
    """Whether a URL has a password before its host or among its parameters."""
    before_host = re.search(r"://[^/?@]*:(?!\d+/)[^@]*@", url)  # not a port: passwords may hold slashes
    return bool(
        before_host or re.search(r"[?&][^=&]*(password|passwd|secret|token|signature|sig|key)=", url, re.IGNORECASE)
    )


def check_no_password(path: str, *, option: str) -> None:
    """InputError for a URL that holds a password: configurations go to MLflow, into checkpoints and logs."""
    if holds_password(path):
        raise InputError(
            f"{option} is a URL that holds a password or key, which would be written into records and logs: leave it out, and "
            "give it to the store's library by its environment variables or files"
        )


def absolute(path: str, *, option: str) -> Path:
    """A local path from the command line, absolute; there need be nothing yet. Raises InputError for a URL, for what no file
    system takes, and inside a submitted job for a relative path, which would lie in the copy of the code that Ray deletes."""
    check_no_password(path, option=option)
    if "://" in path:
        raise InputError(f"{option} is {path!r}, a URL: give a local path that every node can reach")
    if not path.strip() or "\0" in path:
        raise InputError(f"{option} is {path!r}, which names nothing: give a path, or . for the current folder")
    try:
        expanded = Path(path).expanduser()
        resolved = expanded.resolve()
        with contextlib.suppress(FileNotFoundError):
            resolved.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: an unknown user after ~, links in a circle
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{option} is {shortened(path)!r}, which is no path here ({reason}): give another") from error
    if not expanded.is_absolute() and in_submitted_job():
        raise InputError(
            f"{option} is {path!r}, a relative path: a submitted job runs in a temporary copy of the code, so give an "
            "absolute path that every node can reach"
        )
    return resolved


def check_writable(place: Location, what: str) -> None:
    """Raises InputError for a local folder that is not there and cannot be made, or is there and cannot be written in; nothing
    is left behind. what: the folder in words."""
    if not isinstance(place, Path):
        return
    try:
        nearest = next(folder for folder in (place, *place.parents) if folder.exists())
        tempfile.TemporaryDirectory(prefix=".ddpm-", dir=nearest).cleanup()  # permissions do not tell it, as in /proc
    except OSError as error:
        raise InputError(
            f"{what} {shortened(str(place))!r} cannot be written to ({error.strerror}): allow it, or give another place"
        ) from error


def shortened(text: str) -> str:
    """A text as a part of a sentence."""
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


def location(path: str, *, option: str) -> Location:
    """A local path, absolute, or a URL that fsspec knows. Raises InputError if its library is missing or nobody answers."""
    if "://" not in path:
        return absolute(path, option=option)
    check_no_password(path, option=option)
    check_answers(path, option=option)
    try:
        place = UPath(path)
        place.exists()  # a wrong endpoint, missing credentials: now, not in a worker
    except (ImportError, ValueError) as error:  # fsspec's own sentences: an unknown protocol, what to install
        raise InputError(f"{option} is {path!r}, which cannot be opened: {error}") from error
    except Exception as error:  # every store raises its own
        raise InputError(f"{option} is {path!r}, which cannot be reached: {type(error).__name__}: {error}") from error
    return place


def check_answers(url: str, *, option: str) -> None:
    """Raises InputError for a web address at which nobody answers: fsspec would wait for minutes, and take it for a missing
    file."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout=ANSWER).close()
    except (OSError, ValueError) as error:  # ValueError: a malformed address; UnicodeError is one too
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{option} is {shortened(url)!r}, where no server answers ({reason}): look at the address and the network"
        ) from error


def is_local(place: Location) -> bool:
    return isinstance(place, Path)


@contextlib.contextmanager
def committed(place: Location) -> Iterator[Path]:
    """Yields a local name to write to; on success the file appears under its final name, whole, on error not at all.

    An object store shows an upload only when it is complete; nothing is renamed there.
    """
    if isinstance(place, Path):
        with committed_file(place) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder:
        temporary = Path(folder) / "file"
        yield temporary
        place.fs.put_file(str(temporary), place.path)


def commit_json(place: Location, value: Any) -> None:
    """`value` as a JSON file, whole or not at all."""
    if isinstance(place, Path):
        write_json(place, value)
    else:
        with committed(place) as temporary:
            write_json(temporary, value)


def forget_listings(place: Location) -> None:
    """Drop what fsspec remembers of a remote folder, before asking it what other processes have written."""
    if not isinstance(place, Path):
        place.fs.invalidate_cache()
