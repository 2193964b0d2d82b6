"""Percentiles and rank correlation: by hand, against scipy, and changes against all anew."""

import math

import numpy as np
import pytest
import scipy.stats

from shared.ranking import Ranking, percentiles, rank_correlation


@pytest.mark.parametrize(
    ("value", "version", "expected"),
    [
        ([30.0, 10.0, 20.0, 40.0], [1, 1, 1, 1], [5 / 8, 1 / 8, 3 / 8, 7 / 8]),
        ([1.0, 1.0, 2.0, 1.0], [7, 7, 7, 7], [3 / 8, 3 / 8, 7 / 8, 3 / 8]),  # ranks 0, 1, 2 share 1
        ([1.0, 100.0, 2.0, 50.0], [1, 2, 1, 2], [1 / 4, 3 / 4, 3 / 4, 1 / 4]),  # each among its own version
        ([5.0, 5.0], [1, 2], [1 / 2, 1 / 2]),  # equal values of two versions are no tie
        ([math.nan, 3.0, math.nan], [-1, 4, -1], [math.nan, 1 / 2, math.nan]),
        ([math.nan, 3.0, 1.0, math.nan], [4, 4, 4, 5], [math.nan, 3 / 4, 1 / 4, math.nan]),
        ([2.0, 0.0], [0, 0], [3 / 4, 1 / 4]),
        ([math.nan], [-1], [math.nan]),
        ([], [], []),
    ],
    ids=[
        "one version",
        "ties",
        "two versions",
        "equal over versions",
        "unscored",
        "no value",
        "version 0",
        "none scored",
        "empty",
    ],
)
def test_percentiles_by_hand(value: list[float], version: list[int], expected: list[float]) -> None:
    np.testing.assert_allclose(percentiles(np.array(value), np.array(version, dtype=np.int64)), expected, rtol=1e-12)


def test_percentiles_depend_on_the_order_only() -> None:
    rng = np.random.default_rng(0)
    value = rng.integers(0, 20, 300).astype(np.float64)
    version = rng.integers(1, 4, 300)
    percentile = percentiles(value, version)
    shuffle = rng.permutation(300)

    np.testing.assert_array_equal(percentiles(np.exp(value), version), percentile)
    np.testing.assert_array_equal(percentiles(value[shuffle], version[shuffle]), percentile[shuffle])
    for each in (1, 2, 3):
        assert percentile[version == each].mean() == pytest.approx(0.5)


@pytest.mark.parametrize("values", [400, 9], ids=["few ties", "many ties"])
def test_rank_correlation_is_spearmans(values: int) -> None:
    rng = np.random.default_rng(values)
    a = rng.integers(0, values, 300).astype(np.float64)
    b = np.exp(a / values) + rng.normal(0, 0.4, 300)
    a[:20], b[15:30] = np.nan, np.inf
    both = np.isfinite(a) & np.isfinite(b)

    assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a[both], b[both]).statistic, rel=1e-12)
    assert rank_correlation(a, -a) == pytest.approx(-1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.arange(9.0), np.arange(9.0)),
        (np.append(np.arange(9.0), [np.nan] * 5), np.arange(14.0)),
        (np.ones(20), np.arange(20.0)),
        (np.zeros(0), np.zeros(0)),
    ],
    ids=["nine", "nine known", "constant", "none"],
)
def test_rank_correlation_of_too_little_is_none(a: np.ndarray, b: np.ndarray) -> None:
    assert rank_correlation(a, b) is None


@pytest.mark.parametrize("values", [1000, 5], ids=["few ties", "many ties"])
def test_a_ranking_that_changes_equals_one_made_anew(values: int) -> None:
    rng = np.random.default_rng(values)
    value, version = np.full(200, np.nan), np.full(200, -1)
    ranking = Ranking(200)
    for newest in range(1, 40):
        ids = rng.permutation(200)[: rng.integers(0, 60)]
        value[ids] = np.where(rng.random(len(ids)) < 0.1, np.nan, rng.integers(0, values, len(ids)))
        version[ids] = np.maximum(newest - rng.integers(0, 3, len(ids)), 1)
        found = ranking.update(ids, value[ids], version[ids])

        np.testing.assert_array_equal(found, percentiles(value, version))
        one = version == newest
        among = scipy.stats.rankdata(value[one & ~np.isnan(value)])
        np.testing.assert_allclose(found[one & ~np.isnan(value)], (among - 0.5) / len(among))


def test_an_answer_stays_as_it_was_given() -> None:
    ranking = Ranking(2)
    first = ranking.update(np.array([0]), np.array([1.0]), np.array([1]))
    ranking.update(np.array([1]), np.array([0.0]), np.array([1]))

    assert first.tolist() == pytest.approx([1 / 2, math.nan], nan_ok=True)
