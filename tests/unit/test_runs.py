"""What became of runs, told from their files and processes."""

import functools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.logs import logging_to
from deploy.runs import list_runs, print_runs
from deploy.runtime import RuntimeFile
from shared.catalogue import Run, RunState, is_running, newest_run, process_identity
from shared.datasets import Images
from shared.events import Events
from tests.waiting import wait_for

TRAIN = Images(np.zeros((3, 1, 2, 2), dtype=np.uint8), np.array([7, 0, 7]), white=255, num_classes=8)


def create(path: Path) -> Run:
    return Run.create(path, dataset_fingerprint="abc", train=TRAIN, config={}, scoring_id="s1")


@functools.cache
def dead() -> dict[str, Any]:
    """The identity of a process that is gone."""
    script = "import json; from shared.catalogue import process_identity; print(json.dumps(process_identity()))"
    answer: dict[str, Any] = json.loads(subprocess.check_output([sys.executable, "-c", script]))
    return answer


@pytest.mark.parametrize(
    ("role", "alive", "finished", "expected"),
    [
        ("run", True, False, RunState.RUNNING),
        ("run", True, True, RunState.RUNNING),
        (None, True, False, RunState.RUNNING),
        ("serve", True, False, RunState.SERVED),
        ("serve", True, True, RunState.SERVED),
        ("run", False, False, RunState.KILLED),
        ("run", False, True, RunState.FINISHED),
        ("serve", False, True, RunState.FINISHED),
        ("none", False, True, RunState.FINISHED),
        ("none", False, False, RunState.INTERRUPTED),
    ],
)
def test_state_follows_from_files_and_process(
    tmp_path: Path, role: str | None, alive: bool, finished: bool, expected: RunState
) -> None:
    run = create(tmp_path)
    if role != "none":
        run.write("runtime.json", (process_identity() if alive else dead()) | ({"role": role} if role else {}))
    if finished:
        run.write("summary.json", {})

    assert expected == run.state()


def test_process_is_running_by_pid_and_start() -> None:
    own = process_identity()

    assert is_running(own)
    assert not is_running(own | {"pid_started": own["pid_started"] + 60})
    for other in ({}, {"pid": own["pid"]}, {"pid": -1}, {"pid": 10**12}, {"pid": "abc"}, dead()):
        assert not is_running(other)


def test_a_zombie_does_not_run() -> None:
    """Its parent has not asked for its exit code yet: it is gone all the same."""
    import psutil

    child = subprocess.Popen(["sleep", "60"])
    identity = {"pid": child.pid, "pid_started": psutil.Process(child.pid).create_time()}

    assert is_running(identity)
    child.kill()
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "the zombie")
    assert not is_running(identity)
    child.wait()
    assert not is_running(identity)


def test_newest_run_is_one_that_is_up_else_killed_else_the_last(tmp_path: Path) -> None:
    runs = [create(tmp_path / name) for name in "edcba"]

    def found() -> str:
        return newest_run(tmp_path).path.name

    order = [found()]
    runs[1].write("runtime.json", {"role": "run", **dead()})
    order.append(found())
    runs[2].write("runtime.json", {"role": "run", **dead()})
    order.append(found())
    runs[0].write("runtime.json", {"role": "serve", **process_identity()})
    order.append(found())
    runs[3].write("runtime.json", {"role": "run", **process_identity()})
    order.append(found())

    assert order == ["a", "d", "c", "e", "b"]


def test_torn_runtime_file_tells_nothing_and_hides_no_running_one(tmp_path: Path) -> None:
    create(tmp_path / "running").write("runtime.json", {"role": "run", **process_identity()})
    torn = create(tmp_path / "torn")
    (torn.path / "runtime.json").write_text("{")

    assert torn.state() == RunState.INTERRUPTED
    assert newest_run(tmp_path).path.name == "running"


def test_foreign_run_file_hides_no_other_run(tmp_path: Path) -> None:
    create(tmp_path / "good")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text("{}")

    assert newest_run(tmp_path).path.name == "good"


