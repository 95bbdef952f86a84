"""Commit last: under its final name a thing is whole, whatever happened while it was written."""

import contextlib
import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_core.commit import (
    committed_file,
    committed_folder,
    read_manifest,
    remove_leftovers,
    sha256_file,
    verify_files,
    write_json,
    write_text,
)
from ddpm_core.errors import InputError


class Killed(BaseException):
    """Stands for whatever stops a writer."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(path: Path, value: str, facts: dict[str, Any] | None = None) -> None:
    with committed_folder(path, facts or {}) as temporary:
        (temporary / "a.txt").write_text(value)
        (temporary / "deep").mkdir()
        (temporary / "deep" / "b.txt").write_text(value * 2)


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with committed_file(target) as temporary:
        temporary.write_text("first half")
        assert not target.exists()
        assert temporary.parent == target.parent  # a rename within one file system
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("there", [False, True])
def test_a_stopped_file_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "file.txt"
    if there:
        write_text(target, "old")

    def write() -> None:
        with committed_file(target) as temporary:
            temporary.write_text("half")
            raise Killed

    with pytest.raises(Killed):
        write()
    assert names(tmp_path) == (["file.txt"] if there else [])
    assert not there or target.read_text() == "old"


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with committed_file(target) as one, committed_file(target) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert target.read_text() in ("one", "two")
    assert names(tmp_path) == ["file.txt"]


@given(value=st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_comes_back_and_equal_values_make_equal_files(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
    if isinstance(value, dict):
        write_json(tmp_path / "b.json", dict(reversed(value.items())))
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_folder_appears_whole_with_a_manifest_of_all_its_files(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "thing"
    fill(target, "x", {"count": 3})
    manifest = read_manifest(target, what="thing")
    assert manifest["count"] == 3
    assert manifest["files"] == {
        "a.txt": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()},
        "deep/b.txt": {"bytes": 2, "sha256": hashlib.sha256(b"xx").hexdigest()},
    }
    verify_files(target, manifest, what="thing")
    assert names(target.parent) == ["thing"]


@pytest.mark.parametrize("there", [False, True])
def test_a_stopped_folder_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "thing"
    if there:
        fill(target, "old")

    def write() -> None:
        with committed_folder(target, {}) as temporary:
            (temporary / "a.txt").write_text("half")
            assert not (temporary / "manifest.json").exists()  # it comes last
            raise Killed

    with pytest.raises(Killed):
        write()
    assert names(tmp_path) == (["thing"] if there else [])
    if there:
        assert (target / "a.txt").read_text() == "old"
        verify_files(target, read_manifest(target, what="thing"), what="thing")


def test_a_folder_that_stands_there_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "thing", "old")
    fill(tmp_path / "thing", "new")
    assert (tmp_path / "thing" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["thing"]


def test_a_replacement_that_fails_at_its_last_rename_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "thing", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        fill(tmp_path / "thing", "new")
    assert names(tmp_path) == ["thing"]
    assert (tmp_path / "thing" / "a.txt").read_text() == "old"


def test_leftovers_go_and_finished_things_stay(tmp_path: Path) -> None:
    fill(tmp_path / "thing", "x")
    (tmp_path / ".thing.0123abcd.tmp").mkdir()
    (tmp_path / ".thing.0123abcd.tmp" / "half.txt").write_text("h")
    (tmp_path / ".file.txt.0123abcd.tmp").write_text("h")
    (tmp_path / ".thing.89abcdef.old").mkdir()
    (tmp_path / ".hidden").write_text("not ours")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "thing"]
    remove_leftovers(tmp_path / "absent")  # nothing to do


def test_a_writer_killed_between_a_replacements_two_renames_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "step-00000010.v2", "old")
    (tmp_path / "step-00000010.v2").rename(tmp_path / ".step-00000010.v2.0123abcd.old")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000010.v2"]
    verify_files(tmp_path / "step-00000010.v2", read_manifest(tmp_path / "step-00000010.v2", what="x"), what="x")


def test_a_writer_whose_folder_is_cleared_away_fails_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), committed_folder(tmp_path / "thing", {}) as temporary:  # noqa: PT012
        (temporary / "a.txt").write_text("whole")
        remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_clearing_away_beside_living_writers_never_tears_what_they_commit(tmp_path: Path) -> None:
    """A worker outlasts its killed driver by a moment, while the next driver already clears the folder."""
    stop = threading.Event()

    def write(value: str) -> int:
        committed = 0
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                fill(tmp_path / "thing", value)
                committed += 1
        return committed

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, "x" * 1000) for _ in range(2)]
        deadline = time.monotonic() + 3
        try:
            while time.monotonic() < deadline:
                remove_leftovers(tmp_path)
        finally:
            stop.set()
    assert all(writer.result() > 0 for writer in writers)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["thing"]
    manifest = read_manifest(tmp_path / "thing", what="x")
    assert set(manifest["files"]) == {"a.txt", "deep/b.txt"}
    verify_files(tmp_path / "thing", manifest, what="x")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "missing", "a folder"])
def test_every_damage_to_a_file_is_found_and_named(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "thing"
    fill(target, "content")
    file = target / "deep" / "b.txt"
    content = file.read_bytes()
    if damage == "flipped":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "longer":
        file.write_bytes(content + b"x")
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
    with pytest.raises(InputError, match=r"thing '.*thing' (has a damaged|lacks its) file 'deep/b.txt'.*make it again"):
        verify_files(target, read_manifest(target, what="thing"), what="thing")


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (None, "has no manifest.json, so it is not one or was never finished"),
        ("{", "has a damaged manifest.json"),
        ("\udcff", "has a damaged manifest.json"),
        ("[1]", r"has a damaged manifest.json \(it is \[1\], where an object is wanted\)"),
    ],
)
def test_a_folder_without_a_good_manifest_is_refused(tmp_path: Path, manifest: str | None, sentence: str) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_bytes(manifest.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=sentence):
        read_manifest(tmp_path, what="shards")


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shards '.*absent' does not exist: give the path of a finished one"):
        read_manifest(tmp_path / "absent", what="shards")


def test_sha256_is_hashlibs_over_the_whole_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "big").write_bytes(content)
    assert sha256_file(tmp_path / "big") == hashlib.sha256(content).hexdigest()
