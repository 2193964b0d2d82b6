"""kill -9 of single processes in mid-run: training ends normally and no committed row is lost."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shared.score_store import ScoreReader
from tests.system.runs import RunningRun
from tests.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunningRun]:
    started = RunningRun(tmp_path / "run", "train.epochs=120", "model.width=16")
    yield started
    started.stop_for_good()


def kill(run: RunningRun, pid: int) -> None:
    process = psutil.Process(pid)
    assert process.pid in {own.pid for own in run.processes()}
    process.send_signal(signal.SIGKILL)


def test_a_killed_scorer_is_replaced(run: RunningRun) -> None:
    client = run.client()
    wait_for(lambda: client.get("/v1/stats").json()["coverage"] == 1.0, 120, "full coverage")
    (scorer,) = client.get("/v1/scorers").json()["scorers"]

    kill(run, scorer["pid"])
    wait_for(
        lambda: [s for s in client.get("/v1/scorers").json()["scorers"] if s["pid"] != scorer["pid"] and s["scored"]],
        60,
        "another scorer that has scored",
    )
    code, out, err = run.finish()

    assert code == 0, err
    assert "is replaced" in err
    assert json.loads(out)["coverage"] == 1.0
    assert not run.processes()


def test_a_killed_controller_goes_on_from_the_store(run: RunningRun) -> None:
    client, runtime = run.client(), run.runtime()
    wait_for(lambda: client.get("/v1/stats").json()["coverage"] == 1.0, 120, "full coverage")
    before = ScoreReader(run.folder / "scores")

    kill(run, runtime["pids"]["controller"])
    reader = ScoreReader(run.folder / "scores")
    wait_for(lambda: reader.refresh() > before.version + 5, 60, "commits by the restored controller")
    code, out, err = run.finish()

    assert code == 0, err
    assert reader.rows >= before.rows
    old, new = before.dense("model_version"), ScoreReader(run.folder / "scores").dense("model_version")
    assert (new >= old).all()
    assert json.loads(out)["coverage"] == 1.0
    assert not run.processes()


def test_a_killed_rest_service_disturbs_nobody(run: RunningRun) -> None:
    client, runtime = run.client(), run.runtime()
    wait_for(lambda: client.get("/v1/stats").json()["coverage"] == 1.0, 120, "full coverage")

    kill(run, runtime["pids"]["rest"])
    code, out, err = run.finish()

    assert code == 0, err
    assert json.loads(out)["steps"] == 120 * 23
    assert json.loads(out)["draws_fresh"] > 0.5
