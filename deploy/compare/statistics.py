"""What may be said of paired results: Student t intervals, Holm's adjusted p values, and tests of equivalence.

Every function takes values of the same seeds in the same order, in any unit, and answers in that unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammainccinv, gammaincinv, gammaln, ndtr, stdtr, stdtrit

from shared.errors import ConfigError, DataError

QUADRATURE = np.polynomial.legendre.leggauss(128)
AHEAD, BEHIND, NOT_SHOWN, NOT_TESTED = "ahead", "behind", "no difference shown", "not tested"
SHOWN = (AHEAD, BEHIND)
LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 1_000_000
ROUNDING = 1e-6  # of the largest value: differences closer together than that are float32 accuracies' rounding


@dataclass(frozen=True)
class Summary:
    """`mean` is None without values, `standard_error` (of the mean) with fewer than two."""

    n: int
    mean: float | None
    standard_error: float | None


@dataclass(frozen=True)
class Paired:
    """Mean of the n differences a - b, its interval, and the two-sided p value of "the true mean is 0"."""

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class Simultaneous:
    """One difference of a family: alone, with the interval that holds for the whole family, and what may be said."""

    paired: Paired
    low_all: float | None
    high_all: float | None
    p_holm: float | None
    verdict: str


@dataclass(frozen=True)
class Equivalence:
    """Mean of the n differences a - b, its 1 - 2 alpha interval, and whether that lies within the margin.

    `seeds_needed` pairs give 80 % power when the true difference is 0 and the spread is the one observed;
    None when there is no spread to go by or it takes more than a million.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    holds: bool
    seeds_needed: int | None


def summary(values: Sequence[float]) -> Summary:
    """Raises DataError for a value that is not finite."""
    x_N = _finite(values)
    n = len(x_N)
    mean = float(x_N.mean()) if n else None
    return Summary(n, mean, float(x_N.std(ddof=1)) / math.sqrt(n) if n > 1 else None)


