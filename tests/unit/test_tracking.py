"""Measures followed over versions, by hand, on a real store of four samples."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from shared.errors import ConfigError, StateError
from shared.measures import find_measure
from shared.ranking import Ranking, percentiles
from shared.score_store import ScoreReader, ScoreWriter
from shared.tracking import Tracker
from tests.raising import refuses
from tests.rows import make_rows

LN3 = math.log(3)
NAN = math.nan


class Store:
    """A score store and a reader that sees each commit."""

    def __init__(self, path: Path) -> None:
        self.writer = ScoreWriter(path, 4)
        self.writer.commit()
        self.reader = ScoreReader(path)

    def commit(self, ids: list[int], version: int, **columns: list[float]) -> ScoreReader:
        self.writer.append(make_rows(ids, version, **{name: np.array(values) for name, values in columns.items()}))
        self.writer.commit()
        self.reader.refresh()
        return self.reader


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "scores")
    with made.writer:
        yield made


def assert_close(found: tuple[npt.NDArray[np.float64], ...], *expected: list[float]) -> None:
    for values, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, right, rtol=1e-6)  # margins are float32


def test_without_memory_only_the_newest_rows_count(store: Store) -> None:
    tracker = Tracker("adm")
    tracker.update(store.commit([0, 1, 2], 1, log_ratio=[3.0, 2.0, 1.0]))
    found = tracker.update(store.commit([0, 1], 2, log_ratio=[-LN3, LN3]))

    assert_close(found, [-0.5, 0.5, math.tanh(0.5), NAN], [1 / 4, 3 / 4, 1 / 2, NAN])


def test_nothing_scored_is_unknown(store: Store) -> None:
    for tracker in (Tracker("adm"), Tracker("adm", 0.5), Tracker("instability"), Tracker("gap_by_batch")):
        assert_close(tracker.update(store.reader), [NAN] * 4, [NAN] * 4)


def test_memory_averages_percentiles_over_a_samples_scorings(store: Store) -> None:
    """Percentiles 1/6, 3/6, 5/6, then 3/4 and 1/4 of two, then that of one alone; memory 0.75. Means are ranked."""
    tracker = Tracker("loss", 0.75)
    first = tracker.update(store.commit([0, 1, 2], 1, margin=[-1.0, 0.0, 1.0]))
    assert_close(first[1:], [1 / 6, 3 / 6, 5 / 6, NAN])

    second = tracker.update(store.commit([0, 3], 2, margin=[9.0, -9.0]))
    assert_close([tracker.state_dict()["mean"]], [0.75 / 6 + 0.25 * 3 / 4, 3 / 6, 5 / 6, 1 / 4])
    assert_close(second[1:], [3 / 8, 5 / 8, 7 / 8, 1 / 8])

    third = tracker.update(store.commit([0], 3, margin=[0.0]))
    assert_close([tracker.state_dict()["mean"]], [0.75 * (0.75 / 6 + 0.25 * 3 / 4) + 0.25 / 2, 3 / 6, 5 / 6, 1 / 4])
    assert_close(third[:1], [math.log(2), math.log(2), math.log1p(math.e), math.log1p(math.exp(-9))])


def test_memory_0_is_none(store: Store) -> None:
    trackers = Tracker("adm"), Tracker("adm", 0.0)
    for version in (1, 2, 3):
        reader = store.commit([0, 1, 2, 3], version, log_ratio=np.random.default_rng(version).normal(size=4).tolist())

        plain, zero = (tracker.update(reader)[1].tolist() for tracker in trackers)
        assert plain == zero


def test_instability_is_the_mean_change_of_the_labels_probability(store: Store) -> None:
    """p_y is 1/4, 1/2 or 3/4 at the margins ln 3, 0 and -ln 3. The first change begins the mean, 0.9 holds it."""
    tracker = Tracker("instability")
    first = tracker.update(store.commit([0, 1, 2], 1, margin=[LN3, 0.0, 0.0]))
    second = tracker.update(store.commit([0, 1, 2], 2, margin=[-LN3, LN3, 0.0]))
    third = tracker.update(store.commit([0, 1, 2, 3], 3, margin=[0.0, LN3, LN3, 0.0]))

    assert_close(first, [NAN] * 4, [NAN] * 4)
    assert_close(second, [1 / 2, 1 / 4, 0.0, NAN], [5 / 6, 3 / 6, 1 / 6, NAN])
    assert_close(third, [0.45 + 0.025, 0.225, 0.025, NAN], [5 / 6, 3 / 6, 1 / 6, NAN])


def test_instability_is_left_alone_by_commits_of_other_samples(store: Store) -> None:
    """And by rows of the version that it was told before; sample 1's own change counts when it comes."""
    tracker = Tracker("instability")
    tracker.update(store.commit([0, 1], 1, margin=[0.0, LN3]))
    before = tracker.update(store.commit([0], 2, margin=[LN3]))
    others = tracker.update(store.commit([2, 3], 2, margin=[5.0, 5.0]))
    again = tracker.update(store.commit([0], 2, margin=[-LN3]))
    later = tracker.update(store.commit([1], 2, margin=[-LN3]))

    assert_close(before[:1], [1 / 4, NAN, NAN, NAN])
    assert_close(others[:1], [1 / 4, NAN, NAN, NAN])
    assert_close(again[:1], [1 / 4, NAN, NAN, NAN])
    assert_close(later, [1 / 4, 1 / 2, NAN, NAN], [1 / 4, 3 / 4, NAN, NAN])


