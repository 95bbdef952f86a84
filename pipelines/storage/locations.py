"""Where things lie: a local path or a URL such as s3://bucket/folder, absolute, with one way to commit a file there.

pathlib's interface throughout: `pathlib.Path` for what is local, `UPath` (fsspec) for everything else.
"""

import contextlib
import logging
import re
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from upath import UPath

from ddpm_core import commit
from ddpm_core.commit import MANIFEST, ReadablePath, committed_file, write_json
from ddpm_core.errors import InputError, one_line

Location = Path | UPath

logger = logging.getLogger(__name__)

# What the libraries of networks and object stores raise when they fail, and with them what disks raise.
NETWORK_ERRORS: tuple[type[Exception], ...] = ()
with contextlib.suppress(ImportError):
    from aiohttp import ClientError  # a part of ray[default]; gcsfs raises it

    NETWORK_ERRORS += (ClientError,)
with contextlib.suppress(ImportError):
    from botocore.exceptions import BotoCoreError  # comes with s3fs

    NETWORK_ERRORS += (BotoCoreError,)
with contextlib.suppress(ImportError):
    from gcsfs.retry import HttpError  # type: ignore[import-not-found, unused-ignore]

    NETWORK_ERRORS += (HttpError,)
with contextlib.suppress(ImportError):
    from azure.core.exceptions import AzureError  # type: ignore[import-not-found, unused-ignore]

    NETWORK_ERRORS += (AzureError,)
STORAGE_ERRORS: tuple[type[Exception], ...] = (OSError, *NETWORK_ERRORS)
# In which a file appears whole or not at all, and a name can be asked to be free.
STORES = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"))
# Whose libraries try again in silence, and how they log that.
RETRYING = ("botocore.retryhandler", "aiobotocore.retryhandler", "s3fs", "gcsfs")
RETRY = re.compile(
    r"\b(?:retry needed[:,](?! action)|retryable error:|retrying after exception:) *(.+)", re.IGNORECASE | re.DOTALL
)
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
    """Raises InputError for a folder that is not there and cannot be made, or is there and cannot be written in; nothing is left
    behind. what: the folder in words."""
    if not isinstance(place, Path):
        if place.protocol not in STORES:
            raise InputError(
                f"{what} {shortened(str(place))!r} cannot be written to: nothing says that files appear whole in "
                f"{place.protocol}://; give a path, or a URL of {', '.join(sorted(STORES))}"
            )
        try:
            probe = place / f".ddpm-{uuid.uuid4().hex}"
            probe.fs.pipe_file(probe.path, b"-")
            probe.fs.rm_file(probe.path)
        except Exception as error:  # every store raises its own
            raise InputError(
                f"{what} {shortened(str(place))!r} cannot be written to ({one_line(error)}): make the bucket, allow writing and "
                "deleting in it, or give another place"
            ) from error
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
        place = open_url(path)
        place.exists()  # a wrong endpoint, missing credentials: now, not in a worker
    except (ImportError, ValueError) as error:  # fsspec's own sentences: an unknown protocol, what to install
        raise InputError(f"{option} is {path!r}, which cannot be opened: {error}") from error
    except Exception as error:  # every store raises its own
        raise InputError(f"{option} is {path!r}, which cannot be reached: {type(error).__name__}: {error}") from error
    return place


def open_url(url: str) -> UPath:
    """The place of a URL. What others write there is seen at once: listings are not remembered. What its store refuses for a
    while or breaks off, its library tries again a few times, and each kind of reason is told once."""
    for name in RETRYING:
        library = logging.getLogger(name)
        if not any(isinstance(each, TellsRetries) for each in library.filters):
            library.setLevel(logging.DEBUG)
            library.addFilter(TellsRetries())
    return UPath(url, use_listings_cache=False)


class TellsRetries(logging.Filter):
    """Of what a store's library logs below warnings, tells that a request is made again, once for each kind of reason."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        found = RETRY.search(record.getMessage()) if record.levelno < logging.WARNING else None
        if found is None:
            return record.levelno >= logging.WARNING
        reason = shortened(one_line(ValueError(found[1])))
        kind = re.sub(r"(['\"]).*?\1|\S*[/\d]\S*", "", reason)  # without names and numbers
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("object store: a request is made again (%s)", reason)  # ours: botocore's are not shown
        return False


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


def commit_bytes(place: Location, content: bytes) -> None:
    """A file, whole or not at all."""
    if isinstance(place, Path):
        with committed_file(place) as temporary:
            temporary.write_bytes(content)
    else:
        place.fs.pipe_file(place.path, content)


def commit_json(place: Location, value: Any) -> None:
    """`value` as a JSON file, whole or not at all."""
    if isinstance(place, Path):
        write_json(place, value)
    else:
        commit_bytes(place, commit.json_text(value).encode())


@contextlib.contextmanager
def committed_folder(place: Location, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a local folder to fill; on success it appears under its final name with a manifest, on error nothing changes."""
    if isinstance(place, Path):
        with commit.committed_folder(place, facts) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-") as parent:
        local = Path(parent) / "folder"
        with commit.committed_folder(local, facts) as temporary:
            yield temporary
        upload_folder(local, place)


def upload_folder(local: Path, target: UPath) -> None:
    """Put a committed folder into an object store. From the first file that is replaced to the last, there is no manifest."""
    delete(target / MANIFEST)
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    for name in [*(name for name in names if name != MANIFEST), MANIFEST]:
        target.fs.put_file(str(local / name), (target / name).path)


def delete(place: Location) -> None:
    """Delete a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if isinstance(place, Path):
            place.unlink()
        else:
            place.fs.rm_file(place.path)


def is_there(place: ReadablePath) -> bool:
    """Whether a file is there. Unlike is_file(), raises what its store raises if that does not say."""
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def entries(folder: Location) -> list[Location]:
    """What lies in a folder, by name; nothing if that is not there."""
    try:
        if isinstance(folder, Path):
            return sorted(folder.iterdir(), key=lambda path: path.name)
        listed = [name.rstrip("/") for name in folder.fs.ls(folder.path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # An object of the folder's own name, which consoles make for an empty one, is nothing that lies in it.
    return [folder / name.rpartition("/")[2] for name in sorted(set(listed)) if name != folder.path.rstrip("/")]


def committed_in(folder: Location) -> list[str]:
    """The names of the folders in a folder that hold a manifest, sorted; an object store is asked once, not once for each."""
    if isinstance(folder, Path):
        return [path.name for path in entries(folder) if (path / MANIFEST).is_file()]
    try:
        found = [PurePosixPath(name).relative_to(folder.path) for name in folder.fs.find(folder.path)]
    except FileNotFoundError:
        return []
    return sorted(path.parts[0] for path in found if path.parts[1:] == (MANIFEST,))


def remove_leftovers(folder: Location) -> None:
    """Clear away what killed writers left in a folder; in an object store they leave nothing."""
    if isinstance(folder, Path):
        commit.remove_leftovers(folder)
