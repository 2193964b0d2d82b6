"""Runs steered from a second terminal: scaled, watched, stopped, served; two of them side by side."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from deploy.interrupts import ONE_KEYSTROKE_S
from shared.catalogue import Run, RunState
from shared.events import read_events
from tests.system.runs import STEPPE, RunningRun
from tests.waiting import LIMIT_S, wait_for


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts runs below tmp_path / "runs"; whatever is left of them ends with the test."""
    started: list[RunningRun] = []

    def begin(name: str, *settings: str) -> RunningRun:
        started.append(RunningRun(tmp_path / "runs" / name, *settings))
        return started[-1]

    yield begin
    for run in started:
        run.stop_for_good()


def steppe(*arguments: str) -> str:
    done = subprocess.run([STEPPE, *arguments], capture_output=True, text=True, check=False, timeout=4 * LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alive(client: httpx2.Client) -> int:
    return int(client.get("/v1/scorers").json()["alive"])


@pytest.mark.slow
def test_scale_up_to_nothing_and_back(start: Any) -> None:
    """1 -> 3 -> 0 -> 1 through CLI and REST: alive follows wanted, scores age at 0 and are fresh again later."""
    run = start("run", "train.epochs=100000", "model.width=8", "scoring.cpus=0.1")
    folder, client = str(run.folder), run.client()
    wait_for(lambda: client.get("/v1/stats").json()["coverage"] == 1.0, "full coverage")

    assert "3 scorers wanted" in steppe("scale", "3", folder)
    wait_for(lambda: alive(client) == 3, "three scorers")
    pids = [scorer["pid"] for scorer in client.get("/v1/scorers").json()["scorers"]]
    assert client.patch("/v1/scorers", json={"replicas": 0}).status_code == 200
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), "the scorers' processes gone")
    assert alive(client) == 0
    wait_for(lambda: client.get("/v1/stats").json()["status"]["stale"] > 0, "scores that are stale")
    aged = client.get("/v1/stats").json()["age_versions_p50"]
    assert "1 scorers wanted" in steppe("scale", "1", folder)
    wait_for(lambda: alive(client) == 1, "one scorer")
    wait_for(lambda: client.get("/v1/stats").json()["age_versions_p50"] < aged, "younger scores")
    wait_for(lambda: client.get("/v1/stats").json()["status"]["stale"] == 0, "no stale score")

    events = [event for event in read_events(folder) if event["event"] in ("scaled", "scorer_down")]
    assert [event["wanted"] for event in events if event["event"] == "scaled"] == [3, 0, 1]
    assert {event["reason"] for event in events if event["event"] == "scorer_down"} == {"drained"}
    shown = steppe("top", folder, "--count", "1")
    assert "scorer-" in shown
    assert "published" in shown


