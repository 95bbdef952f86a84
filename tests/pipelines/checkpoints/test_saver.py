"""Saving: what is saved is the state of that moment, the training goes on, and whatever stops a writer or a deletion, the
other checkpoints stay whole."""

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.processes import wait_for
from support.small_disk import mounted_disk
from support.states import new_state
from upath import UPath

from ddpm_core.checkpoint import (
    Checkpoint,
    list_checkpoints,
    snapshot,
    write_checkpoint,
)
from ddpm_core.errors import InputError
from ddpm_core.training import TrainState
from pipelines.checkpoints import store
from pipelines.checkpoints.retention import mark_best, marked_steps, prune, to_delete, unmark
from pipelines.checkpoints.saver import Saver
from pipelines.checkpoints.store import (
    commit_snapshot,
    delete_checkpoint,
    newest_checkpoint,
    saved_checkpoints,
    saved_steps,
    set_aside_damaged,
)
from pipelines.storage.locations import Location, location, open_url

CONFIG = {"name": "linear"}


def advance(state: TrainState) -> None:
    """An update in place of weights, EMA and Adam's moments."""
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 + state.step)
    state.optimizer.param_groups[0]["lr"] = 0.1 / (1 + state.step)
    state.optimizer.step()
    state.ema.update(state.step)
    state.step += 1


