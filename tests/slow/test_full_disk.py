"""A disk that is full in mid-run, and has room again later: training goes on, what failed is said and counted."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.events import read_events
from shared.score_store import ScoreReader
from tests.system.runs import RunningRun
from tests.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Make, or let grow, a file that takes all the room there is."""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    return filler


def test_a_full_disk_stops_nobody(small_disk: Path) -> None:
    run = RunningRun(small_disk / "run", "train.epochs=100000", "model.width=16", "train.save_every_steps=20")
    try:
        client = run.scored()
        reader = ScoreReader(run.folder / "scores")
        rows, newest = reader.rows, reader.dense("model_version")
        trouble = wait_for(
            lambda: fill(small_disk) and client.get("/v1/stats").json()["trouble"],  # what old files leave is taken too
            "the controller's trouble told",
        )
        assert "No space left" in trouble
        step = client.get("/v1/stats").json()["newest_step"]
        assert run.process.poll() is None

        fill(small_disk).unlink()
        wait_for(lambda: client.get("/v1/stats").json()["newest_step"] > step, "checkpoints again")
        wait_for(lambda: reader.refresh() and reader.rows > rows, "commits again")
        wait_for(lambda: not client.get("/v1/stats").json()["trouble"], "no trouble any more")
        run.process.send_signal(signal.SIGINT)
        code, _, err = run.finish()
    finally:
        run.stop_for_good()

    assert code == 130, err
    assert "Traceback" not in err
    assert (ScoreReader(run.folder / "scores").dense("model_version") >= newest).all()
    failed = {event["event"] for event in read_events(run.folder) if event["event"].endswith("_failed")}
    assert failed & {"publish_failed", "commit_failed"}  # what the full event log could still take
