"""The score feed: follows store and checkpoints, and lets the last view stand when it cannot."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from shared.checkpoints import CheckpointPublisher
from shared.errors import ConfigError
from shared.freshness import DEFAULT_BOUND_VERSIONS
from shared.score_store import ScoreWriter
from tests.rows import make_rows
from trainer.feed import ScoreFeed, ScoreView

FAST = 0.005


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "not within 10 s"
        time.sleep(FAST)


def test_follows_the_store_from_before_it_exists(tmp_path: Path) -> None:
    with ScoreFeed(tmp_path, 5, refresh_interval_s=FAST) as feed:
        empty = feed.view()

        assert (empty.store_version, empty.coverage(), feed.newest_version(), feed.failures) == (0, 0.0, 0, 0)
        assert empty.bound == DEFAULT_BOUND_VERSIONS

        with ScoreWriter(tmp_path / "scores", 5) as writer:
            writer.append(make_rows([4, 0, 2], log_ratio=np.array([3.0, 1.0, 2.0])))
            writer.commit()
            wait_until(lambda: feed.view().store_version == 1)
            first = feed.view()
            writer.append(make_rows([0], model_version=2))
            writer.commit({"staleness_bound": 7})
            wait_until(lambda: feed.view().store_version == 2)
            second = feed.view()

    expected = [1 / 6, np.nan, 3 / 6, np.nan, 5 / 6]
    np.testing.assert_allclose(first.percentile_N, expected)
    assert first.model_version_N.tolist() == [1, -1, 1, -1, 1]
    assert first.coverage() == pytest.approx(0.6)
    np.testing.assert_allclose(second.percentile_N, [1 / 2, np.nan, 1 / 4, np.nan, 3 / 4])
    assert second.model_version_N.tolist() == [2, -1, 1, -1, 1]
    assert (first.bound, second.bound, feed.failures) == (DEFAULT_BOUND_VERSIONS, 7, 0)
    assert np.isnan(empty.percentile_N).all()


def test_views_are_read_only(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "scores", 3) as writer, ScoreFeed(tmp_path, 3, refresh_interval_s=FAST) as feed:
        writer.append(make_rows([1]))
        writer.commit()
        wait_until(lambda: feed.view().store_version == 1)
        views = [ScoreView.empty(3), feed.view()]

    for view in views:
        for array in (view.percentile_N, view.model_version_N):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_percentiles_are_of_the_measure_asked_for(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "scores", 2) as writer:
        writer.append(make_rows([0, 1], log_ratio=np.array([1.0, 2.0]), margin=np.array([5.0, -5.0])))
    found = []
    for measure in ("adm", "loss"):
        with ScoreFeed(tmp_path, 2, measure, refresh_interval_s=FAST) as feed:
            wait_until(lambda feed=feed: feed.view().store_version == 1)
            found.append(feed.view().percentile_N.tolist())

    assert found == [[0.25, 0.75], [0.75, 0.25]]


def test_unknown_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known: adm"):
        ScoreFeed(tmp_path, 2, "difficulty")


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _altered_ids(path: Path) -> None:
    """Of the right length, with ids far outside 0..N-1, which opening does not check."""
    ids = np.arange(4).tobytes()
    data = path.read_bytes()
    assert ids in data
    path.write_bytes(data.replace(ids, (np.arange(4) + 2**40).tobytes(), 1))


def _nonsense(path: Path) -> None:
    path.write_bytes(b"\x00" * 100)


@pytest.mark.parametrize(
    ("where", "damage"),
    [("fragments", _torn), ("fragments", _altered_ids), ("manifests", _torn), ("manifests", _nonsense)],
    ids=["torn fragment", "altered fragment", "torn manifest", "nonsense manifest"],
)
def test_last_view_stands_while_the_store_is_corrupt(tmp_path: Path, where: str, damage: Callable[[Path], None]) -> None:
    """The damage is there before the feed can see the second commit: the folder is hidden meanwhile."""
    run, hidden = tmp_path / "run", tmp_path / "hidden"
    with ScoreWriter(run / "scores", 4) as writer:
        writer.append(make_rows(np.arange(4)))
        writer.commit()
        with ScoreFeed(run, 4, refresh_interval_s=FAST) as feed:
            wait_until(lambda: feed.view().store_version == 1)
            last = feed.view()
            hidden.mkdir()
            (run / "scores" / "manifests").rename(hidden / "manifests")
            (run / "scores" / "manifests").mkdir()
            for path in (hidden / "manifests").iterdir():
                (run / "scores" / "manifests" / path.name).write_bytes(path.read_bytes())
            copies = run / "scores" / "manifests"
            aside = tmp_path / "aside"
            copies.rename(aside)
            (hidden / "manifests").rename(copies)
            writer.append(make_rows(np.arange(4), model_version=2))
            del aside
            _commit_damaged(writer, run / "scores" / where, damage)
            wait_until(lambda: feed.failures >= 2)

            assert feed.view() is last
