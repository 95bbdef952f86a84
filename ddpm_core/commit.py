"""Commit last: a file or folder appears under its final name only when it is whole.

Everything is written under another name in the same folder, flushed to disk, then renamed. A folder's
`manifest.json` lists its files with size and sha256, so that its presence means that the whole is there.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.errors import InputError, one_line

MANIFEST = "manifest.json"
Value = TypeVar("Value")


class FileFacts(TypedDict):
    """What a manifest says of a file."""

    bytes: typed.FileSize
    sha256: str


class Manifest(TypedDict):
    """What every manifest of several files says; each kind adds to it. files: by their path in the folder."""

    files: dict[str, FileFacts]


@runtime_checkable
class ReadablePath(Protocol):
    """What reading needs of pathlib.Path, which other file systems' paths offer as well."""

    @property
    def name(self) -> str: ...
    @property
    def parent(self) -> Any: ...
    def __truediv__(self, name: str, /) -> Any: ...
    def is_dir(self) -> bool: ...
    def is_file(self) -> bool: ...
    def iterdir(self) -> Any: ...
    def open(self, mode: Any = ..., /) -> Any: ...
    def read_bytes(self) -> bytes: ...
    def read_text(self, encoding: str | None = ...) -> str: ...
    def stat(self) -> Any: ...


def sha256_file(path: ReadablePath) -> str:
    """The sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def committed_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write to; on success the file takes its final name, on error it vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with committed_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """A value as every JSON file of ours holds it, its keys sorted."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def write_json(path: Path, value: Any) -> None:
    """A JSON file with sorted keys, whole or not at all."""
    write_text(path, json_text(value))


@contextlib.contextmanager
def committed_folder(path: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it gets a manifest (`facts` and the files' sha256) and its
    final name. A folder that stands there already is replaced; on error nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        files = {
            str(file.relative_to(temporary)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        # opened by name, not through write_json, which would make a folder anew that was cleared away under us
        (temporary / MANIFEST).write_text(json_text({**facts, "files": files}), encoding="utf-8")
        for name in [*files, MANIFEST]:
            _flush(temporary / name)
        _flush(temporary)  # its names too are on the disk before it has its own
        _replace_folder(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path`, moving away what stands there; also if another writer does so in this moment."""
    while True:
        discarded = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        with contextlib.suppress(FileNotFoundError):  # nothing stood there
            path.rename(discarded)
        try:
            temporary.rename(path)
        except OSError as error:
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not taken:
                with contextlib.suppress(OSError):
                    discarded.rename(path)
                raise
        else:
            taken = False
        shutil.rmtree(discarded, ignore_errors=True)
        if not taken:
            return


def read_manifest(folder: ReadablePath, *, what: str) -> dict[str, Any]:
    """The manifest of a committed folder. Raises InputError if there is none or it is not a JSON object."""
    try:
        data = typed.read_whole(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise InputError(f"{what} {str(folder)!r} does not exist: give the path of a finished one") from error
        raise InputError(
            f"{what} {str(folder)!r} has no {MANIFEST}, so it is not one or was never finished: "
            "run the command that makes it again, it goes on where it stopped"
        ) from error
    except Exception as error:  # every file system raises its own
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(
            f"{what} {str(folder)!r} has a {MANIFEST} that cannot be read ({reason}): allow it, or make it again"
        ) from error
    try:
        return cast(dict[str, Any], typed.parse_json(data, typed.JsonObject))
    except ValueError as error:
        raise damaged_manifest(folder, error, what) from error


def check_manifest(folder: ReadablePath, manifest: Mapping[str, Any], model: type[Value], *, what: str) -> Value:
    """The manifest of a folder as the TypedDict that describes it. Raises InputError if it is that of something else."""
    lacking = sorted(cast(Any, model).__required_keys__ - manifest.keys())
    if lacking:
        raise InputError(
            f"{what} {str(folder)!r} has a manifest without {', '.join(lacking)}: it is the folder of something else, or "
            "damaged; give another, or make it again"
        )
    try:
        return typed.check(manifest, model)
    except ValueError as error:
        raise damaged_manifest(folder, error, what) from error


def damaged_manifest(folder: ReadablePath, reason: object, what: str) -> InputError:
    """The error that says what is wrong with the manifest of a folder."""
    return InputError(
        f"{what} {str(folder)!r} has a damaged {MANIFEST} ({reason}): delete the folder and make it again"
    )


def verify_files(folder: ReadablePath, manifest: Mapping[str, Any], *, what: str) -> None:
    """Check every file of a manifest by size and sha256. Raises an InputError that names the first that differs."""
    for name, facts in check_manifest(folder, dict(manifest), Manifest, what=what)["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise InputError(f"{what} {str(folder)!r} lacks its file {name!r}: make it again") from None
        if size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            raise InputError(f"{what} {str(folder)!r} has a damaged file {name!r} (sha256 differs): make it again")


def remove_leftovers(folder: Path) -> None:
    """Clear away the temporary names that killed writers left in a folder.

    A writer that still lives, such as a worker that outlasts its killed driver by a moment, is safe: its folder is
    renamed before anything in it is deleted, so that it either commits the whole or finds its folder gone.
    """
    for old in folder.glob(".*.old"):
        final = folder / old.name[1:].rsplit(".", 2)[0]
        if not final.exists():  # killed between the two renames of a replacement: the earlier one stands again
            with contextlib.suppress(OSError):  # its writer lives and is done with it by now
                old.rename(final)
    for path in [path for ending in ("tmp", "old", "del") for path in folder.glob(f".*.{ending}")]:
        discarded = path.with_name(f".{uuid.uuid4().hex[:8]}.del")
        try:
            path.rename(discarded)
        except FileNotFoundError:  # committed or given up in this moment
            continue
        if discarded.is_dir():
            shutil.rmtree(discarded, ignore_errors=True)
        else:
            discarded.unlink(missing_ok=True)
