"""Places: the same calls for a local folder and for an object store, and nothing half-written in either."""

from pathlib import Path

import pytest
import s3fs

from ddpm_core.commit import read_manifest, sha256_file
from ddpm_core.errors import InputError
from pipelines.runtime.locations import Location, absolute, commit_json, committed, location


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return location(str(tmp_path), option="--output")
    if request.param == "s3":
        return location(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}", option="--output")
    return location(f"memory://{tmp_path.name}", option="--output")


def test_a_committed_file_is_there_whole(place: Location) -> None:
    with committed(place / "deep" / "file") as temporary:
        temporary.write_bytes(b"content")
        assert not (place / "deep" / "file").exists()
    assert (place / "deep" / "file").read_bytes() == b"content"
    assert sha256_file(place / "deep" / "file") == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    commit_json(place / "manifest.json", {"a": 1})
    assert read_manifest(place, what="thing") == {"a": 1}


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
