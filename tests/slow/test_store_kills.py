"""Score store writers killed or stopped at random instants, readers beside one that never rests, every call failing."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from deploy.bench.crash import crash, make_rows
from deploy.bench.load import load
from shared import store_check
from shared.errors import Fenced
from shared.score_store import Retention, ScoreReader, ScoreWriter
from tests.disk import CALLS
from tests.store_model import AgainstADict, settings_of
from tests.store_story import fail_in_turn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KILLS = 100
STOPS = 30
N = 1000


def test_a_killed_writer_loses_no_reported_row(tmp_path: Path) -> None:
    """Whatever a reader saw meanwhile was whole; how soon a new one is there is for `steppe bench store-crash`."""
    found = crash(tmp_path / "scores", KILLS)

    assert found["commits"] > KILLS
    assert found["live_reader_refreshes"] > 0


def test_readers_beside_a_busy_writer_see_whole_versions_that_rise(tmp_path: Path) -> None:
    found = load(tmp_path / "scores", 60.0)

    assert found["compactions"] > 0
    assert found["refreshes"] > 0


@pytest.mark.parametrize("kind", CALLS)
def test_every_call_fails_up_to_three_times_and_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    fail_in_turn(tmp_path, kind, range(1, 1000))


def test_a_writer_that_sleeps_at_any_instant_wakes_fenced_and_harms_nothing(tmp_path: Path) -> None:
    """Stopped in the middle of a commit, a compaction or a collection; its successor does all of these meanwhile."""
    processes, chance = multiprocessing.get_context("forkserver"), random.Random(0)
    processes.set_forkserver_preload([__name__])
    for stop in range(STOPS):
        uri = tmp_path / str(stop)
        receive, send = processes.Pipe(duplex=False)
        sleeper = processes.Process(target=_commit_until_fenced, args=(str(uri), send), daemon=True)
        sleeper.start()
        send.close()
        for _ in range(chance.randint(1, 5)):
            receive.recv()
        time.sleep(chance.random() * 0.01)
        os.kill(sleeper.pid or 0, signal.SIGSTOP)
        with ScoreWriter(uri, N, retention=Retention(0), grace_s=0.0) as writer:
            before = writer.version
            for version in range(1000, 1012):
                writer.append(make_rows(np.arange(version % 7, N, 7), version))
                writer.commit()
            writer.compact()
            writer.append(make_rows(np.arange(3), 2000))
            writer.commit()
            os.kill(sleeper.pid or 0, signal.SIGCONT)
            while (answer := receive.recv()) != "fenced":
                assert answer <= before  # what it had committed and could not report
            sleeper.join()

            assert store_check.verify(uri) == []
            reader = ScoreReader(uri)
            assert reader.version == before + 13
            assert reader.dense("model_version").tolist() == [2000] * 3 + [_last(i) for i in range(3, N)]


def _last(sample_id: int) -> int:
    return max(version for version in range(1000, 1012) if version % 7 == sample_id % 7)


def _commit_until_fenced(uri: str, reports: Connection) -> None:
    writer = ScoreWriter(uri, N, retention=Retention(0), grace_s=0.0)
    try:
        while True:
            version = writer.version + 1
            writer.append(make_rows(np.arange(version % 3, N, 3), version))
            reports.send(writer.commit())
            if version % 3 == 0:
                writer.compact()
    except Fenced:
        reports.send("fenced")


class TestAgainstADictDeeply(AgainstADict.TestCase):  # type: ignore[misc]
    """Longer stories, and more of them, than the default suite tells."""

    settings = settings_of(30, 40)
