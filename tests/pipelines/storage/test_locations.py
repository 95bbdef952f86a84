"""Places: the same calls for a local folder and for an object store, and nothing half-written in either."""

import os
from pathlib import Path

import pytest
import s3fs
from support.places import store_url

from ddpm_core.commit import read_manifest, sha256_file, verify_files
from ddpm_core.errors import InputError
from pipelines.storage import node_cache
from pipelines.storage.locations import (
    Location,
    absolute,
    check_writable,
    commit_bytes,
    commit_json,
    committed,
    committed_folder,
    committed_in,
    delete,
    entries,
    is_there,
    location,
    open_url,
)
from pipelines.storage.node_cache import on_this_node


@pytest.fixture(params=["local", "s3", pytest.param("azure", marks=pytest.mark.slow), "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    given = str(tmp_path) if request.param == "local" else store_url(request, request.param, tmp_path.name)
    return location(given, option="--output")


def test_a_committed_file_is_there_whole(place: Location) -> None:
    with committed(place / "deep" / "file") as temporary:
        temporary.write_bytes(b"content")
        assert not (place / "deep" / "file").exists()
    assert (place / "deep" / "file").read_bytes() == b"content"
    assert sha256_file(place / "deep" / "file") == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    commit_json(place / "manifest.json", {"a": 1})
    assert read_manifest(place, what="thing") == {"a": 1}


def test_a_committed_folder_is_there_whole_or_not_at_all(place: Location) -> None:
    with committed_folder(place / "a name", {"step": 1}) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_bytes(b"content")
        assert committed_in(place) == []
    assert committed_in(place) == ["a name"]
    manifest = read_manifest(place / "a name", what="thing")
    assert (manifest["step"], list(manifest["files"])) == (1, ["deep/file"])
    verify_files(place / "a name", manifest, what="thing")
    with pytest.raises(RuntimeError), committed_folder(place / "another", {}):
        raise RuntimeError
    assert [path.name for path in entries(place)] == ["a name"]


def test_what_lies_in_a_folder_is_seen_as_it_is_now(place: Location) -> None:
    assert entries(place / "absent") == committed_in(place / "absent") == []
    for name in ("b", "a", "c d"):
        commit_bytes(place / "folder" / name, name.encode())
        assert name in [path.name for path in entries(place / "folder")]
    assert [path.name for path in entries(place / "folder")] == ["a", "b", "c d"]
    delete(place / "folder" / "b")
    delete(place / "folder" / "b")
    assert [path.name for path in entries(place / "folder")] == ["a", "c d"]


def test_a_folder_that_a_console_made_is_empty(s3_bucket: str, tmp_path: Path) -> None:
    folder = open_url(f"{s3_bucket}/{tmp_path.name}/place")
    folder.fs.pipe_file(f"{folder.path}/", b"")
    assert entries(folder) == committed_in(folder) == []


@pytest.mark.parametrize("url", ["s3:///place", "data://place", "file:///tmp/place"])
def test_a_place_to_write_is_in_a_store_that_shows_files_whole(url: str) -> None:
    with pytest.raises(InputError, match=r"--storage .* cannot be written to"):
        check_writable(open_url(url), "--storage")


def test_a_store_that_does_not_say_is_not_taken_for_an_absence(s3_bucket: str) -> None:
    assert not is_there(open_url(f"{s3_bucket}/nothing"))
    with pytest.raises(PermissionError):
        is_there(open_url("s3://ddpm-forbidden/nothing"))


def test_whether_a_place_can_be_written_to_leaves_nothing_behind(place: Location) -> None:
    check_writable(place / "folder", "--output")
    assert entries(place) == []


def test_a_file_of_a_store_is_fetched_once_until_it_is_another(
    place: Location, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(place, Path):
        assert on_this_node(place / "file") == place / "file"
        return
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(FileNotFoundError):
        on_this_node(place / "weights.pt")
    commit_bytes(place / "weights.pt", b"first")
    first = on_this_node(place / "weights.pt")
    assert (first.name, first.read_bytes()) == ("weights.pt", b"first")
    with monkeypatch.context() as patch:
        patch.setattr(place.fs, "get_file", None)  # it is not fetched again
        assert on_this_node(place / "weights.pt") == first
    commit_bytes(place / "weights.pt", b"another")
    assert on_this_node(place / "weights.pt").read_bytes() == b"another"
    monkeypatch.setattr(node_cache, "LIMIT", 12)
    os.utime(first, (0, 0))
    commit_bytes(place / "third", b"third")
    assert on_this_node(place / "third").read_bytes() == b"third"
    assert not first.exists()  # that which was not used for longest made room
    assert sorted(path.read_bytes() for path in cache.glob("ddpm/files/*/*")) == [b"another", b"third"]


def test_a_file_whose_writer_fails_is_not_there(place: Location) -> None:
    commit_json(place / "file", {"a": 1})
    with pytest.raises(RuntimeError), committed(place / "file") as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise RuntimeError
    with pytest.raises(InputError, match=r"has no manifest.json"):
        read_manifest(place, what="thing")
    assert (place / "file").read_bytes() == b'{\n "a": 1\n}\n'


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nothing://bucket/x", r"--shards is 'nothing://bucket/x', which cannot be opened: Unsupported filesystem"),
        ("s3://bucket/x", r"--shards is 's3://bucket/x', which cannot be reached: EndpointConnectionError: "),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_with_a_sentence(
    url: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=sentence):
        location(url, option="--shards")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "names nothing: give a path, or . for the current folder"),
        ("  ", "names nothing"),
        ("a\0b", "names nothing"),
        ("a" * 300, "no path here .File name too long"),
        ("x/" * 3000, "no path here .File name too long"),
        ("~nosuchuser/x", "no path here .Could not determine home"),
        ("file/below", "no path here .Not a directory"),
        ("circle/x", "no path here .(Symlink loop|Too many levels)"),
    ],
)
def test_what_no_file_system_takes_is_refused_in_a_sentence(
    path: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("circle").symlink_to("circle")
    for make in (absolute, location):
        with pytest.raises(InputError, match=f"^--x is .*{why}") as refused:
            make(path, option="--x")
        assert len(str(refused.value)) < 400
