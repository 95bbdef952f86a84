"""What a job's end looks like: a sentence and an exit code, whatever happened."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from support.processes import ROOT

from ddpm_core.errors import DivergedError, InputError
from jobs import cli, interrupted

COMMAND = ["jobs/train_lsun.py", "church", "--shards", "/data/it's here", "--optim.lr", "1e-4"]
STOPPED = (
    "interrupted: what is finished is kept, and this goes on from it: python jobs/train_lsun.py church --shards "
    "'/data/it'\"'\"'s here' --optim.lr 1e-4\n"
)


def ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException) -> int:
    """The exit code of a job that raises."""

    def main() -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", COMMAND)
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return int(str(stop.value.code))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("--x is 1: give 2"), 2, "error: --x is 1: give 2\n"),
        (DivergedError("loss is nan"), 1, "diverged: loss is nan\n"),
        (KeyboardInterrupt(), 130, STOPPED),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            2,
            "error: '/data/x' cannot be read or written (No space left on device): make room, then give the same command again\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            2,
            (
                "error: '/data/x' cannot be read or written (Permission denied): allow it, or give another place, then give the "
                "same command again\n"
            ),
        ),
    ],
)
def test_a_known_end_is_one_sentence_and_its_exit_code(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert ended(monkeypatch, tmp_path, error) == code
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


def test_ctrl_c_that_a_library_wraps_is_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrapped = RuntimeError("Error calling __set_name__")
    wrapped.__cause__ = KeyboardInterrupt()
    assert ended(monkeypatch, tmp_path, wrapped) == 130
    assert capsys.readouterr().err == STOPPED
    assert interrupted(wrapped)
    assert not interrupted(RuntimeError("a bug"))


def test_a_full_disk_of_a_worker_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cause = OSError(errno.EROFS, "Read-only file system", "/data/x")
    remote = RayTaskError("work", "Traceback\n  many\n  lines", cause).as_instanceof_cause()
    assert ended(monkeypatch, tmp_path, remote) == 2
    assert capsys.readouterr().err.startswith(
        "error: '/data/x' cannot be read or written (Read-only file system): allow it"
    )


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), AssertionError(), ConnectionError("gone"), MemoryError()])
def test_an_error_of_the_program_is_one_sentence_that_names_the_file_of_its_story(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ended(monkeypatch, tmp_path, error) == 1
    said = capsys.readouterr().err
    (story,) = tmp_path.iterdir()
    assert said.startswith(f"failed: {type(error).__name__}")
    assert said.count("\n") == 1
    assert str(story) in said
    assert "Traceback (most recent call last)" in story.read_text()
    assert story.stat().st_mode & 0o077 == 0  # it may hold what the command was given


@pytest.mark.parametrize("job", ["train_lsun.py", "evaluate.py", "nightly_eval.py"])
def test_ctrl_c_at_any_moment_of_a_start_shows_no_traceback(job: str, tmp_path: Path) -> None:
    for pause in (0.0, 0.05, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", str(ROOT / "jobs" / job), "--help"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:  # Python's own start is not ours
            if line.rpartition("|")[2].strip() == "jobs":
                break
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
