"""Leases in an object store: one holder at a time, whoever dies, and whatever the store answers."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout
from support.places import store_url
from upath import UPath

from ddpm_core.errors import InputError
from pipelines.storage import store_lease
from pipelines.storage.lease import HOLDER, LOCK, sole_writer
from pipelines.storage.locations import commit_json, entries, open_url
from pipelines.storage.store_lease import StoreLease


@pytest.fixture(params=["s3", pytest.param("azure", marks=pytest.mark.slow), "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    return open_url(f"{store_url(request, request.param, tmp_path.name)}/a name/.lease")


LEASES: list[StoreLease] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No lease of a test gives signs of life after it."""
    yield
    while LEASES:
        LEASES.pop()._ended.set()


def lease(place: UPath, machine: str = "here", *, lasts: float = 60.0, alive: bool = True) -> StoreLease:
    LEASES.append(StoreLease(place, lasts=lasts, machine=machine, is_alive=lambda process: alive))
    return LEASES[-1]


def die(held: StoreLease) -> None:
    """Give no more signs of life."""
    held._ended.set()
    assert held._thread is not None
    held._thread.join()


def test_of_many_that_want_it_one_at_a_time_has_it(place: UPath) -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal inside, most
        held = lease(place, f"machine-{number}")
        for _ in range(3):
            held.acquire(timeout=-1, poll_interval=0.01)
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1
            held.release()

    threads = [threading.Thread(target=work, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert [path.name for path in entries(place)] == ["00000018"]  # each of the 18 had a number of its own


def test_a_holder_that_lives_keeps_it(place: UPath) -> None:
    held = lease(place, lasts=2.0)  # long, for a loaded machine gives late signs of life
    held.acquire()
    with pytest.raises(Timeout):
        lease(place, "elsewhere", lasts=2.0).acquire(timeout=3.0, poll_interval=0.1)
    held.release()
    lease(place, "elsewhere").acquire()


def test_that_of_a_dead_machine_is_free_after_its_time_and_not_before(place: UPath) -> None:
    held = lease(place, lasts=1.0)
    held.acquire()
    die(held)
    with pytest.raises(Timeout):
        lease(place, "elsewhere", lasts=1.0).acquire(timeout=0.5, poll_interval=0.05)
    begun = time.monotonic()
    lease(place, "elsewhere", lasts=1.0).acquire(timeout=5.0, poll_interval=0.05)
    assert time.monotonic() - begun > 1.0


def test_that_of_a_dead_process_of_this_machine_is_free_at_once(place: UPath) -> None:
    held = lease(place)
    held.acquire()
    die(held)
    with pytest.raises(Timeout):
        lease(place).acquire()
    lease(place, alive=False).acquire()


def test_short_holders_one_after_the_other_are_not_taken_for_a_dead_one(place: UPath) -> None:
    waiting = lease(place, "waiting", lasts=2.0)
    for number in range(12):  # each of them has given no sign of life yet when it ends
        held = lease(place, f"machine-{number}", lasts=60.0)
        held.acquire()
        with pytest.raises(Timeout):
            waiting.acquire(timeout=0.2, poll_interval=0.05)
        held.release()


def test_a_holder_that_slept_and_was_overtaken_says_so_and_takes_nothing_back(
    place: UPath, caplog: pytest.LogCaptureFixture
) -> None:
    held = lease(place, lasts=0.2)
    held.acquire()
    die(held)
    other = lease(place, "elsewhere", lasts=0.2)
    other.acquire(timeout=5.0, poll_interval=0.05)
    held._ended.clear()
    held._renew()  # it wakes up
    assert "was taken over by another command" in caplog.text
    held.release()
    with pytest.raises(Timeout):
        lease(place, "third").acquire()


def test_a_try_whose_answer_was_lost_is_not_taken_for_somebody_elses(
    place: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, tries = place.fs.pipe_file, 0

    def twice(path: str, value: bytes, **options: Any) -> None:
        nonlocal tries
        tries += 1
        put(path, value, **options)
        if tries == 1:  # the connection was cut after it had arrived, and the library tries again
            put(path, value, **options)

    monkeypatch.setattr(place.fs, "pipe_file", twice)
    lease(place).acquire()


def test_a_store_that_overwrites_what_has_a_name_is_refused(place: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    put = place.fs.pipe_file
    monkeypatch.setattr(place.fs, "pipe_file", lambda path, value, **options: put(path, value))
    with pytest.raises(InputError, match="makes an object although its name is taken"):
        lease(place).acquire()
    assert not entries(place)


def test_an_old_look_at_the_folder_wins_nothing(place: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lease(place)
    first.acquire()
    first.release()
    before = entries(place)
    held = lease(place)
    held.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(store_lease, "entries", lambda folder: before)
        with pytest.raises(Timeout):
            lease(place, "elsewhere").acquire()
    with monkeypatch.context() as patch:
        patch.setattr(store_lease, "entries", lambda folder: [])
        held_before = place / "00000001"
        commit_json(held_before, {"holder": "", "machine": "", "process": 1, "signs": 0, "free": True})
        with pytest.raises(Timeout):
            lease(place, "elsewhere").acquire()


@pytest.fixture
def folder(s3_bucket: str, tmp_path: Path) -> UPath:
    return open_url(f"{s3_bucket}/{tmp_path.name}/output")


def test_a_folder_in_a_store_has_one_writer(folder: UPath) -> None:
    with sole_writer(folder, "output"):
        assert [path.name for path in entries(folder)] == [LOCK, HOLDER]
        with (
            pytest.raises(
                InputError, match=r"output 's3://.*/output' is written to by process \d+ on .* since 20\d\d-"
            ),
            sole_writer(folder, "output"),
        ):
            raise AssertionError("two hold it")
    assert [path.name for path in entries(folder)] == [LOCK]
    with sole_writer(folder, "output"):
        commit_json(folder / "result.json", 1)
    assert [path.name for path in entries(folder)] == [LOCK, "result.json"]
    with sole_writer(folder, "output"):
        pass
