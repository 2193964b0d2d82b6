import math

import numpy as np
import pytest

from shared.errors import ConfigError
from shared.measures import MEASURES, find_measure, percentiles
from shared.schema import SCORE_SCHEMA

LN3 = math.log(3)


@pytest.mark.parametrize(
    ("name", "row", "rank", "show"),
    [
        ("adm", {"log_ratio": [0.0, LN3, -LN3]}, [0.0, LN3, -LN3], [0.0, 0.5, -0.5]),  # l' = l, 3 l, l / 3
        ("loss", {"margin": [0.0, LN3, -LN3]}, [0.0, LN3, -LN3], [math.log(2), math.log(4), math.log(4 / 3)]),
        ("loss", {"margin": [1000.0, -40.0]}, [1000.0, -40.0], [1000.0, math.exp(-40)]),  # neither overflows nor is 0
        ("margin", {"margin": [-2.5, 1.0]}, [-2.5, 1.0], [-2.5, 1.0]),
        ("grad_norm", {"grad_norm": [0.25]}, [0.25], [0.25]),
        ("el2n", {"el2n": [1.25]}, [1.25], [1.25]),
    ],
)
def test_measure_by_hand(name: str, row: dict[str, list[float]], rank: list[float], show: list[float]) -> None:
    measure = find_measure(name)
    columns = {column: np.array(values) for column, values in row.items()}

    assert measure.columns == tuple(row)
    np.testing.assert_allclose(measure.rank(columns), rank, rtol=1e-12)
    np.testing.assert_allclose(measure.show(columns), show, rtol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_shown_orders_like_the_rank(name: str) -> None:
    measure = MEASURES[name]
    row = {column: np.linspace(-8, 8, 33, dtype=np.float32)[::-1] for column in measure.columns}
    rank, show = measure.rank(row), measure.show(row)

    assert set(measure.columns) <= set(SCORE_SCHEMA.names)
    assert rank.dtype == show.dtype == np.float64
    assert (np.diff(rank) < 0).all()
    assert (np.diff(show) < 0).all()


def test_adm_ranks_where_what_it_shows_is_saturated() -> None:
    row = {"log_ratio": np.array([40.0, 80.0], dtype=np.float32)}
    adm = find_measure("adm")

    assert adm.show(row).tolist() == [1.0, 1.0]
    assert adm.rank(row).tolist() == [40.0, 80.0]


def test_unknown_measure_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'admm'; known: adm, loss, margin, grad_norm, el2n"):
        find_measure("admm")


@pytest.mark.parametrize(
    ("value", "version", "expected"),
    [
        ([30.0, 10.0, 20.0, 40.0], [1, 1, 1, 1], [5 / 8, 1 / 8, 3 / 8, 7 / 8]),
        ([1.0, 1.0, 2.0, 1.0], [7, 7, 7, 7], [3 / 8, 3 / 8, 7 / 8, 3 / 8]),  # ranks 0, 1, 2 share 1
        ([1.0, 100.0, 2.0, 50.0], [1, 2, 1, 2], [1 / 4, 3 / 4, 3 / 4, 1 / 4]),  # each among its own version
        ([5.0, 5.0], [1, 2], [1 / 2, 1 / 2]),  # equal values of two versions are no tie
        ([math.nan, 3.0, math.nan], [-1, 4, -1], [math.nan, 1 / 2, math.nan]),
        ([2.0, 0.0], [0, 0], [3 / 4, 1 / 4]),
        ([math.nan], [-1], [math.nan]),
        ([], [], []),
    ],
    ids=["one version", "ties", "two versions", "equal over versions", "unscored", "version 0", "none scored", "empty"],
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
