"""The score feed: follows store and checkpoints, and lets the last view stand when it cannot."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from shared.checkpoints import CheckpointPublisher
from shared.errors import ConfigError, RunError
from shared.freshness import DEFAULT_BOUND_VERSIONS
from shared.score_store import ScoreWriter
from tests.raising import refuses
from tests.rows import make_rows
from tests.waiting import wait_for
from trainer.feed import NoScores, ScoreFeed, ScoreView

FAST = 0.005


def test_follows_the_store_from_before_it_exists(tmp_path: Path) -> None:
    with ScoreFeed(tmp_path, 5, refresh_interval_s=FAST) as feed:
        empty = feed.view()

        assert (empty.store_version, (empty.model_version_N >= 0).mean(), feed.newest_version(), feed.failures) == (
            0,
            0.0,
            0,
            0,
        )
        assert empty.bound == DEFAULT_BOUND_VERSIONS

        with ScoreWriter(tmp_path / "scores", 5) as writer:
            writer.append(make_rows([4, 0, 2], log_ratio=np.array([3.0, 1.0, 2.0])))
            writer.commit()
            wait_for(lambda: feed.view().store_version == 1)
            first = feed.view()
            writer.append(make_rows([0], model_version=2))
            writer.commit({"staleness_bound": 7})
            wait_for(lambda: feed.view().store_version == 2)
            second = feed.view()

    expected = [1 / 6, np.nan, 3 / 6, np.nan, 5 / 6]
    np.testing.assert_allclose(first.percentile_N, expected)
    assert first.model_version_N.tolist() == [1, -1, 1, -1, 1]
    assert (first.model_version_N >= 0).mean() == pytest.approx(0.6)
    np.testing.assert_allclose(second.percentile_N, [1 / 2, np.nan, 1 / 4, np.nan, 3 / 4])
    assert second.model_version_N.tolist() == [2, -1, 1, -1, 1]
    assert (first.bound, second.bound, feed.failures) == (DEFAULT_BOUND_VERSIONS, 7, 0)
    assert np.isnan(empty.percentile_N).all()


def test_views_are_read_only(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "scores", 3) as writer, ScoreFeed(tmp_path, 3, refresh_interval_s=FAST) as feed:
        writer.append(make_rows([1]))
        writer.commit()
        wait_for(lambda: feed.view().store_version == 1)
        views = [ScoreView.empty(3), NoScores(3).view(), feed.view()]

    assert [view.margin_N is None for view in views] == [True, True, False]
    for view in views:
        for array in filter(lambda array: array is not None, (view.percentile_N, view.model_version_N, view.margin_N)):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_percentiles_are_of_the_measure_asked_for(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "scores", 2) as writer:
        writer.append(make_rows([0, 1], log_ratio=np.array([1.0, 2.0]), margin=np.array([5.0, -5.0])))
    found = []
    for measure in ("adm", "loss"):
        with ScoreFeed(tmp_path, 2, measure, refresh_interval_s=FAST) as feed:
            wait_for(lambda feed=feed: feed.view().store_version == 1)
            found.append(feed.view().percentile_N.tolist())

    assert found == [[0.25, 0.75], [0.75, 0.25]]


def test_views_carry_margins_whatever_the_measure(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "scores", 3) as writer:
        writer.append(make_rows([0, 2], margin=np.array([5.0, -5.0])))
    with ScoreFeed(tmp_path, 3, "el2n", refresh_interval_s=3600) as feed:
        wait_for(lambda: feed.view().store_version == 1)

        np.testing.assert_array_equal(feed.view().margin_N, [5.0, np.nan, -5.0])


def test_memory_averages_over_the_views(tmp_path: Path) -> None:
    """Percentiles 1/4 and 3/4 in version 1, turned round in version 2, when their mean with memory 3/4 begins to move.

    A view that cannot be made, here for an attempt's damaged file, counts nothing twice.
    """
    feed = ScoreFeed(tmp_path, 2, memory=0.75)
    feed.close()
    damaged = tmp_path / "train" / "attempt-0001.json"
    damaged.parent.mkdir()
    with ScoreWriter(tmp_path / "scores", 2) as writer:
        for version, log_ratio in ((1, [1.0, 2.0]), (2, [2.0, 1.0])):
            writer.append(make_rows([0, 1], version, log_ratio=np.array(log_ratio)))
            writer.commit()
            damaged.write_text("{")
            with refuses(RunError, str(damaged)):
                feed.refresh()
            damaged.unlink()
            feed.refresh()

    assert feed.view().percentile_N.tolist() == [1 / 4, 3 / 4]  # of the means; of the newest alone 3/4, 1/4


def test_no_scores_leave_every_sample_unknown_for_ever() -> None:
    scores = NoScores(3)

    assert scores.view() is scores.view()
    assert np.isnan(scores.view().percentile_N).all()
    assert (scores.view().model_version_N.tolist(), scores.newest_version()) == ([-1, -1, -1], 0)
    assert scores.view().ages(9).tolist() == [-1, -1, -1]


def test_unknown_measure_is_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, "measure", "'difficulty'"):
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
def test_last_view_stands_while_the_store_is_corrupt(
    tmp_path: Path, where: str, damage: Callable[[Path], None]
) -> None:
    """A second commit arrives damaged, file by file as a writer would bring it, and is repaired later."""
    source, store = tmp_path / "source", tmp_path / "run" / "scores"
    with ScoreWriter(source, 4) as writer:
        writer.append(make_rows(np.arange(4)))
        writer.commit()
    shutil.copytree(source, store)
    with ScoreWriter(source, 4) as writer:
        writer.append(make_rows(np.arange(4), model_version=2))
        writer.commit()
    new = [path for kind in ("fragments", "manifests") for path in (source / kind).iterdir()]
    new = [path for path in new if not (store / path.parent.name / path.name).exists()]
    good = {path: path.read_bytes() for path in new}
    damage(next(path for path in new if path.parent.name == where))
    with ScoreFeed(tmp_path / "run", 4, refresh_interval_s=FAST) as feed:
        wait_for(lambda: feed.view().store_version == 1)
        last = feed.view()
        for path in new:
            path.replace(store / path.parent.name / path.name)
        wait_for(lambda: feed.failures >= 2)

        assert feed.view() is last

        for path, data in good.items():
            path.write_bytes(data)
            path.replace(store / path.parent.name / path.name)
        wait_for(lambda: feed.view().store_version == 2)

    assert feed.view().model_version_N.tolist() == [2, 2, 2, 2]
    assert last.model_version_N.tolist() == [1, 1, 1, 1]


def test_store_of_another_number_of_samples_is_never_taken(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "scores", 9) as writer:
        writer.append(make_rows(np.arange(9)))
    with ScoreFeed(tmp_path, 4, refresh_interval_s=FAST) as feed:
        wait_for(lambda: feed.failures >= 1)
        wait_for(lambda: feed.failures >= 3 or feed.view().store_version > 0)

        assert len(feed.view().percentile_N) == 4
        assert feed.view().store_version == 0


@pytest.mark.parametrize("told", [False, True], ids=["from the checkpoints", "from the publisher"])
def test_newest_version(tmp_path: Path, told: bool) -> None:
    net = nn.Linear(2, 2)
    with (
        CheckpointPublisher(tmp_path) as publisher,
        ScoreFeed(
            tmp_path, 5, refresh_interval_s=FAST, newest_version=(lambda: publisher.newest_version) if told else None
        ) as feed,
    ):
        assert feed.newest_version() == 0

        publisher.publish(net, 10)
        publisher.publish(net, 20)
        publisher.flush()
        if not told:
            wait_for(lambda: feed.newest_version() == 2)

        assert feed.newest_version() == 2


def test_newest_version_only_rises(tmp_path: Path) -> None:
    with CheckpointPublisher(tmp_path) as publisher:
        publisher.publish(nn.Linear(2, 2), 10)
    with ScoreFeed(tmp_path, 5, refresh_interval_s=FAST) as feed:
        wait_for(lambda: feed.newest_version() == 1)
        shutil.rmtree(tmp_path / "checkpoints")
        feed.refresh()

        assert feed.newest_version() == 1


def test_closed_feed_keeps_its_view_and_follows_no_more(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    feed = ScoreFeed(tmp_path, 2, refresh_interval_s=FAST)
    feed.close()
    feed.close()
    with ScoreWriter(tmp_path / "scores", 2) as writer:
        writer.append(make_rows([0]))

    assert set(threading.enumerate()) <= before
    assert feed.view().store_version == 0

    feed.refresh()

    assert feed.view().store_version == 1


@pytest.mark.parametrize(
    ("versions", "newest", "expected"),
    [
        ([-1, -1, -1, -1], 9, (0.0, None)),
        ([9, 5, 4, -1], 9, (0.5, 4.0)),
        ([9, 5, 4, 1], 9, (0.5, 4.5)),
        ([9, 9, 9, 9], 3, (1.0, 0.0)),
    ],
    ids=["unscored", "one unscored", "all scored", "newer than published"],
)
def test_fresh_share_and_median_age(versions: list[int], newest: int, expected: tuple[float, float | None]) -> None:
    """Bound 4."""
    view = ScoreView(1, np.full(4, 0.5), np.array(versions), 4)

    assert view.fresh_share_and_median_age(newest) == expected