@pytest.mark.slow
def test_two_runs_do_not_meet(start: Any) -> None:
    first = start("first", "train.epochs=100000", "model.width=8")
    first_client = first.client()
    second = start("second", "train.epochs=100000", "model.width=8")
    second_client = second.client()
    root = str(first.folder.parent)

    listed = {run["run_id"]: run["state"] for run in json.loads(steppe("runs", "--root", root, "--json"))}
    assert listed == {"second": "running", "first": "running"}
    wait_for(lambda: first_client.get("/v1/stats").json()["scored_rows"], "scores of the first")
    wait_for(lambda: second_client.get("/v1/stats").json()["scored_rows"], "scores of the second")
    assert json.loads(steppe("status", "--root", root, "--json"))["run_id"] == "second"  # the newest
    refused = httpx2.patch(
        f"{second.runtime()['url']}/v1/scorers",
        json={"replicas": 0},
        headers={"Authorization": first_client.headers["Authorization"]},
        trust_env=False,
        timeout=LIMIT_S,
    )
    assert refused.status_code == 403
    assert "stopped" in steppe("down", str(second.folder))
    assert second.finish()[0] == 130
    assert not second.processes()
    assert first.process.poll() is None
    assert alive(first_client) == 1
    assert "stopped" in steppe("down", "--root", root)  # what still runs
    assert first.finish()[0] == 130


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_second_signal_ends_it_at_once(start: Any, number: int) -> None:
    """A scorer that hangs would hold the orderly end up for seconds."""
    run = start("run", "train.epochs=100000", "model.width=8")
    client = run.client()
    wait_for(lambda: client.get("/v1/stats").json()["scored_rows"], "scores")
    for scorer in client.get("/v1/scorers").json()["scorers"]:
        os.kill(scorer["pid"], signal.SIGSTOP)
    ray_folder = Path(run.runtime()["ray_folder"])

    run.process.send_signal(number)
    line = run.process.stderr.readline()
    while line and "once more stops at once" not in line:
        line = run.process.stderr.readline()
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(2 * ONE_KEYSTROKE_S)  # any sooner it would be the same keystroke
    run.process.send_signal(number)
    code, _, err = run.finish()

    assert code == 130
    assert "Traceback" not in err
    assert not run.processes()
    assert not ray_folder.exists()
    assert Run(run.folder).state() == RunState.INTERRUPTED


def test_a_run_scored_inside_its_training_is_interrupted_resumed_and_served(start: Any, tmp_path: Path) -> None:
    """Bit for bit the weights of one that was not interrupted; and its scores can be asked for without Ray."""
    settings = ("scoring.mode=every_epoch", "train.epochs=30", "model.width=8", "train.save_every_steps=7")
    whole, parts = start("whole", *settings), start("parts", *settings)
    client = parts.client()
    wait_for(lambda: client.get("/v1/stats").json()["newest_model_version"] >= 2, "two epochs scored")
    parts.process.send_signal(signal.SIGINT)  # with 28 more to train
    code, _, err = parts.finish()
    assert code == 130
    assert "--resume" in err
    assert Run(parts.folder).state() == RunState.INTERRUPTED
    resumed = json.loads(steppe("run", str(parts.folder), "--resume", "--json"))
    assert whole.finish()[0] == 0

    expected = json.loads((whole.folder / "summary.json").read_text())
    same = ("test_accuracy", "steps", "draws_fresh", "draws_stale", "draws_unscored", "coverage")
    assert {key: expected[key] for key in same} == {key: resumed[key] for key in same}
    assert resumed["attempts"] == 2
    assert newest_weights(whole.folder) == newest_weights(parts.folder)

    serving = subprocess.Popen(
        [STEPPE, "serve", str(parts.folder), "--port", "0", "--cors", "https://lab.example"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: Run(parts.folder).state() == RunState.SERVED, "the service")
        wait_for(lambda: "url" in json.loads((parts.folder / "runtime.json").read_text()), "its address")
        answer = json.loads(steppe("query", "7", "--run", str(parts.folder), "--json"))
        assert answer["status"] == ["fresh"]
        assert json.loads(steppe("status", str(parts.folder), "--json"))["scorers"]["trouble"]  # there are none
        url = json.loads((parts.folder / "runtime.json").read_text())["url"]
        page = httpx2.get(f"{url}/v1", headers={"Origin": "https://lab.example"}, trust_env=False, timeout=LIMIT_S)
        assert page.headers["access-control-allow-origin"] == "https://lab.example"
        serving.send_signal(signal.SIGINT)
        out, err = serving.communicate(timeout=LIMIT_S)
    finally:
        serving.kill()
    assert serving.returncode == 130
    assert "is served at http://127.0.0.1:" in out
    assert "Traceback" not in err
    assert Run(parts.folder).state() == RunState.FINISHED
    again = subprocess.run([STEPPE, "run", str(parts.folder), "--resume"], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "is finished" in again.stderr


def newest_weights(folder: Path) -> bytes:
    return sorted((folder / "checkpoints").glob("*/weights.safetensors"))[-1].read_bytes()
