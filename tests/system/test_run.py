"""`steppe run` whole: from the command to the summary, with all of its processes."""

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shared.score_store import ScoreReader
from tests.system.runs import STEPPE, RunningRun
from tests.waiting import wait_for


@pytest.fixture
def started(run_folder: Path) -> Iterator[list[RunningRun]]:
    """Runs that a test starts; ended with it."""
    runs: list[RunningRun] = []
    yield runs
    for run in runs:
        run.stop_for_good()


@pytest.mark.slow
def test_training_goes_on_when_everything_else_is_stopped(started: list[RunningRun], run_folder: Path) -> None:
    """Controller, scorers and REST service hang (SIGSTOP); the trainer goes to the end of its steps."""
    run = RunningRun(run_folder, "train.epochs=25", "model.width=16")
    started.append(run)
    with run.standing_still() as client:
        scorers = [scorer["pid"] for scorer in client.get("/v1/scorers").json()["scorers"]]
        newest = client.get("/v1/checkpoints").json()["checkpoints"][0]["model_version"]
        hung = [psutil.Process(pid) for pid in (*scorers, *run.runtime()["pids"].values())]
        assert len(hung) == 3
        assert {process.pid for process in hung} <= {process.pid for process in run.processes()}
        for process in hung:
            process.send_signal(signal.SIGSTOP)
    code, out, err = run.finish()

    assert code == 0, err
    summary = json.loads(out)
    assert summary["steps"] == 25 * 23
    assert summary["model_versions_published"] > newest + 5
    assert summary["draws_stale"] > 0  # nobody scored any more, and that is said
    assert summary["test_accuracy"] > 0.9
    assert not run.processes()
    assert not any(process.is_running() for process in hung)


@pytest.mark.slow
def test_down_stops_a_run_and_leaves_nothing_behind(
    started: list[RunningRun], run_folder: Path, tmp_path: Path
) -> None:
    """Started in a folder that holds a `trainer.py` and a `shared/` of the user's, which no process may import."""
    home = tmp_path / "home"
    (home / "shared").mkdir(parents=True)
    (home / "shared" / "__init__.py").write_text("raise SystemExit('a stranger was imported')")
    (home / "trainer.py").write_text("raise SystemExit('a stranger was imported')")
    run = RunningRun(run_folder, "train.epochs=100000", cwd=home)
    started.append(run)
    client, runtime = run.client(), run.runtime()
    wait_for(lambda: client.get("/v1/stats").json()["scored_rows"] > 0, "first scores")
    token = run_folder / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600

    query = subprocess.run(
        [STEPPE, "query", "1", "2", "--run", str(run_folder), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(query.stdout)["sample_id"] == [1, 2]
    down = subprocess.run([STEPPE, "down", str(run_folder)], capture_output=True, text=True, check=True)
    code, _, err = run.finish()

    assert "stopped" in down.stdout
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not run.processes()
    assert not Path(runtime["ray_folder"]).exists()
    assert not (run_folder / "runtime.json").exists()
    committed = ScoreReader(run_folder / "scores")
    assert committed.table().num_rows > 0


def test_ctrl_c_ends_a_run_before_training_began(started: list[RunningRun], run_folder: Path) -> None:
    run = RunningRun(run_folder)
    started.append(run)
    wait_for((run_folder / "run.json").exists, what="the run folder")

    os.kill(run.process.pid, signal.SIGINT)
    code, _, err = run.finish()

    assert code == 130
    assert "Traceback" not in err
    assert not run.processes()


@pytest.mark.slow
def test_training_starts_without_scorers(started: list[RunningRun], run_folder: Path) -> None:
    """No scorer can be placed: it asks for more CPUs than there are. Training says so and goes on."""
    run = RunningRun(run_folder, "train.epochs=2", "scoring.cpus=1000")
    started.append(run)
    code, out, err = run.finish()

    assert code == 0, err
    assert "1000 CPU" in err  # what a scorer needs and nobody has
    summary = json.loads(out)
    assert summary["draws_unscored"] == 1.0
    assert summary["coverage"] == 0.0
    assert summary["age_versions_p50"] is None