def paired(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Paired:
    """Student's paired t test and interval of a - b.

    Without spread the t statistic does not exist: with fewer than two pairs, or with all differences equal,
    the interval and p are None. Only when all (two or more) differences are 0 is p 1.0.
    Raises DataError for unequal lengths or values that are not finite, ConfigError for a level outside (0, 1).
    """
    difference = _Difference.of(a, b)
    low, high = difference.interval(_level(level))
    p = 1.0 if difference.all_zero else None
    if difference.error is not None:
        p = 2 * float(stdtr(difference.n - 1, -abs(difference.mean) / difference.error))
    return Paired(difference.n, difference.mean_or_none, low, high, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of Holm (1979), in the order given: step-down, never falling along the sorted p, at most 1."""
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise DataError(f"p value {wrong[0]} is outside 0..1", fix="give probabilities", key="p_values")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def simultaneous(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], level: float = LEVEL) -> list[Simultaneous]:
    """`paired` for each (a, b) of a family of m, with what holds for all of it.

    Holm's procedure has no simple intervals, so beside the adjusted p stands Bonferroni's interval, at level
    1 - (1 - level) / m; it is wider than Holm needs, and may contain 0 where Holm rejects. A pair that cannot be
    tested yet counts as p = 1, so that verdicts of a run in progress are not milder than those of the whole.
    """
    alone = [paired(a, b, level) for a, b in pairs]
    adjusted = holm([1.0 if one.p is None else one.p for one in alone])
    family = []
    for (a, b), one, p_holm in zip(pairs, alone, adjusted, strict=True):
        wide = paired(a, b, 1 - (1 - level) / len(pairs))
        verdict = NOT_TESTED if one.p is None else _verdict(one.mean, p_holm, 1 - level)
        family.append(Simultaneous(one, wide.low, wide.high, None if one.p is None else p_holm, verdict))
    return family


def equivalent(a: Sequence[float], b: Sequence[float], margin: float, level: float = LEVEL) -> Equivalence:
    """Whether the true mean of a - b lies within ± margin: two one-sided t tests (Schuirmann 1987), alpha = 1 - level.

    p is the larger of the two; it is below alpha exactly when the 1 - 2 alpha interval lies within the margin.
    Without spread (fewer than two pairs, or all differences equal) nothing is tested and it does not hold.
    Raises DataError and ConfigError as `paired` does, ConfigError too for a margin that is not above 0.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ConfigError(
            f"margin is {margin}, not above 0", fix="give the largest difference that does not matter", key="margin"
        )
    difference, alpha = _Difference.of(a, b), 1 - _level(level)
    if alpha >= 0.5:
        raise ConfigError(
            f"level is {level}, not above 0.5 as a test of equivalence needs it", fix="set it to 0.95", key="level"
        )
    n, error = difference.n, difference.error
    if error is None:
        return Equivalence(n, difference.mean_or_none, None, None, None, holds=False, seeds_needed=None)
    p = float(stdtr(n - 1, (abs(difference.mean) - margin) / error))
    low, high = difference.interval(1 - 2 * alpha)
    needed = _seeds_needed(margin / (error * math.sqrt(n)), alpha)
    return Equivalence(n, difference.mean, low, high, p, holds=p < alpha, seeds_needed=needed)


def equivalence_power(n: int, margin: float, alpha: float = 1 - LEVEL) -> float:
    """Chance that n pairs pass the two one-sided t tests when the true difference is 0.

    `margin` is in standard deviations of the differences. Exact: with d the mean and s the standard deviation of
    the sample, P(|d| < margin - t s / sqrt(n)), integrated over s, whose sqrt(n - 1) s follows a chi distribution.
    """
    freedom = n - 1
    quantile = float(stdtrit(freedom, 1 - alpha))
    lowest = math.sqrt(2 * float(gammaincinv(freedom / 2, 1e-14)))
    widest = math.sqrt(2 * float(gammainccinv(freedom / 2, 1e-14)))
    highest = min(widest, margin * math.sqrt(n * freedom) / quantile)  # above it no mean passes
    if highest <= lowest:
        return 0.0
    node_Q, weight_Q = QUADRATURE
    chi_Q = lowest + (highest - lowest) * (node_Q + 1) / 2
    density_Q = np.exp(
        (freedom - 1) * np.log(chi_Q) - chi_Q**2 / 2 - (freedom / 2 - 1) * math.log(2) - gammaln(freedom / 2)
    )
    room_Q = margin * math.sqrt(n) - quantile * chi_Q / math.sqrt(freedom)
    return float((highest - lowest) / 2 * (weight_Q * density_Q * (2 * ndtr(room_Q) - 1)).sum())


@dataclass(frozen=True)
class _Difference:
    """Mean of differences and its standard error; `error` is None where the differences have no spread."""

    n: int
    mean: float
    error: float | None
    all_zero: bool

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float]) -> "_Difference":
        a_N, b_N = _finite(a), _finite(b)
        if len(a_N) != len(b_N):
            raise DataError(
                f"{len(a_N)} values cannot be paired with {len(b_N)}", fix="keep the seeds that both have", key="b"
            )
        d_N = a_N - b_N
        n = len(d_N)
        if n == 0:
            return cls(0, math.nan, None, all_zero=False)
        nothing = ROUNDING * max(float(np.abs(a_N).max()), float(np.abs(b_N).max()))
        spread = n > 1 and float(np.ptp(d_N)) > nothing
        error = float(d_N.std(ddof=1)) / math.sqrt(n) if spread else None
        return cls(n, float(d_N.mean()), error, all_zero=n > 1 and float(np.abs(d_N).max()) <= nothing)

    @property
    def mean_or_none(self) -> float | None:
        return self.mean if self.n else None

    def interval(self, level: float) -> tuple[float, float] | tuple[None, None]:
        if self.error is None:
            return None, None
        half = float(stdtrit(self.n - 1, (1 + level) / 2)) * self.error
        return self.mean - half, self.mean + half


def _seeds_needed(margin: float, alpha: float) -> int | None:
    """Smallest n whose power is enough, `margin` in standard deviations: doubling, then halving the interval."""
    enough = 2
    while equivalence_power(enough, margin, alpha) < POWER:
        enough *= 2
        if enough > MOST_SEEDS:
            return None
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if equivalence_power(middle, margin, alpha) < POWER:
            too_few = middle
        else:
            enough = middle
    return enough


def _verdict(mean: float | None, p_holm: float, alpha: float) -> str:
    if mean is None or p_holm >= alpha:
        return NOT_SHOWN
    return AHEAD if mean > 0 else BEHIND


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}, not between 0 and 1", fix="set it to 0.95", key="level")
    return level


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    x_N = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x_N).all():
        raise DataError(
            f"value {x_N[~np.isfinite(x_N)][0]} is not finite",
            fix="leave out the seeds that did not finish",
            key="values",
        )
    return x_N