def uniform_state(step: int, width: int = 8) -> TrainState:
    """Every value of it is its step."""
    state = new_state(step, width)
    advance(state)
    state.step = step
    moments = [entry[key] for entry in state.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    for tensor in [*state.model.parameters(), *state.ema.shadow.values(), *moments]:
        tensor.data.fill_(step)
    return state


def check_whole(checkpoint: Checkpoint) -> None:
    """Every file is there, undamaged, and of the checkpoint's step."""
    state = new_state(width=checkpoint.config["width"])
    checkpoint.restore(state)
    moments = [entry[key] for entry in state.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    for tensor in [*state.model.parameters(), *state.ema.shadow.values(), *moments]:
        assert bool((tensor == checkpoint.step).all())
    assert [record["step"] for record in checkpoint.history] == list(range(1, checkpoint.step + 1))


def commit_uniform(folder: Location, step: int, width: int = 8) -> None:
    history = [{"step": number} for number in range(1, step + 1)]
    commit_snapshot(folder, snapshot(uniform_state(step, width)), {"width": width}, history)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A run's folder, empty."""
    if request.param == "local":
        (tmp_path / "a[b]").mkdir()  # no pattern, whatever it looks like
        return tmp_path / "a[b]"
    if request.param == "s3":
        return location(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}/a[b]", option="--storage")
    return location(f"memory://{tmp_path.name}/a[b]", option="--storage")


STEPS = st.sets(st.integers(0, 300), min_size=1, max_size=40)
EVERY = st.none() | st.integers(1, 50)


@given(STEPS, st.integers(1, 10), EVERY, st.sets(st.integers(0, 300), max_size=2))
def test_what_need_not_stay_goes_and_nothing_else(
    steps: set[int], keep_last: int, keep_every: int | None, marked: set[int]
) -> None:
    gone = to_delete(list(steps), keep_last, keep_every, marked)
    assert gone == sorted(set(gone))
    for step in steps:
        newer = sum(other > step for other in steps)
        stays = newer < keep_last or step in marked or (keep_every is not None and step % keep_every == 0)
        assert (step in gone) != stays
    assert max(steps) not in gone
    assert to_delete(sorted(steps - set(gone)), keep_last, keep_every, marked) == []


@given(STEPS, st.integers(1, 10), EVERY)
def test_deleting_at_every_save_leaves_what_deleting_at_the_end_would(
    steps: set[int], keep_last: int, keep_every: int | None
) -> None:
    there: list[int] = []
    for step in sorted(steps):
        there.append(step)
        there = sorted(set(there) - set(to_delete(there, keep_last, keep_every, ())))
    assert there == sorted(steps - set(to_delete(list(steps), keep_last, keep_every, ())))


@pytest.mark.parametrize(("keep_last", "keep_every"), [(0, None), (1, 0)])
def test_a_rule_that_keeps_nothing_is_refused(keep_last: int, keep_every: int | None) -> None:
    with pytest.raises(ValueError, match="give positive numbers"):
        to_delete([1], keep_last, keep_every, ())


class Gate:
    """A disk as slow as the test wants: a write begins when it is let through, and is seen to begin and to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.let_through, self.log = threading.Semaphore(0), threading.Semaphore(0), list[str]()
        monkeypatch.setattr(store, "write_checkpoint", self._write)

    def _write(self, folder: Path, saved: Any, config: Any, history: Any) -> Checkpoint:
        self.log.append(f"begin {saved['step']}")
        self.begun.release()
        assert self.let_through.acquire(timeout=60)
        checkpoint = write_checkpoint(folder, saved, config, history)
        self.log.append(f"end {saved['step']}")
        return checkpoint


def test_the_state_of_that_moment_is_saved_while_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte what a save that stops the training writes, twice, the second over the first one's memory."""
    state, history = new_state(), list[dict[str, float]]()
    gate = Gate(monkeypatch)
    (tmp_path / "beside").mkdir()
    with Saver(tmp_path / "beside", keep_last=5) as saver:
        for number in (1, 2):
            advance(state)
            history.append({"step": number, "loss": 0.1 * number})
            write_checkpoint(tmp_path / "stopped", snapshot(state), CONFIG, list(history))
            saver.save(state, CONFIG, history)
            assert gate.begun.acquire(timeout=60)
            # save() has returned and nothing is written; the training goes on, in place.
            assert gate.log[-1] == f"begin {number}"
            assert saved_steps(tmp_path / "beside") == list(range(1, number))
            for _ in range(3):
                advance(state)
            state.step = number
            gate.let_through.release()
    assert gate.log == ["begin 1", "end 1", "begin 2", "end 2"]
    assert saver.last_good == 2
    for name in ("step-00000001", "step-00000002"):
        assert contents(tmp_path / "beside" / name) == contents(tmp_path / "stopped" / name)


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, state = Gate(monkeypatch), new_state(1)
    with Saver(tmp_path, keep_last=5) as saver, ThreadPoolExecutor(1) as training:
        saver.save(state, CONFIG, [])
        assert gate.begun.acquire(timeout=60)
        state.step = 2
        started = time.monotonic()
        second = training.submit(saver.save, state, CONFIG, [])
        threading.Timer(0.5, gate.let_through.release).start()
        second.result(timeout=60)
        assert gate.log[:2] == ["begin 1", "end 1"]
        assert time.monotonic() - started >= 0.4
        gate.let_through.release()
    assert saved_steps(tmp_path) == [1, 2]


def test_checkpoints_come_back_from_everywhere(folder: Location) -> None:
    assert saved_steps(folder) == []
    assert newest_checkpoint(folder, 100) is None
    commit_snapshot(folder, snapshot(uniform_state(4)), {"width": 8}, [{"step": n} for n in (1, 2, 3, 4)])
    commit_uniform(folder, 12)
    commit_uniform(folder, 8)
    assert saved_steps(folder) == [4, 8, 12]
    assert [found.step for found in saved_checkpoints(folder)] == [4, 8, 12]
    for found in saved_checkpoints(folder):
        check_whole(found)
    newest = newest_checkpoint(folder, 11)
    assert newest is not None
    assert (newest.step, newest.path.name) == (8, "step-00000008")


def test_a_step_saved_again_is_replaced(folder: Location) -> None:
    commit_snapshot(folder, snapshot(new_state(3)), {"width": 8}, [])
    commit_uniform(folder, 3)
    (found,) = saved_checkpoints(folder)
    check_whole(found)


def test_the_last_the_regular_and_the_best_stay(folder: Location) -> None:
    with Saver(folder, keep_last=2, keep_every=4) as saver:
        for step in range(1, 11):
            saver.save(uniform_state(step), {"width": 8}, [{"step": number} for number in range(1, step + 1)])
            if step == 3:
                saver._wait()
                mark_best(folder, 3)
    assert saved_steps(folder) == [3, 4, 8, 9, 10]
    for found in saved_checkpoints(folder):
        check_whole(found)
    assert {path.name for path in folder.iterdir()} == {"best.json", *(f"step-{n:08d}" for n in (3, 4, 8, 9, 10))}
    mark_best(folder, 9)
    mark_best(folder, 8, "alias-0.mark.json")
    prune(folder, 10, 1, None)
    assert saved_steps(folder) == [8, 9, 10]
    unmark(folder, "alias-0.mark.json")
    unmark(folder, "alias-0.mark.json")
    prune(folder, 10, 1, None)
    assert saved_steps(folder) == [9, 10]


def test_what_is_best_but_gone_is_said_and_the_mark_stays_where_it_was(folder: Location) -> None:
    commit_uniform(folder, 5)
    assert marked_steps(folder) == set()
    mark_best(folder, 5)
    with pytest.raises(InputError, match=r"the checkpoint at step 4 of '.*' is the best, but it is no longer there"):
        mark_best(folder, 4)
    assert marked_steps(folder) == {5}
    for damaged in ('{"step": ', "[]", '{"step": null}'):
        (folder / "best.json").write_text(damaged)
        with pytest.raises(InputError, match=r"best.json' is damaged \(.*delete it and evaluate"):
            marked_steps(folder)
        with pytest.raises(InputError, match="is damaged"):  # and nothing is deleted on its word
            prune(folder, 6, 1, None)
        assert saved_steps(folder) == [5]


def test_a_longer_runs_checkpoints_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for step in (2, 4, 20, 30):
        commit_uniform(tmp_path, step)
    with Saver(tmp_path, keep_last=1) as saver:
        saver.save(uniform_state(6), {"width": 8}, [])
    assert saved_steps(tmp_path) == [6, 20, 30]


def test_a_reader_of_a_deleted_or_replaced_checkpoint_gets_an_error(folder: Location) -> None:
    commit_uniform(folder, 2)
    commit_uniform(folder, 3)
    deleted, replaced = saved_checkpoints(folder)
    delete_checkpoint(folder, 2)
    commit_snapshot(folder, snapshot(new_state(3)), {"width": 8}, [])
    assert saved_steps(folder) == [3]
    state = new_state()
    before = snapshot(state)
    for use in (deleted.weights, lambda: deleted.history, lambda: deleted.restore(state)):
        with pytest.raises(
            InputError, match=r"step-00000002' lacks its file .*take another, or have the run keep more"
        ):
            use()
    for use in (replaced.weights, lambda: replaced.restore(state)):
        with pytest.raises(InputError, match=r"step-00000003' has a damaged file .*sha256 differs"):
            use()
    assert all(torch.equal(before["model"][name], tensor) for name, tensor in state.model.state_dict().items())
    delete_checkpoint(folder, 2)  # it is no error that it is gone


@pytest.mark.parametrize("url", ["local", "s3"])
def test_readers_beside_a_run_that_deletes_get_the_weights_or_an_error(
    url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Location = tmp_path
    if url == "s3":
        folder = location(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}", option="--storage")
    commit_uniform(folder, 1)
    stop = threading.Event()

    def read() -> int:
        good = 0
        while not stop.is_set():
            for found in saved_checkpoints(folder):
                with contextlib.suppress(InputError):
                    check_whole(found)
                    good += 1
        return good

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            with Saver(folder, keep_last=1) as saver:
                for step in range(2, 60 if url == "local" else 12):
                    saver.save(uniform_state(step), {"width": 8}, [{"step": n} for n in range(1, step + 1)])
        finally:
            stop.set()
    assert all(reader.result() > 0 for reader in readers)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 512 KiB, outside the folders that pytest clears away."""
    with mounted_disk(512) as path:
        yield path


def test_a_disk_full_at_any_page_leaves_the_last_good_checkpoint(small_disk: Path) -> None:
    """In turn, one more page is left free until a checkpoint fits: every file is once the one that does not."""
    folder, filler = small_disk / "run", small_disk / "filler"
    folder.mkdir()
    commit_uniform(folder, 7, width=48)
    sentence = re.compile(
        rf"run '{folder}' could not save step 8 \(.*No space left on device.*\); the last good checkpoint is step 7: "
        "make room or repair the storage, then give the same command again"
    )
    for pages in range(64):
        filler.unlink(missing_ok=True)
        filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 4096 * pages))
        error = error_of_a_save(folder, 8)
        if not error:
            break
        assert sentence.fullmatch(error)
        assert [path.name for path in folder.iterdir()] == ["step-00000007"]
        check_whole(list_checkpoints(folder)[0])
    assert pages > 12  # the folder, four files and the manifest, and pages within them
    (good,) = list_checkpoints(folder)  # the one before stayed until then
    assert good.step == 8
    check_whole(good)


def error_of_a_save(folder: Location, step: int) -> str:
    saver = Saver(folder, keep_last=1)
    saver.save(uniform_state(step, 48), {"width": 48}, [{"step": number} for number in range(1, step + 1)])
    try:
        saver.close()
    except InputError as error:
        return str(error)
    return ""


def test_an_error_comes_at_the_next_save_and_the_run_can_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    saver = Saver(run, keep_last=2)
    saver.save(uniform_state(1), {"width": 8}, [{"step": 1}])
    saver._wait()
    run.rename(tmp_path / "gone")  # as when a disk is unmounted
    saver.save(uniform_state(2), {"width": 8}, [])
    with pytest.raises(InputError, match=r"could not save step 2 \(.*folder is gone.*last good checkpoint is step 1:"):
        saver.save(uniform_state(3), {"width": 8}, [])
    assert not run.exists()  # not made anew, on whatever disk is beneath
    (tmp_path / "gone").rename(run)
    saver.close()
    assert saved_steps(run) == [1]


def test_a_failed_save_does_not_hide_the_error_that_ended_the_training(tmp_path: Path) -> None:
    state = new_state(1)
    with pytest.raises(ZeroDivisionError), Saver(tmp_path / "absent", keep_last=1) as saver:  # noqa: PT012
        saver.save(state, CONFIG, [])
        raise ZeroDivisionError
    with (
        pytest.raises(InputError, match=r"could not save step 1 \(.*there is no good checkpoint yet: make room"),
        Saver(tmp_path / "absent", keep_last=1) as saver,
    ):
        saver.save(state, CONFIG, [])


@pytest.fixture(params=["s3", "memory"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """A run's folder in an object store, with a good checkpoint at step 7."""
    root = request.getfixturevalue("s3_bucket") if request.param == "s3" else "memory:/"
    folder = open_url(f"{root}/{tmp_path.name}/run")
    commit_uniform(folder, 7)
    return folder


def test_an_upload_stopped_at_any_file_leaves_no_checkpoint_and_is_cleared(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = bucket.fs.put_file
    for number in range(5):
        uploaded: list[str] = []

        def failing(source: str, target: str, number: int = number, uploaded: list[str] = uploaded) -> None:
            if len(uploaded) == number:
                raise ConnectionResetError("the store hung up")
            uploaded.append(Path(target).name)
            put(source, target)

        monkeypatch.setattr(bucket.fs, "put_file", failing)
        saver = Saver(bucket, keep_last=1)
        saver.save(uniform_state(8), {"width": 8}, [{"step": step} for step in range(1, 9)])
        with pytest.raises(
            InputError,
            match=r"could not save step 8 \(the store hung up\); .* is step 7: make room",
        ):
            saver.close()
        assert len(uploaded) == number
        assert "manifest.json" not in uploaded
        (good,) = saved_checkpoints(bucket)
        assert good.step == 7
        check_whole(good)
    monkeypatch.undo()
    with Saver(bucket, keep_last=1) as saver:
        saver.save(uniform_state(9), {"width": 8}, [{"step": step} for step in range(1, 10)])
    assert [path.name for path in bucket.iterdir()] == ["step-00000009"]
    check_whole(saved_checkpoints(bucket)[0])


def test_an_upload_over_an_earlier_one_of_its_step_never_leaves_a_mixture(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_uniform(bucket, 6)
    put = bucket.fs.put_file

    def failing(source: str, target: str) -> None:
        if Path(target).name == "model.safetensors":
            raise ConnectionResetError("the store hung up")
        put(source, target)

    monkeypatch.setattr(bucket.fs, "put_file", failing)
    with pytest.raises(OSError, match="the store hung up"):
        commit_snapshot(bucket, snapshot(new_state(7)), {"width": 8}, [])
    (good,) = saved_checkpoints(bucket)
    assert good.step == 6
    check_whole(good)


def test_what_a_killed_upload_left_here_goes_when_its_run_goes_on(
    bucket: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    put, sources = bucket.fs.put_file, list[Path]()

    def noting(source: str, target: str) -> None:
        sources.append(Path(source))
        put(source, target)

    monkeypatch.setattr(bucket.fs, "put_file", noting)
    for folder in (bucket, bucket.parent / "other"):
        commit_uniform(folder, 8)
    assert list(tmp_path.iterdir()) == []
    gone = f"-{2**22 + 1}-"  # of a process whose number Linux gives to none
    ours, others = (
        tmp_path / source.parent.parent.name.replace(f"-{os.getpid()}-", gone) for source in (sources[0], sources[-1])
    )
    for left in (ours, others):
        (left / ".step-00000008.0123abcd.tmp").mkdir(parents=True)
    Saver(bucket, keep_last=1).close()
    assert list(tmp_path.iterdir()) == [others]


def test_a_deletion_stopped_halfway_leaves_nothing_torn_and_is_finished(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        remove = bucket.fs.rm_file

        def failing(path: str) -> None:
            if not path.endswith("manifest.json"):
                raise RuntimeError("the store hung up")  # no OSError, as botocore's are not
            remove(path)

        patch.setattr(bucket.fs, "rm_file", failing)
        saver = Saver(bucket, keep_last=1)
        saver.save(uniform_state(8), {"width": 8}, [{"step": step} for step in range(1, 9)])
        with pytest.raises(InputError, match=r"could not delete older checkpoints \(.*last good checkpoint is step 8:"):
            saver.close()
    assert saved_steps(bucket) == [8]
    assert (bucket / "step-00000007" / "optimizer.pt").is_file()
    prune(bucket, 8, 1, None)
    assert [path.name for path in bucket.iterdir()] == ["step-00000008"]


def save_until_killed(url: str, environment: dict[str, str]) -> None:
    """What a training run does with its checkpoints, and nothing else."""
    os.environ.update(environment)
    tempfile.tempdir = environment["TMPDIR"]
    torch.set_num_threads(1)
    folder: Location = open_url(url) if "://" in url else Path(url)
    newest = newest_checkpoint(folder, 10**6)
    step = newest.step if newest else 0
    history = newest.history if newest else []
    with Saver(folder, keep_last=2, keep_every=10) as saver:
        while True:
            step += 1
            history.append({"step": step})
            saver.save(uniform_state(step, 64), {"width": 64}, history)
            if step == 3:
                saver._wait()
                mark_best(folder, 3)


@pytest.mark.parametrize(
    ("place", "kills", "seconds"), [("local", 25, 0.1), pytest.param("s3", 8, 0.6, marks=pytest.mark.slow)]
)
def test_kills_at_any_moment_leave_whole_checkpoints_and_all_that_must_stay(
    place: str, kills: int, seconds: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """kill -9, again and again, of a process that saves and deletes all the time, within `seconds`: more than one save and
    its deletions take."""
    folder: Location = tmp_path / "run"
    if place == "s3":
        folder = open_url(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}/run")
    for name in ("run", "staging"):
        (tmp_path / name).mkdir()
    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    environment["TMPDIR"] = str(tmp_path / "staging")
    processes = multiprocessing.get_context("forkserver")  # with all of this imported once, a start takes no time
    processes.set_forkserver_preload(["hypothesis", "pipelines.checkpoints.saver", "pytest", "s3fs", "torch._dynamo"])
    dice, last = random.Random(0), 0
    for _ in range(kills):
        run = processes.Process(target=save_until_killed, args=(str(folder), environment))
        run.start()
        try:
            wait_for(lambda: not run.is_alive() or max(saved_steps(folder), default=0) > last + 3)  # noqa: B023
            time.sleep(dice.uniform(0, seconds))
            assert run.is_alive()
        finally:
            os.kill(run.pid or 0, signal.SIGKILL)
            run.join()
        found = saved_checkpoints(folder)
        steps = [checkpoint.step for checkpoint in found]
        last = steps[-1]
        for checkpoint in found:
            check_whole(checkpoint)
        must = {3, *range(10, last + 1, 10), last, last - 1}
        # The kill may have come between a commit and the deletion that follows it.
        assert must <= set(steps) <= must | {last - 2}
    with Saver(folder, keep_last=1) as saver:
        saver.save(uniform_state(last + 1, 64), {"width": 64}, [{"step": number} for number in range(1, last + 2)])
    names = {path.name for path in folder.iterdir()} - {"best.json"}
    assert names == {"step-00000003", f"step-{last + 1:08d}"}  # of all that was torn, nothing is left


def test_a_store_that_refuses_for_a_moment_costs_no_checkpoint(bucket: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_uniform(bucket, 8)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError("The provided token has expired.")

    for call in ("cat_file", "info"):
        with monkeypatch.context() as patch:
            patch.setattr(bucket.fs, call, refuse)
            with pytest.raises((InputError, PermissionError), match="token has expired"):
                set_aside_damaged(bucket, 8, lambda line: None)
    assert saved_steps(bucket) == [7, 8]
    (bucket / "step-00000008" / "model.safetensors").write_bytes(b"damaged")
    set_aside_damaged(bucket, 8, lambda line: None)
    assert saved_steps(bucket) == [7]