def test_list_tells_states_and_what_came_of_runs_the_newest_first(tmp_path: Path) -> None:
    finished, going, new = (create(tmp_path / name) for name in ("finished", "going", "new"))
    Events(finished.path).append("published", step=20)
    finished.write("summary.json", {"steps": 30, "test_accuracy": 0.5, "coverage": 1.0, "attempts": 2, "reports": {}})
    for step in (10, 20):
        Events(going.path).append("published", step=step)
    Events(going.path).append("committed", rows=3)
    going.write("runtime.json", {"role": "run", **process_identity()})
    (new.path / "runtime.json").write_text("{")
    found = list_runs(str(tmp_path))

    assert [
        (run["run_id"], run["state"][:8], run["steps"], run["test_accuracy"], run["attempts"]) for run in found
    ] == [
        ("new", "interrup", None, None, None),
        ("going", "running", 20, None, None),
        ("finished", "finished", 30, 0.5, 2),
    ]
    assert found[2] == {
        "folder": str(finished.path),
        "state": "finished",
        "run_id": "finished",
        "created_at": finished.description["created_at"],
        "num_samples": 3,
        "steps": 30,
        "test_accuracy": 0.5,
        "coverage": 1.0,
        "attempts": 2,
    }
    json.dumps(found)
    assert list_runs(str(tmp_path / "nowhere")) == []


def test_table_of_runs_shows_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(tmp_path / "empty")
    create(tmp_path / "done").write("summary.json", {"steps": 30, "test_accuracy": 0.12345, "attempts": 2})
    print_runs(list_runs(str(tmp_path)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]

    assert [[*line[:2], *line[4:]] for line in lines if line and line[0] in ("done", "empty")] == [
        ["done", "finished", "30", "0.1235", "2"],
        ["empty", "interrupted", "-", "-", "-"],
    ]


# -- runtime.json ------------------------------------------------------------------------------------------------------


def test_runtime_file_says_who_runs_it_and_where(tmp_path: Path) -> None:
    run = create(tmp_path)
    file = RuntimeFile(run, "run")

    assert run.read("runtime.json") is None
    file.update()
    assert (run.state(), run.read("runtime.json")) == (RunState.RUNNING, {"role": "run", **process_identity()})
    file.update(url="http://a", pids={"rest": 1})
    file.update(url="http://b")
    assert run.read("runtime.json") == {"role": "run", "url": "http://b", "pids": {"rest": 1}, **process_identity()}


def test_runtime_file_that_is_removed_does_not_come_back(tmp_path: Path) -> None:
    """A keeper's thread may bring a service back while the run ends."""
    run = create(tmp_path)
    file = RuntimeFile(run, "run")
    file.update()
    file.remove()
    file.update(url="http://a")

    assert run.read("runtime.json") is None
    file.remove()
    assert run.state() == RunState.INTERRUPTED


def test_service_that_ends_leaves_the_resumed_drivers_file(tmp_path: Path) -> None:
    """`steppe serve` of an interrupted run, `steppe run --resume` beside it, Ctrl-C to the first."""
    run = create(tmp_path)
    served, driver = RuntimeFile(run, "serve"), RuntimeFile(run, "run")
    served.update(url="http://served", pids={})
    driver.update(url="http://driver", pids={})
    served.remove()

    assert run.state() == RunState.RUNNING


def test_service_of_a_killed_run_leaves_what_down_and_resume_need(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.write("runtime.json", {"role": "run", "ray_folder": "/tmp/steppe-abc", **dead()})
    served = RuntimeFile(run, "serve")
    served.update(url="http://served", pids={})
    served.remove()

    assert run.state() == RunState.KILLED
    assert run.read("runtime.json")["ray_folder"] == "/tmp/steppe-abc"


# -- logs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_faulthandler(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's own stays where it is."""
    monkeypatch.setattr("faulthandler.enable", lambda file: file.close())


@pytest.mark.usefixtures("quiet_faulthandler")
def test_log_goes_to_the_roles_file_and_is_as_before_afterwards(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    for word in ("first", "second"):
        with logging_to(tmp_path, "driver"):
            logging.getLogger("some.module").info("the %s life", word)
    logging.getLogger("some.module").error("nobody listens")
    lines = (tmp_path / "logs" / "driver.log").read_text().splitlines()

    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO some.module: the first life",
        "INFO some.module: the second life",
    ]
    assert before == (list(root.handlers), root.level)


@pytest.mark.usefixtures("quiet_faulthandler")
def test_log_that_cannot_be_written_silences_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with logging_to(tmp_path, "driver"):
        logging.getLogger("some.module").error("into nothing")

    assert (tmp_path / "logs").read_text() == "a file"
