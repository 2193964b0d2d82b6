"""Intervals, adjusted p values and tests of equivalence, against scipy.stats, hand calculation and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from deploy.compare.statistics import (
    AHEAD,
    BEHIND,
    NOT_SHOWN,
    NOT_TESTED,
    Equivalence,
    Paired,
    Summary,
    equivalence_power,
    equivalent,
    holm,
    paired,
    simultaneous,
    summary,
)
from shared.errors import ConfigError, DataError
from tests.raising import refuses

A = [85.1, 84.2, 86.0, 85.5, 84.9]
B = [84.6, 84.3, 85.1, 84.7, 84.8]  # differences 0.5, -0.1, 0.9, 0.8, 0.1


def test_summary_is_the_mean_and_its_standard_error() -> None:
    answer = summary([1.0, 2.0, 6.0])  # variance (4 + 1 + 9) / 2 = 7

    assert (answer.n, answer.mean) == (3, 3.0)
    assert answer.standard_error == pytest.approx(math.sqrt(7 / 3))


@pytest.mark.parametrize(
    ("values", "expected"), [([], Summary(0, None, None)), ([4.0], Summary(1, 4.0, None))], ids=["none", "one"]
)
def test_summary_claims_no_error_of_fewer_than_two_values(values: list[float], expected: Summary) -> None:
    assert expected == summary(values)


@pytest.mark.parametrize("level", [0.95, 0.99, 0.5])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_paired_agrees_with_scipy(n: int, level: float) -> None:
    oracle = stats.ttest_rel(A[:n], B[:n])
    interval = oracle.confidence_interval(level)

    answer = paired(A[:n], B[:n], level)

    assert answer.p == pytest.approx(oracle.pvalue, rel=1e-9)
    assert (answer.low, answer.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_turned_round_is_the_mirror_image() -> None:
    forth, back = paired(A, B), paired(B, A)

    assert forth.low is not None
    assert forth.high is not None
    assert back == Paired(5, -(forth.mean or 0), -forth.high, -forth.low, forth.p)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([], [], Paired(0, None, None, None, None)),
        ([3.0], [1.0], Paired(1, 2.0, None, None, None)),
        ([1.0], [1.0], Paired(1, 0.0, None, None, None)),
        ([3.0, 5.0], [1.0, 3.0], Paired(2, 2.0, None, None, None)),
        ([3.0, 5.0], [3.0, 5.0], Paired(2, 0.0, None, None, 1.0)),
    ],
    ids=["no pair", "one pair", "one equal pair", "equal differences", "no difference at all"],
)
def test_paired_tests_nothing_without_spread(a: list[float], b: list[float], expected: Paired) -> None:
    assert expected == paired(a, b)


def test_rounding_is_no_spread() -> None:
    """In floating point 0.83 - 0.82, 0.85 - 0.84 and 0.57 - 0.56 differ by 1e-16: a t of 1e14 if taken as spread."""
    a, b = [0.83, 0.85, 0.57], [0.82, 0.84, 0.56]

    assert len({x - y for x, y in zip(a, b, strict=True)}) > 1
    assert paired(a, b).p is None
    assert equivalent(a, b, 0.05).p is None


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4*.005, 3*.01, 2*.03, max(.06, .04)
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.5, 0.6, 0.7], [1.0, 1.0, 1.0]),
        ([0.9, 0.0], [0.9, 0.0]),
        ([0.011, 0.02], [0.022, 0.022]),  # 2*.011 = .022 holds up the larger p
    ],
    ids=["none", "one", "textbook", "ties", "capped", "zero", "monotone"],
)
def test_holm_by_hand(p_values: list[float], expected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(expected)


def test_simultaneous_intervals_are_bonferroni() -> None:
    family = simultaneous([(A, B), (B, A), (A, [85.0] * 5)])
    oracle = stats.ttest_rel(A, B).confidence_interval(1 - 0.05 / 3)

    assert (family[0].low_all, family[0].high_all) == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    assert family[0].paired == paired(A, B)


def test_verdicts_follow_the_adjusted_p_and_the_sign() -> None:
    """Alone p = 0.034 is ahead, but two of them adjust to 0.068; two of 0.0167 adjust to 0.033."""
    up, zero = [0.5, 0.1, 0.9, 0.8, 0.2], [0.0] * 5
    strong = [0.5, 0.2, 0.9, 0.8, 0.3]
    assert stats.ttest_rel(up, zero).pvalue == pytest.approx(0.0341, abs=1e-4)
    assert stats.ttest_rel(strong, zero).pvalue == pytest.approx(0.0167, abs=1e-4)

    assert [one.verdict for one in simultaneous([(up, zero)])] == [AHEAD]
    assert [one.verdict for one in simultaneous([(up, zero), (zero, up)])] == [NOT_SHOWN] * 2
    assert [one.verdict for one in simultaneous([(strong, zero), (zero, strong)])] == [AHEAD, BEHIND]


def test_pairs_not_yet_tested_count_in_the_family() -> None:
    up, zero = [0.5, 0.1, 0.9, 0.8, 0.2], [0.0] * 5

    tested, waiting = simultaneous([(up, zero), ([], [])])

    assert tested.p_holm == pytest.approx(2 * stats.ttest_rel(up, zero).pvalue)
    assert tested.verdict == NOT_SHOWN
    assert waiting.p_holm is None
    assert waiting.verdict == NOT_TESTED


def test_equivalence_by_hand_from_a_table_of_t() -> None:
    """Mean 0.44, squares 0.752, deviation sqrt(0.188) = 0.433590; t(0.95, 4) = 2.131847: 0.44 ± 0.413380."""
    answer = equivalent(A, B, 1.0)

    assert (answer.low, answer.high) == pytest.approx((0.026620, 0.853380), abs=1e-5)
    assert answer.p == pytest.approx(stats.t.sf((1.0 - 0.44) / (0.433590 / math.sqrt(5)), 4), abs=1e-6)
    assert answer.holds


@pytest.mark.parametrize(("a", "b"), [(A, B), (B, A)], ids=["above", "below"])
def test_equivalence_holds_exactly_when_the_interval_is_within_the_margin(a: list[float], b: list[float]) -> None:
    answer = equivalent(a, b, 1.0)
    assert answer.low is not None
    assert answer.high is not None
    edge = max(-answer.low, answer.high)

    assert equivalent(a, b, edge * 1.0001).holds
    assert not equivalent(a, b, edge * 0.9999).holds
    assert equivalent(a, b, edge).p == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("a", "b", "mean"),
    [([], [], None), ([1.0], [1.0], 0.0), ([3.0, 5.0], [3.0, 5.0], 0.0)],
    ids=["no pair", "one pair", "no spread"],
)
def test_equivalence_is_not_claimed_without_spread(a: list[float], b: list[float], mean: float | None) -> None:
    assert Equivalence(len(a), mean, None, None, None, holds=False, seeds_needed=None) == equivalent(a, b, 1.0)


@pytest.mark.parametrize(("n", "margin"), [(3, 3.0), (5, 1.5), (12, 0.9), (40, 0.3)])
def test_power_of_the_equivalence_test_by_simulation(n: int, margin: float) -> None:
    d_TN = np.random.default_rng(0).normal(size=(100_000, n))
    half_T = stats.t.ppf(0.95, n - 1) * d_TN.std(axis=1, ddof=1) / math.sqrt(n)

    passed = (np.abs(d_TN.mean(axis=1)) + half_T < margin).mean()

    assert equivalence_power(n, margin) == pytest.approx(passed, abs=0.006)


def test_power_nears_the_normal_approximation_for_many_seeds() -> None:
    """With the spread all but known: 2 Phi(margin sqrt(n) - 1.645) - 1."""
    expected = 2 * stats.norm.cdf(0.03 * math.sqrt(10_000) - stats.norm.ppf(0.95)) - 1

    assert equivalence_power(10_000, 0.03) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("margin", [5.0, 1.0, 0.5, 0.1])
def test_seeds_needed_is_the_smallest_number_with_enough_power(margin: float) -> None:
    deviation = float(np.std(np.subtract(A, B), ddof=1))

    needed = equivalent(A, B, margin).seeds_needed

    assert needed is not None
    assert equivalence_power(needed, margin / deviation) >= 0.8
    assert needed == 2 or equivalence_power(needed - 1, margin / deviation) < 0.8


def test_a_margin_out_of_reach_needs_no_number_of_seeds() -> None:
    assert equivalent(A, B, 1e-6).seeds_needed is None


def test_mistakes_name_value_and_fix() -> None:
    with refuses(DataError, "b", "2 values"):
        paired([1.0, 2.0], [1.0])
    with refuses(DataError, "values", math.nan):
        summary([1.0, math.nan])
    with refuses(ConfigError, "level", 1.5):
        paired(A, B, 1.5)
    with refuses(ConfigError, "margin", 0):
        equivalent(A, B, 0)
    with refuses(ConfigError, "level", 0.5):
        equivalent(A, B, 1.0, level=0.5)
    with refuses(DataError, "p_values", 1.2):
        holm([0.1, 1.2])
