"""Fan-out: every unit done, whoever dies, is slow or comes late; and a story where it cannot be."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle

from ddpm_core.errors import InputError
from pipelines.plan.simulation import SimulatedChunk, WorkerModel, simulate
from pipelines.runtime.fan_out import LOSSES, Pool
from pipelines.storage.chunks import chunk_ranges

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


class Squarer:
    """Squares its unit; a unit may have other things happen to its worker first, once or always."""

    def __init__(self, folder: Path, broken: bool = False) -> None:
        if broken:
            raise InputError("weights '/nowhere' do not exist")
        self.folder = folder

    def run(self, unit: tuple[int, str]) -> tuple[int, int]:
        number, fate = unit
        mark = self.folder / f"{fate}-{number}"
        first = not mark.exists()
        mark.touch()
        if fate == "dies" and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "raises":
            raise InputError(f"unit {number} cannot be")
        if fate == "hangs" and first:
            time.sleep(3600)
        time.sleep(1.0 if fate == "takes a while" else 0.05)
        return number**2, os.getpid()


def squares(folder: Path, fates: dict[int, str], count: int = 12, workers: int = 2, **arguments: Any) -> dict[int, Any]:
    units = [(number, fates.get(number, "lives")) for number in range(count)]
    with Pool(workers, 0.5, print) as pool:
        results = list(pool.fan_out(Squarer, [folder, *arguments.values()], units))
    assert len({number for number, _ in results}) == len(results) == count  # each once
    assert {number: value for number, (value, _) in results} == {number: number**2 for number in range(count)}
    return {number: pid for number, (_, pid) in results}


def test_units_are_shared_by_the_workers_and_each_is_done_once(ray_session: None, tmp_path: Path) -> None:
    # Long enough that the second worker, which may start seconds later, comes to some.
    assert len(set(squares(tmp_path, dict.fromkeys(range(12), "takes a while")).values())) == 2
    assert squares(tmp_path, {}, count=1)  # no more workers than units


def test_the_units_of_killed_workers_are_done_by_others(ray_session: None, tmp_path: Path) -> None:
    squares(tmp_path, {0: "dies", 1: "dies", 5: "dies", 11: "dies"})


def test_units_that_are_added_while_results_are_taken_go_next(ray_session: None, tmp_path: Path) -> None:
    units = [(number, "lives") for number in range(4)]
    order = []
    with Pool(1, 0.5, print) as pool:
        for number, (value, _) in pool.fan_out(Squarer, [tmp_path], units):
            order.append(value)
            if number == 0:
                units += [(10, "dies"), (11, "lives")]
            if value == 9:  # the last one
                units.append((12, "lives"))
    assert order == [0, 100, 121, 1, 4, 9, 144]


def test_one_worker_alone_comes_back_from_every_death(ray_session: None, tmp_path: Path) -> None:
    squares(tmp_path, {0: "dies", 3: "dies"}, count=4, workers=1)


def test_a_unit_that_hangs_is_done_by_an_idle_worker(ray_session: None, tmp_path: Path) -> None:
    began = time.monotonic()
    squares(tmp_path, {3: "hangs"})
    assert time.monotonic() - began < 60


def test_a_unit_that_kills_whoever_takes_it_is_named_in_the_end(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^unit 2 took {LOSSES} workers with it \(.*\): give more memory") as caught:
        squares(tmp_path, {2: "kills"}, count=4)
    assert "\n" not in str(caught.value)


def test_what_a_unit_raises_is_raised_in_its_own_words(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^unit 2 cannot be$"):
        squares(tmp_path, {2: "raises"})


def test_a_pool_lives_for_several_fan_outs_whatever_became_of_earlier_ones(ray_session: None, tmp_path: Path) -> None:
    units = [(number, "lives") for number in range(6)]
    with Pool(1, 0.5, print) as pool:
        first = {pid for _, (_, pid) in pool.fan_out(Squarer, [tmp_path], units)}
        with pytest.raises(InputError, match=r"^unit 1 cannot be$"):
            list(pool.fan_out(Squarer, [tmp_path], [(1, "raises")]))
        assert {pid for _, (_, pid) in pool.fan_out(Squarer, [tmp_path], units)} == first  # the process was kept
    with Pool(2, 0.5, print) as pool:
        with pytest.raises(InputError, match=r"^unit 1 cannot be$"):  # while another hangs
            list(pool.fan_out(Squarer, [tmp_path], [(0, "hangs"), (1, "raises")]))
        after = list(pool.fan_out(Squarer, [tmp_path], units))
        assert {number: value for number, (value, _) in after} == {number: number**2 for number in range(6)}


def test_nothing_to_do_starts_nothing() -> None:
    with Pool(None, 0.5, print) as pool:
        assert list(pool.fan_out(Squarer, [], [])) == []
        assert pool.actors == []


def test_waiting_for_a_cluster_that_others_have_taken_is_told(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.runtime.fan_out.STALL", 1.0)
    release: list[Any] = []

    def hear(line: str) -> None:
        lines.append(line)
        for pool in release:
            pool.__exit__()
        release.clear()

    lines: list[str] = []
    everything = Pool(1, 4.0, print)
    assert list(everything.fan_out(Squarer, [tmp_path], [(1, "lives")]))
    release.append(everything)
    with Pool(1, 2.0, hear) as pool:
        assert [value for _, (value, _) in pool.fan_out(Squarer, [tmp_path], [(2, "lives")])] == [4]
    assert lines[0].startswith("waiting: none of 1 workers has had its 2 CPUs for 1 s")


def test_a_worker_that_cannot_start_says_why_in_a_sentence(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^a worker could not be started \(.*weights '/nowhere' do not exist\)"
    ) as caught:
        squares(tmp_path, {}, broken=True)
    assert "\n" not in str(caught.value)


class Sleeper:
    """Takes as long as its chunk says."""

    def run(self, chunk: SimulatedChunk) -> bool:
        time.sleep(0.4 * len(chunk.indices))
        return True


def test_a_simulated_fan_out_takes_as_long_as_a_real_one(ray_session: None, tmp_path: Path) -> None:
    units = [SimulatedChunk(indices, tmp_path) for indices in chunk_ranges(7, 1)]
    with Pool(2, 0.5, print) as pool:
        while len(pool.idle) < 2:  # both have started
            list(pool.fan_out(Sleeper, [], units[:2]))
        began = time.monotonic()
        assert len(list(pool.fan_out(Sleeper, [], units))) == 7
        seconds = time.monotonic() - began
    simulated = simulate(chunk_ranges(7, 1), WorkerModel(workers=2, seconds=lambda indices: 0.4 * len(indices)))
    assert simulated.seconds <= seconds < simulated.seconds + 0.4  # less than a round more
