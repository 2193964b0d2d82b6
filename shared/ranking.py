"""Ranks: percentiles within each model_version, kept up as scores change, and rank correlation."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer[Any]]

MIN_CORRELATED = 10


class Ranking:
    """The percentile of each of N values among the values of its own model_version, in [0, 1].

    Ranks from different versions do not mix (measured: 0.82 against 0.93 rank correlation). Equal values share the mean
    of their ranks; the percentile is (rank + 1/2) / n, so that a version's percentiles have the mean 1/2.

    Only what changed is sorted, and only versions that lose or gain samples are looked at: a change of C values costs
    O(C log C) and a copy of N numbers. All anew would be O(N log N).
    """

    def __init__(self, num_samples: int) -> None:
        self._id_type = np.int32 if num_samples < 2**31 else np.int64
        self._sorted: dict[int, tuple[Ids, Floats]] = {}  # model_version -> ids and values of its samples, by value
        self._percentile_N = np.full(num_samples, np.nan)
        self._version_N = np.full(num_samples, -1, dtype=np.int64)  # in which each is ranked; -1 in none

    def update(self, id_C: Ids, value_C: Floats, model_version_C: Ids) -> Floats:
        """The percentiles of all samples, shape [N], after those of `id_C` (no repeats) took these values.

        NaN where the value is NaN or model_version is -1, and where none was ever given.
        """
        percentile_N = self._percentile_N.copy()
        percentile_N[id_C] = np.nan
        for version in self._removed(id_C) | self._inserted(id_C, value_C, model_version_C):
            id_G, value_G = self._sorted[version]
            percentile_N[id_G] = _percentiles(value_G)
        percentile_N.flags.writeable = False  # it is what the next update starts from
        self._percentile_N = percentile_N
        return percentile_N

    def _removed(self, id_C: Ids) -> set[int]:
        """The versions that lose samples and keep others."""
        left = np.unique(self._version_N[id_C])
        self._version_N[id_C] = -1
        fewer = set()
        for version in left[left >= 0].tolist():
            id_G, value_G = self._sorted[version]
            stays_G = self._version_N[id_G] == version
            if stays_G.any():
                self._sorted[version] = id_G[stays_G], value_G[stays_G]
                fewer.add(version)
            else:
                del self._sorted[version]
        return fewer

    def _inserted(self, id_C: Ids, value_C: Floats, model_version_C: Ids) -> set[int]:
        """The versions that gain samples."""
        ranked = np.flatnonzero((model_version_C >= 0) & ~np.isnan(value_C))
        if not len(ranked):
            return set()
        ranked = ranked[np.lexsort((value_C[ranked], model_version_C[ranked]))]
        versions, first = np.unique(model_version_C[ranked], return_index=True)
        for version, mine in zip(versions.tolist(), np.split(ranked, first[1:]), strict=True):
            id_G, value_G = self._sorted.get(version, (np.zeros(0, dtype=self._id_type), np.zeros(0)))
            self._version_N[id_C[mine]] = version
            at = np.searchsorted(value_G, value_C[mine])
            self._sorted[version] = np.insert(id_G, at, id_C[mine]), np.insert(value_G, at, value_C[mine])
        return set(versions.tolist())


def percentiles(value_N: Floats, model_version_N: Ids) -> Floats:
    """Each value's percentile among the values of its own model_version, as `Ranking` has it."""
    return Ranking(len(value_N)).update(np.arange(len(value_N)), value_N, model_version_N)


def rank_correlation(a_N: Floats, b_N: Floats) -> float | None:
    """Spearman's, over the samples where both are finite; None for fewer than 10 or when one side is constant."""
    both_N = np.isfinite(a_N) & np.isfinite(b_N)
    one_version = np.zeros(int(both_N.sum()), dtype=np.int64)
    a, b = percentiles(a_N[both_N], one_version), percentiles(b_N[both_N], one_version)
    if len(a) < MIN_CORRELATED or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1.0, 1.0))


def _percentiles(sorted_G: Floats) -> Floats:
    is_first_G = np.ones(len(sorted_G), dtype=bool)
    is_first_G[1:] = sorted_G[1:] != sorted_G[:-1]
    tie = np.flatnonzero(is_first_G)
    size = np.diff(np.append(tie, len(sorted_G)))
    percentile_of_tie = (tie + (size - 1) / 2 + 0.5) / len(sorted_G)
    percentile_G: Floats = percentile_of_tie[np.cumsum(is_first_G) - 1]  # np.repeat would keep other threads waiting
    return percentile_G
