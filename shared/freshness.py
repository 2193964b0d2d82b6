"""When a score counts as fresh: one definition for sampler, REST service and summary."""

import enum
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.attempts import Ranges

DEFAULT_BOUND_VERSIONS = 4
DEFAULT_BOUND_PASSES = 2
ABANDONED = np.iinfo(
    np.int64
).max  # the age of a score whose version is not on the surviving line: older than any bound


class Status(enum.StrEnum):
    """What a score is worth now."""

    FRESH = "fresh"
    STALE = "stale"
    UNSCORED = "unscored"


def staleness_bound(metadata: Mapping[str, Any]) -> int:
    """The age in versions beyond which a score is stale: 4, or two full scoring passes where that is more.

    `metadata` is the score store's: the controller commits there what the bound is, so that all readers agree.
    """
    return int(metadata.get("staleness_bound", DEFAULT_BOUND_VERSIONS))


def age_versions(
    model_version_N: npt.NDArray[np.int64], newest_version: int, abandoned: Ranges = ()
) -> npt.NDArray[np.int64]:
    """How many versions of the surviving line were published after the row's, never below 0.

    -1 where unscored (model_version -1), ABANDONED where the row's version lies in one of the `abandoned` ranges; those
    between a row and the newest version do not count.
    """
    age_N = np.maximum(newest_version - model_version_N, 0)
    is_abandoned_N = np.zeros(len(model_version_N), dtype=bool)
    for first, last in abandoned:
        between_N = min(last, newest_version) - np.maximum(first - 1, model_version_N)
        age_N -= np.maximum(between_N, 0)
        is_abandoned_N |= (model_version_N >= first) & (model_version_N <= last)
    return np.where(model_version_N < 0, -1, np.where(is_abandoned_N, ABANDONED, age_N))


def statuses(age_N: npt.NDArray[np.int64], bound: int) -> npt.NDArray[np.object_]:
    """`Status` by age."""
    return np.select([age_N < 0, age_N <= bound], [Status.UNSCORED.value, Status.FRESH.value], Status.STALE.value)
