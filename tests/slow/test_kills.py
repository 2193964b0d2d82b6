"""kill -9 in mid-run, of every process there is: the run ends normally or resumes, and no committed row is lost."""

import itertools
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest

from shared.attempts import abandoned, attempts
from shared.catalogue import Run, RunState
from shared.events import read_events
from shared.score_store import ScoreReader
from tests.system.runs import STEPPE, RunningRun
from tests.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningRun]]:
    """Starts the run of a test, which ends with it."""
    started: list[RunningRun] = []

    def begin(*settings: str) -> RunningRun:
        started.append(RunningRun(tmp_path / "run", *settings))
        return started[-1]

    yield begin
    for run in started:
        run.stop_for_good()


def kill(run: RunningRun, pid: int) -> None:
    process = psutil.Process(pid)
    assert process.pid in {own.pid for own in run.processes()}
    process.send_signal(signal.SIGKILL)


def scorers(client: httpx2.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/scorers").json()["scorers"]
    return found


def test_every_process_but_the_trainer_is_killed(start: Callable[..., RunningRun]) -> None:
    """Scorer, controller, REST service, one after the other and then all at once; then Ctrl-C ends it in order."""
    run = start("train.epochs=100000")
    client, folder = run.scored(), run.folder
    reader = ScoreReader(folder / "scores")
    rows_before, newest_before = reader.rows, reader.dense("model_version")

    for name in ("scorer", "controller", "rest", "all"):
        pids = {"scorer": scorers(client)[0]["pid"], **run.runtime()["pids"]}
        for pid in pids.values() if name == "all" else [pids[name]]:
            kill(run, pid)
        wait_for(lambda: recovered(client, pids, name), f"{name} back, and scoring")  # noqa: B023
        seen, newest_seen = reader.refresh(), int(reader.dense("model_version").max())
        wait_for(
            lambda: reader.refresh() > seen and int(reader.dense("model_version").min()) > newest_seen,  # noqa: B023
            "every block scored again",
        )
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.finish()

    assert code == 130, err
    assert "Traceback" not in err
    reader.refresh()
    assert reader.rows > rows_before
    assert (reader.dense("model_version") >= newest_before).all()
    happened = [event["event"] for event in read_events(folder)]
    assert happened.count("scorer_down") >= 2 + 1  # killed twice, drained at the end
    assert happened.count("rest_down") == 2
    assert happened.count("controller_up") == 3
    assert not run.processes()


def recovered(client: httpx2.Client, pids: dict[str, int], name: str) -> bool:
    """Whether those that were killed answer from other processes, and a scorer has scored."""
    try:
        status = client.get("/v1/scorers").json()
        now = {"scorer": status["scorers"][0]["pid"], "controller": status["pid"]}
        killed = [role for role in now if name in (role, "all")]
        return all(now[role] != pids[role] for role in killed) and status["scorers"][0]["scored"] > 0
    except (httpx2.HTTPError, LookupError, ValueError):
        return False


def test_a_killed_driver_is_resumed(start: Callable[..., RunningRun]) -> None:
    """Twice. Versions rise throughout, what was left is found and ended, the rest is trained."""
    run = start("train.epochs=100", "model.width=16", "train.save_every_steps=20")
    folder = run.folder
    client = run.scored()
    versions = [client.get("/v1/stats").json()["newest_model_version"]]
    wait_for(lambda: any((folder / "train").glob("state-*.json")), "a saved state")
    ray_folder = Path(run.runtime()["ray_folder"])
    run.process.kill()
    run.process.communicate()
    assert Run(folder).state() == RunState.KILLED
    down = subprocess.run([STEPPE, "down", str(folder)], capture_output=True, text=True, check=True)
    assert str(folder) in down.stdout
    assert not run.processes()
    assert not ray_folder.exists()
    assert not (folder / "runtime.json").exists()

    second = RunningRun(folder, *run.settings, "--resume")
    try:
        client = second.client()
        reader = ScoreReader(folder / "scores")
        forked = attempts(folder)[-1]
        assert (forked.attempt, forked.last_valid_version < forked.first_version) == (2, True)
        wait_for(lambda: "scorer_up" in since(folder, "resumed"), "a scorer")
        psutil.Process(second.process.pid).suspend()  # the training cannot end before it is killed
        wait_for(lambda: reader.refresh() and reader.dense("model_version").min() >= forked.first_version, "rows")
        versions.append(client.get("/v1/stats").json()["newest_model_version"])
        second.process.kill()  # and nobody clears up: the next resume does
        second.process.communicate()
        third = RunningRun(folder, *run.settings, "--resume")
        try:
            code, out, err = third.finish()
        finally:
            third.stop_for_good()
    finally:
        second.stop_for_good()

    assert code == 0, err
    summary = json.loads(out)
    assert (summary["attempts"], summary["steps"], summary["coverage"]) == (3, 100 * 23, 1.0)
    assert versions[1] > versions[0]
    published = [event["model_version"] for event in read_events(folder) if event["event"] == "published"]
    assert all(later > earlier for earlier, later in itertools.pairwise(published))
    resumed = [event["fork_step"] for event in read_events(folder) if event["event"] == "resumed"]
    assert resumed == sorted(resumed)
    assert resumed[0] > 0
    left_behind = {version for first, last in abandoned(folder) for version in range(first, last + 1)}
    found = set(np.unique(ScoreReader(folder / "scores").dense("model_version")).tolist())
    assert not left_behind & found  # all were scored again on the line that went on
    assert not run.processes()


def since(folder: Path, name: str) -> list[str]:
    """Names of the events from the first one of that name on."""
    return list(itertools.dropwhile(lambda event: event != name, (event["event"] for event in read_events(folder))))


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_training_outlives_its_cluster(tmp_path: Path, name: str) -> None:
    """Ray's own processes are killed: whatever becomes of the scorers, the trainer goes to the end of its steps."""
    run = RunningRun(tmp_path / "run", "train.epochs=30", "model.width=16")
    try:
        with run.standing_still():
            ray_folder = Path(run.runtime()["ray_folder"])
            (victim,) = [process for process in run.processes() if process.name() == name]
            victim.kill()
        code, out, err = run.finish()
    finally:
        run.stop_for_good()

    assert code == 0, err
    assert json.loads(out)["steps"] == 30 * 23
    assert not run.processes()
    assert not ray_folder.exists()


def test_a_hanging_scorer_loses_its_leases(tmp_path: Path) -> None:
    """SIGSTOP, which Ray does not notice: its blocks go to another after their deadline."""
    run = RunningRun(
        tmp_path / "run",
        "train.epochs=100000",
        "model.width=16",
        "scoring.replicas=2",
        "scoring.cpus=0.1",
        "controller.lease_timeout_s=2",
        "controller.block_size=64",
    )
    try:
        client = run.client()
        wait_for(lambda: len([s for s in scorers(client) if s["scored"]]) == 2, "two scorers that score")
        hung = scorers(client)[0]
        psutil.Process(hung["pid"]).send_signal(signal.SIGSTOP)
        newest = client.get("/v1/stats").json()["newest_model_version"]
        reader = ScoreReader(run.folder / "scores")
        wait_for(
            lambda: reader.refresh() and int(reader.dense("model_version").min()) > newest,
            "every block scored again",
        )
        subprocess.run([STEPPE, "scale", "1", str(run.folder)], check=True, capture_output=True)
        wait_for(lambda: len(scorers(client)) == 1, "one scorer")
        run.process.send_signal(signal.SIGINT)
        assert run.finish()[0] == 130
    finally:
        run.stop_for_good()
