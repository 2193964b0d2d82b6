"""`steppe compare` for real: two small searches and six final runs on digits."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.compare.compare import compare, report_only
from deploy.compare.config import CompareConfig
from shared.config import read_config
from shared.errors import ConfigError, RunError
from tests.raising import refuses
from tests.system.comparisons import CELLS, RunningComparison, outcomes, write_config
from tests.system.runs import STEPPE
from tests.waiting import LIMIT_S, wait_for


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def killed(place: Path) -> Iterator[tuple[dict[str, int], tuple[int, str, str]]]:
    """A comparison that was killed after its first cell, and went on: the cells before, and how it ended."""
    config, folder = write_config(place), place / "kept"
    first = RunningComparison(config, folder)
    second = None
    try:
        wait_for(first.results, "the first cell")
        first.kill()
        before = first.results()
        second = RunningComparison(config, folder, "--json")
        yield before, second.finish()
    finally:
        for started in (first, second):
            if started is not None:
                started.stop_for_good()


def test_goes_on_after_a_kill_and_keeps_what_is_finished(
    place: Path, killed: tuple[dict[str, int], tuple[int, str, str]]
) -> None:
    before, (code, out, err) = killed
    kept = {path.name: path.stat().st_mtime_ns for path in (place / "kept/cells").glob("*.json")}

    assert code == 0, err
    assert json.loads(out)["missing_cells"] == 0
    assert len(kept) == CELLS
    assert before.items() <= kept.items()
    assert not list((place / "kept/cells").glob("*/"))


def test_settings_are_committed_between_search_and_final_runs(
    place: Path, killed: tuple[dict[str, int], tuple[int, str, str]]
) -> None:
    committed = (place / "kept/settings.json").stat().st_mtime_ns
    sides: dict[bool, set[int]] = {True: set(), False: set()}
    for path in (place / "kept/cells").glob("*.json"):
        config = json.loads(path.read_bytes())["config"]
        is_searched = config["data"]["validation"] is not None
        sides[is_searched].add(config["train"]["seed"])
        assert is_searched == (path.stat().st_mtime_ns <= committed)  # the clock of files ticks every few ms

    assert sides == {True: {0}, False: {1000, 1001}}


def test_equal_compute_costs_as_much_up_to_an_epoch(
    place: Path, killed: tuple[dict[str, int], tuple[int, str, str]]
) -> None:
    """SAM draws 400 a time, 6 each; adm scores them before the second and third epoch, 3 each."""
    found = outcomes(place / "kept")

    assert found["digits", "adm", 1000][2] == 3 * 400 * 6 + 2 * 400 * 3
    assert found["digits", "sam_equal_compute", 1000][1:3] == [4, 4 * 400 * 6]


def test_what_was_killed_ends_up_as_what_was_not(
    place: Path, killed: tuple[dict[str, int], tuple[int, str, str]]
) -> None:
    """And three seeds instead of two train one more each; the two stay what they were."""
    path = write_config(place)
    folder = place / "whole"
    said: list[str] = []
    compare(read_config(CompareConfig, path), folder, "", 2, said.append)

    assert outcomes(folder) == outcomes(place / "kept")

    said.clear()
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    more = compare(read_config(CompareConfig, path, ["seeds=3"]), folder, "", 2, said.append)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((folder / "cells").glob("*.json"))) == len(before) + 3
    assert [row["n"] for row in more["tables"][0]["rows"]] == [3, 3, 3]
    assert outcomes(place / "kept").items() <= outcomes(folder).items()


def test_other_searches_methods_and_data_are_refused(
    place: Path, killed: tuple[dict[str, int], tuple[int, str, str]]
) -> None:
    path = write_config(place)
    for setting, named in (
        ("search_seeds=2", "search_seeds"),
        ("base.train.epochs=4", "base"),
        ("data.digits.validation=200", "data"),
        ("method.adm.like=nobody", "nobody"),
        ("method.extra.like=sam", "method"),
    ):
        with refuses(ConfigError, value=named):
            compare(read_config(CompareConfig, path, [setting]), place / "kept", "", 2, str)


def test_a_report_trains_nothing(place: Path, killed: tuple[dict[str, int], tuple[int, str, str]]) -> None:
    config = read_config(CompareConfig, write_config(place), ["seeds=5", 'method.adm.label="renamed"'])

    found = report_only(config, place / "kept", "")

    assert (found["expected_cells"], found["missing_cells"]) == (15, 9)
    assert found["candidate_label"] == "renamed"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    config, folder = write_config(tmp_path, epochs=100000), tmp_path / "twice"
    first = RunningComparison(config, folder)
    try:
        wait_for(lambda: (folder / "lock").exists() and first.processes(), "the first one at work")
        with refuses(RunError, str(folder)):
            compare(read_config(CompareConfig, config), folder, "", 2, str)
    finally:
        first.stop_for_good()


def test_a_mistake_ends_in_one_line_and_trains_nothing(place: Path) -> None:
    path, folder = write_config(place), place / "wrong"
    options = ["--set=base.train.epoch=4", f"--folder={folder}"]
    done = subprocess.run(
        [STEPPE, "compare", str(path), *options], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "steppe: method sam on digits: train.epoch: unknown setting; did you mean train.epochs?"
    ]
    assert not list(folder.glob("cells/*"))
