import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from shared.errors import ConfigError
from shared.measures import MEASURES, PREVIOUS, find_measure
from shared.schema import SCORE_SCHEMA
from tests.raising import refuses

LN2, LN3 = math.log(2), math.log(3)
OVER_OTHERS = {"gap_by_batch", "gap_by_dataset", "instability"}


@pytest.mark.parametrize(
    ("name", "row", "rank", "show"),
    [
        ("adm", {"log_ratio": [0.0, LN3, -LN3]}, [0.0, LN3, -LN3], [0.0, 0.5, -0.5]),  # l' = l, 3 l, l / 3
        ("log_ratio", {"log_ratio": [0.0, LN3, -LN3]}, [0.0, LN3, -LN3], [0.0, LN3, -LN3]),
        ("adm_by_clean", {"log_ratio": [0.0, LN3, -LN3]}, [0.0, LN3, -LN3], [0.0, 2.0, -2 / 3]),
        ("adm_by_adversarial", {"log_ratio": [0.0, LN3, -LN3]}, [0.0, LN3, -LN3], [0.0, 2 / 3, -2.0]),
        ("gap", {"margin": [0.0, 0.0, LN3], "log_ratio": [0.0, LN3, -LN2]}, *[[0.0, 2 * LN2, -LN2]] * 2),
        ("confidence", {"margin": [0.0, LN3, -LN3]}, [0.0, LN3, -LN3], [1 / 2, 3 / 4, 1 / 4]),
        ("robust_margin", {"adversarial_margin": [2.5, -1.0]}, [2.5, -1.0], [2.5, -1.0]),
        ("instability", {"margin": [LN3, -LN3, 0.0], "previous_margin": [-LN3, LN3, 0.0]}, *[[1 / 2, 1 / 2, 0.0]] * 2),
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
    np.testing.assert_allclose(measure.rank(columns), rank, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(measure.show(columns), show, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("margin", [40.0, 2.0, -17.0, -29.999, -30.001, -300.0, -1200.0])
@pytest.mark.parametrize("log_ratio", [-35.0, -1e-6, 0.0, 1e-6, 0.5, 30.0, 1200.0])
def test_gap_keeps_its_digits_however_small_the_losses(margin: float, log_ratio: float) -> None:
    """Against 60 digits; float64 differences of the two losses would have none left at a margin of -30."""
    with localcontext(prec=60):
        loss = (Decimal(margin).exp() + 1).ln() if margin > -50 else Decimal(margin).exp()
        expected = float(loss * (Decimal(log_ratio).exp() - 1))
    rows = {"margin": np.array([margin]), "log_ratio": np.array([log_ratio])}

    if abs(expected) < 1e300:
        assert find_measure("gap").show(rows)[0] == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("name", sorted(MEASURES.keys() - OVER_OTHERS))
def test_values_stay_finite_where_float64_would_end(name: str) -> None:
    """What people see goes through JSON, which has no infinities. Margins go from -5000 to 4, and back."""
    margin = np.array([-5000.0, 4.0], dtype=np.float32)
    rows = {"margin": margin, "adversarial_margin": margin[::-1], "log_ratio": np.array([5001.4, -5001.4])}
    rows |= {"grad_norm": margin, "el2n": margin}

    assert np.isfinite(find_measure(name).show(rows)).all()


def test_gap_in_units_of_the_mean_loss_of_a_block_or_a_version() -> None:
    """Losses ln 2 (1, 3, 8, 5, unknown), each doubled by the attack: blocks of 1 and 3, of 8, and of version 8."""
    rows = {
        "margin": np.log(np.exp2([1.0, 3.0, 8.0, 5.0, np.nan]) - 1),
        "log_ratio": np.array([LN2, LN2, LN2, LN2, np.nan]),
        "model_version": np.array([7, 7, 7, 8, -1]),
        "scored_at": np.array(["2026-01-01"] * 2 + ["2026-01-02", "2026-01-01", "NaT"], dtype="datetime64[us]"),
    }
    with np.errstate(invalid="ignore"):
        by_batch, by_dataset = (find_measure(name).show(rows) for name in ("gap_by_batch", "gap_by_dataset"))

    np.testing.assert_allclose(by_batch, [1 / 2, 3 / 2, 1.0, 1.0, np.nan], rtol=1e-12)
    np.testing.assert_allclose(by_dataset, [1 / 4, 3 / 4, 2.0, 1.0, np.nan], rtol=1e-12)


def test_which_measures_a_row_alone_has() -> None:
    assert {name for name, rule in MEASURES.items() if not rule.of_one_row} == OVER_OTHERS
    assert {name for name, rule in MEASURES.items() if rule.over_versions} == {"instability"}


@pytest.mark.parametrize("name", sorted(MEASURES.keys() - OVER_OTHERS))
def test_what_is_shown_orders_like_the_rank(name: str) -> None:
    measure = MEASURES[name]
    row = {column: np.linspace(-8, 8, 33, dtype=np.float32)[::-1] for column in measure.columns}
    if name == "gap":  # at one ratio above 1 it rises with the loss
        row["log_ratio"] = np.full(33, 0.5, dtype=np.float32)
    rank, show = measure.rank(row), measure.show(row)

    assert rank.dtype == show.dtype == np.float64
    assert (np.diff(rank) < 0).all()
    assert (np.diff(show) < 0).all()


@pytest.mark.parametrize("name", MEASURES)
def test_columns_are_those_of_the_score_row(name: str) -> None:
    assert {column.removeprefix(PREVIOUS) for column in MEASURES[name].columns} <= set(SCORE_SCHEMA.names)


def test_adm_ranks_where_what_it_shows_is_saturated() -> None:
    row = {"log_ratio": np.array([40.0, 80.0], dtype=np.float32)}
    adm = find_measure("adm")

    assert adm.show(row).tolist() == [1.0, 1.0]
    assert adm.rank(row).tolist() == [40.0, 80.0]


def test_unknown_measure_lists_the_known_ones() -> None:
    with refuses(ConfigError, "measure", "'admm'") as caught:
        find_measure("admm")

    assert caught.value.fix.endswith(", ".join(MEASURES))
