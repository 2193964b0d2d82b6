"""A writer killed by SIGKILL at random instants, and readers beside one that never rests."""

from pathlib import Path

import pytest

from deploy.bench.crash import crash
from deploy.bench.load import load

pytestmark = pytest.mark.slow
KILLS = 100


def test_a_killed_writer_loses_no_reported_row(tmp_path: Path) -> None:
    """And a new reader is there within a second."""
    found = crash(tmp_path / "scores", KILLS)

    assert found["commits"] > KILLS
    assert found["max"] < 1


def test_readers_beside_a_busy_writer_see_whole_versions_that_rise(tmp_path: Path) -> None:
    found = load(tmp_path / "scores", 60.0)

    assert found["compactions"] > 2
    assert found["refreshes"] > 100
