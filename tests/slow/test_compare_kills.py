"""`steppe compare` ended in every way there is: no process stays, what is finished stays, and it goes on."""

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.cluster import processes_of
from deploy.interrupts import ONE_KEYSTROKE_S
from tests.system.comparisons import CELLS, RunningComparison, outcomes, write_config
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

Start = Callable[..., RunningComparison]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the comparison of a test, which ends with it."""
    started: list[RunningComparison] = []

    def begin(*options: str, epochs: int, name: str = "kept", **modes: str) -> RunningComparison:
        config = write_config(tmp_path, epochs, **modes)
        started.append(RunningComparison(config, tmp_path / name, *options))
        return started[-1]

    yield begin
    for comparison in started:
        comparison.stop_for_good()


def test_killed_again_and_again(start: Start, tmp_path: Path) -> None:
    """At instants that nobody chose; each time more is finished, and at the end all is as it would have been."""
    seed = secrets.randbits(32)
    print(f"instants by seed {seed}")
    chance = random.Random(seed)
    code, _, err = start(epochs=20, name="whole").finish()
    assert code == 0, err
    instants, kept = [], dict[str, int]()
    for _ in range(4):
        comparison = start(epochs=20)
        wait_for(lambda: comparison.training() or comparison.process.poll() is not None, "a cell")  # noqa: B023
        instants.append(chance.uniform(0, 3))
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may also end before
            comparison.process.wait(instants[-1])
        comparison.kill()
        now = comparison.results()
        assert kept.items() <= now.items(), instants
        kept = now
    last = start(epochs=20)
    code, _, err = last.finish()

    assert code == 0, err
    assert kept.items() <= last.results().items()
    assert len(last.results()) == CELLS
    assert outcomes(tmp_path / "kept") == outcomes(tmp_path / "whole"), instants


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_ends_in_order(start: Start, number: signal.Signals) -> None:
    """As a terminal sends Ctrl-C: to the whole group."""
    comparison = start(epochs=100000)
    wait_for(comparison.training, "a cell")
    comparison.processes()
    os.killpg(comparison.process.pid, number)
    code, out, err = comparison.finish()

    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert str(comparison.folder) in err  # what is finished is kept there
    ended(comparison)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_processes_start(start: Start, number: signal.Signals) -> None:
    """Before they do anything of ours: what they say then would be on the terminal."""
    comparison = start(epochs=100000)
    wait_for(comparison.processes, "a process")
    os.killpg(comparison.process.pid, number)
    code, _, err = comparison.finish()

    assert code == 130
    assert "Traceback" not in err
    ended(comparison)


def test_a_second_signal_ends_at_once(start: Start) -> None:
    comparison = start("--cores=2", epochs=100000, sam="async")
    (cell,) = wait_for(comparison.training, "a cell")
    wait_for(lambda: len(processes_of(cell)) > 3, "its cluster")
    comparison.processes()
    os.killpg(comparison.process.pid, signal.SIGINT)
    assert comparison.process.stderr is not None
    said = comparison.process.stderr.readline()
    while said and "once more stops at once" not in said:
        said = comparison.process.stderr.readline()
    with contextlib.suppress(subprocess.TimeoutExpired):
        comparison.process.wait(2 * ONE_KEYSTROKE_S)  # any sooner it would be the same keystroke
    if comparison.process.poll() is None:
        os.killpg(comparison.process.pid, signal.SIGINT)
    code, _, err = comparison.finish()

    assert code == 130
    assert "Traceback" not in err
    ended(comparison)
    assert not processes_of(cell)


def test_a_killed_worker_is_told_by_the_name_of_its_cell(start: Start) -> None:
    """As the system does when memory runs out."""
    comparison = start("--cores=1", epochs=100000)
    (cell,) = wait_for(comparison.training, "a cell")
    pid = wait_for(lambda: _pid(cell / "runtime.json"), "the cell's process")
    (victim,) = [process for process in comparison.processes() if process.pid == pid]
    victim.kill()
    code, _, err = comparison.finish()

    assert code == 1
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("steppe: digits sam seed 0 was killed (SIGKILL)")
    assert str(comparison.folder / "cells/log") in last
    ended(comparison)


def test_a_killed_worker_leaves_no_cluster(start: Start) -> None:
    comparison = start("--cores=2", epochs=100000, sam="async")
    (cell,) = wait_for(comparison.training, "a cell")
    wait_for(lambda: len(processes_of(cell)) > 3, "its cluster")
    pid = _pid(cell / "runtime.json")
    (victim,) = [process for process in comparison.processes() if process.pid == pid]
    victim.kill()
    code, _, err = comparison.finish()

    assert code == 1
    assert "was killed (SIGKILL)" in err.splitlines()[-1]
    assert not processes_of(cell)
    ended(comparison)


def test_an_error_in_a_cell_is_told_by_its_name(start: Start) -> None:
    """A folder is where its result should be."""
    comparison = start("--cores=1", epochs=100)
    (cell,) = wait_for(comparison.training, "a cell")
    (comparison.folder / "cells" / f"{cell.name}.json").mkdir()
    code, _, err = comparison.finish()

    assert code == 1
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("steppe: digits sam seed 0 failed: ")
    assert str(comparison.folder / "cells/log") in last


@pytest.mark.parametrize("cores", [1, 2])
def test_scorers_beside_the_training(start: Start, tmp_path: Path, cores: int) -> None:
    """Each cell has its own cluster, and leaves none of it; SAM's cells have no equal compute to reckon with."""
    comparison = start(f"--cores={cores}", "--json", epochs=60, mode="async")
    seen = 0
    while comparison.process.poll() is None:
        seen = max(seen, len(comparison.processes()))
        with contextlib.suppress(subprocess.TimeoutExpired):
            comparison.process.wait(0.2)
    code, out, err = comparison.finish()

    assert code == 0, err
    assert json.loads(out)["missing_cells"] == 0
    assert outcomes(comparison.folder)["digits", "adm", 1000][2] > 60 * 400 * 6
    assert seen > cores + 3  # Ray's were there
    ended(comparison)


def ended(comparison: RunningComparison) -> None:
    """Nothing is left; multiprocessing's own tracker notices a moment later that it is alone."""
    wait_for(lambda: not comparison.processes(), "the end of all processes")


def _pid(path: Path) -> int | None:
    return int(json.loads(path.read_bytes())["pid"]) if path.exists() else None
