"""A run over two hosts: the trainer on the head, scorers on the other, which comes late, is killed, is cut off."""

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from shared.errors import SteppeError
from shared.events import read_events
from shared.freshness import staleness_bound
from shared.score_store import ScoreReader
from tests.clusters import Cluster, cluster, namespaces_are_allowed, network
from tests.system.runs import QUICKSTART
from tests.waiting import LIMIT_S, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not namespaces_are_allowed(), reason="network namespaces are not allowed here"),
]

CUT_S = 60.0
USUAL_BOUND = 6  # versions; longer where a host was missing for a while
SCORERS = ("--num-cpus=1", "--labels=steppe.io/role=scorer")
SETTINGS = (
    "train.epochs=100000",
    "train.publish_every_steps=100",
    "train.threads=1",
    "rest.port=0",
    'scoring.labels={"steppe.io/role"="scorer"}',
    "scoring.replicas=1",
    "scoring.nice=0",
    "controller.block_size=128",
    "controller.lease_timeout_s=10",
)


class Observer(threading.Thread):
    """Looks at the store all the time: no version of a sample's scores ever goes back, and none is lost."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._done = threading.Event()
        self.looks = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        reader, seen_N, rows = None, np.zeros(0), 0
        while not self._done.wait(0.05):
            with contextlib.suppress(SteppeError, OSError):
                reader = reader or ScoreReader(self._folder / "scores")
            if reader is None:
                continue
            reader.refresh()
            version_N = reader.dense("model_version")
            if len(seen_N) and (version_N < seen_N).any():
                self.wrong.append(f"at store version {reader.version} samples went back")
            if reader.rows < rows:
                self.wrong.append(f"at store version {reader.version} there are {reader.rows} rows after {rows}")
            seen_N, rows = version_N, reader.rows
            self.looks += 1

    def close(self) -> None:
        self._done.set()
        self.join()


class Watched:
    """The run as its folder tells it."""

    def __init__(self, folder: Path, job: "subprocess.Popen[str]") -> None:
        self.folder, self.job = folder, job

    def happened(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder) if event["event"] == name]

    def newest_version(self) -> int:
        return int(self.happened("published")[-1]["model_version"])

    def versions(self) -> npt.NDArray[np.int64]:
        return ScoreReader(self.folder / "scores").dense("model_version")

    def bound(self) -> int:
        return staleness_bound(ScoreReader(self.folder / "scores").metadata)

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 2 * LIMIT_S) -> Any:
        def look() -> Any:
            assert self.job.poll() is None, self.job.communicate()[1]
            return condition()

        return wait_for(look, what, timeout_s)

    def wait_for_scores_of_now(self, what: str) -> None:
        """Every block is scored again, with weights that are published from here on."""
        newest = self.newest_version()
        self.wait(lambda: bool((self.versions() > newest).all()), f"every sample scored again {what}")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Cluster, Watched, Any]]:
    folder = tmp_path / "run"
    with network() as cable, cluster(head=cable.here) as there:
        settings = [f"--set={one}" for one in (*SETTINGS, f"run.folder={folder}")]
        address = f"{cable.here.address}:{there.port}"
        job = there.steppe("run", str(QUICKSTART), "--address", address, *settings)
        try:
            yield there, Watched(folder, job), cable
        finally:
            if job.poll() is None:
                job.kill()
                job.communicate()


def test_training_never_waits_for_another_host(watched: tuple[Cluster, Watched, Any]) -> None:
    there, run, cable = watched
    observer = Observer(run.folder)
    run.wait(lambda: len(run.happened("published")) >= 3, "training without scorers")
    assert not run.happened("scorer_up")

    late = there.join(*SCORERS, host=cable.there)
    run.wait(lambda: run.happened("scorer_up"), "a scorer on the host that came late")
    run.wait(lambda: run.happened("committed"), "scores")
    observer.start()
    run.wait_for_scores_of_now("by the host that came late")

    there.kill(late)
    second = there.join(*SCORERS, host=cable.there)
    run.wait(lambda: len(run.happened("scorer_up")) >= 2, "a scorer in place of the killed one")
    run.wait_for_scores_of_now("after the kill")
    run.wait(lambda: run.bound() <= USUAL_BOUND, "the usual bound, as passes are short again")

    cable.cut()
    cut_at, before = time.monotonic(), run.newest_version()
    run.wait(
        lambda: time.monotonic() - cut_at >= CUT_S and run.newest_version() - before > USUAL_BOUND,
        "the cut's end, and more checkpoints than scores may be old",
    )
    told, _ = there.steppe("status", str(run.folder), "--json").communicate(timeout=LIMIT_S)
    assert {key: json.loads(told)["status"][key] for key in ("fresh", "unscored")} == {"fresh": 0, "unscored": 0}
    cable.mend()
    # Ray may give the host up, then or when it hears of it again: its processes end, and are started again as whoever
    # looks after hosts would.
    newest, hosts = run.newest_version(), [second]

    def is_scored_again() -> bool:
        if hosts[-1].poll() is not None:
            hosts.append(there.join(*SCORERS, host=cable.there))
        return bool((run.versions() > newest).all())

    run.wait(is_scored_again, "every sample scored again after the cut")

    run.job.send_signal(signal.SIGINT)
    _, err = run.job.communicate(timeout=LIMIT_S)
    observer.close()
    assert run.job.returncode == 130, err
    assert observer.looks > 0
    assert observer.wrong == []