def test_versions_between_two_updates_count_as_one_change(store: Store) -> None:
    tracker = Tracker("instability")
    tracker.update(store.commit([0], 1, margin=[LN3]))
    store.commit([0], 2, margin=[9.0])
    found = tracker.update(store.commit([0], 3, margin=[-LN3]))

    assert_close(found[:1], [1 / 2, NAN, NAN, NAN])


def test_asking_twice_at_one_version_changes_nothing(store: Store) -> None:
    for tracker in (Tracker("instability"), Tracker("adm", 0.5)):
        tracker.update(store.commit([0, 1], 1, margin=[0.0, 1.0], log_ratio=[1.0, 2.0]))
        reader = store.commit([0, 1], 2, margin=[1.0, 1.0], log_ratio=[2.0, 1.0])

        once, twice = ([values.tolist() for values in tracker.update(reader)] for _ in range(2))
        assert once[0][:2] == twice[0][:2]
        assert once[1][:2] == twice[1][:2]


def test_measures_over_groups_see_the_whole_store(store: Store) -> None:
    """Losses ln 2 and ln 4 in one block, doubled by the attack; those of version 2 are apart."""
    store.commit([0, 1], 1, margin=[0.0, LN3], log_ratio=[math.log(2)] * 2)
    reader = store.commit([2], 2, margin=[0.0], log_ratio=[math.log(2)])

    for name in ("gap_by_batch", "gap_by_dataset"):
        found = Tracker(name).update(reader)

        assert_close(found, [2 / 3, 4 / 3, 1.0, NAN], [1 / 4, 3 / 4, 1 / 2, NAN])


@pytest.mark.parametrize("memory", [-0.1, 1.0, 2.0, NAN])
def test_memory_out_of_range_is_refused(memory: float) -> None:
    with refuses(ConfigError, "memory", memory):
        Tracker("adm", memory)


def test_unknown_measure_is_refused() -> None:
    with refuses(ConfigError, "measure", "'admm'"):
        Tracker("admm")


@pytest.mark.parametrize(("measure", "memory"), [("adm", None), ("adm", 0.5), ("instability", None)], ids=str)
def test_state_goes_on_as_if_nothing_had_been(store: Store, measure: str, memory: float | None) -> None:
    """Saved after two versions; what comes after the save leaves the state alone."""
    rng = np.random.default_rng(0)

    def next_version(version: int, ids: list[int]) -> ScoreReader:
        margin, log_ratio = rng.normal(size=(2, len(ids))).tolist()
        return store.commit(ids, version, margin=margin, log_ratio=log_ratio)

    tracker, resumed = Tracker(measure, memory), Tracker(measure, memory)
    tracker.update(next_version(1, [0, 1, 2, 3]))
    tracker.update(next_version(2, [0, 2]))
    state = tracker.state_dict()
    as_saved = repr(state)
    resumed.load_state_dict(state)
    for version, ids in ((3, [0, 1]), (4, [0, 1, 2, 3])):
        reader = next_version(version, ids)
        for one, other in zip(tracker.update(reader), resumed.update(reader), strict=True):
            np.testing.assert_array_equal(one, other)

    assert repr(state) == as_saved


def test_state_of_another_measure_or_form_is_refused() -> None:
    tracker = Tracker("adm")
    state = tracker.state_dict()

    with refuses(StateError, "measure", "'loss'"):
        tracker.load_state_dict(Tracker("loss").state_dict())
    with refuses(StateError, "mood", "['mood']"):
        tracker.load_state_dict(state | {"mood": 1})
    with refuses(StateError, "mean", "['mean']"):
        tracker.load_state_dict({key: value for key, value in state.items() if key != "mean"})


def test_tracker_without_memory_is_the_measure(store: Store) -> None:
    reader = store.commit([0, 1, 3], 5, margin=[2.0, -3.0, 0.5], log_ratio=[0.1, 0.2, 3.0])
    version_N = reader.dense("model_version")
    for name in ("adm", "gap", "confidence", "robust_margin"):
        rule = find_measure(name)
        rows = {column: reader.dense(column) for column in rule.columns}
        with np.errstate(invalid="ignore"):
            expected = rule.show(rows), percentiles(rule.rank(rows), version_N)
        for one, other in zip(Tracker(name).update(reader), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_after_an_update_that_broke_off_the_next_begins_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as for want of memory: what was half changed is not gone on with."""
    tracker = Tracker("margin")
    tracker.update(store.commit([0, 1, 2], 1, margin=[1.0, 2.0, 3.0]))
    reader = store.commit([1], 2, margin=[0.0])

    def break_off(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Ranking, "_inserted", break_off)
        with pytest.raises(MemoryError):
            tracker.update(reader)
    for now, anew in zip(tracker.update(reader), Tracker("margin").update(reader), strict=True):
        np.testing.assert_array_equal(now, anew)
