"""A writer killed by SIGKILL at random instants: every reported row is there, nothing half visible."""

import contextlib
import multiprocessing
import os
import random
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from shared.score_store import ScoreReader, ScoreWriter
from tests.rows import make_rows

pytestmark = pytest.mark.slow
NUM_SAMPLES = 20_000
KILLS = 40


def ids_of(version: int) -> npt.NDArray[np.int64]:
    """The samples whose rows commit number `version` brings, all at model_version `version`."""
    rng = np.random.default_rng(version)
    return rng.choice(NUM_SAMPLES, size=int(rng.integers(1, NUM_SAMPLES)), replace=False)


def write_without_end(uri: str, reports: Connection) -> None:
    """Commit for ever, going on from the store; report each commit once it returned."""
    writer = ScoreWriter(uri, NUM_SAMPLES)
    while True:
        version = writer.version + 1
        writer.append(make_rows(ids_of(version), version, margin=np.float32(version)))
        reports.send(writer.commit())


def test_a_killed_writer_loses_no_reported_row(tmp_path: Path) -> None:
    uri = str(tmp_path / "scores")
    spawn = multiprocessing.get_context("spawn")
    chance = random.Random(5)
    ScoreWriter(uri, NUM_SAMPLES).close()
    live = ScoreReader(uri)
    expected = np.full(NUM_SAMPLES, -1)
    applied = 0
    for _ in range(KILLS):
        receive, send = spawn.Pipe(duplex=False)
        writer = spawn.Process(target=write_without_end, args=(uri, send))
        writer.start()
        send.close()
        for _ in range(chance.randint(1, 12)):
            reported = receive.recv()
        signal.sigtimedwait([], chance.random() * 0.02)  # to somewhere inside the next append, commit or compaction
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                reported = receive.recv()
        receive.close()

        found = live.refresh()
        assert found - reported in {0, 1}  # one commit may have become durable and not been reported any more
        for version in range(applied + 1, found + 1):
            expected[ids_of(version)] = version
        applied = found
        for reader in (live, ScoreReader(uri)):
            assert reader.version == found
            assert np.array_equal(reader.dense("model_version"), expected)
            assert np.array_equal(reader.dense("margin")[expected > 0], expected[expected > 0])  # rows are whole
    assert applied > KILLS
