"""Curriculum policies: from percentiles of difficulty to sampling weights. Pure functions of arrays of length N.

A new policy is one frozen dataclass with `weights`, one line in POLICIES and one test.
"""

import dataclasses
import inspect
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError

MAX_STRENGTH = 100.0  # beyond, weights leave float64

Floats = npt.NDArray[np.float64]


class Policy(Protocol):
    """How difficulty becomes the chance of being drawn."""

    @property
    def measure(self) -> str:
        """The measure whose percentiles `weights` wants."""
        ...

    def weights(self, percentile_N: Floats, trust_N: Floats, progress: float) -> Floats:
        """Positive sampling weights, 1 being neutral.

        Args:
            percentile_N: of the measure, in [0, 1]; NaN where unscored.
            trust_N: 1 for a fresh score, towards 0 with staleness, 0 for none.
            progress: share of the training done, in [0, 1].
        """
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every sample alike, whatever its scores."""

    measure: str = "adm"

    def weights(self, percentile_N: Floats, trust_N: Floats, progress: float) -> Floats:
        return np.ones(len(percentile_N))


@dataclasses.dataclass(frozen=True)
class LowAdmFirst:
    """Low ADM first, soft: weight exp(-2 b (q - 1/2)) of the ADM percentile q.

    b fades linearly from `strength` to 0 at `fade_until`; an untrusted score's weight goes to the neutral 1. Low ADM is
    not "easy": it is robust relative to its own loss, and holds the misclassified samples.
    """

    strength: float = 1.0
    fade_until: float = 0.7
    measure: str = "adm"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= MAX_STRENGTH:
            raise ConfigError(
                f"curriculum strength is {self.strength}; it must lie in 0..{MAX_STRENGTH:g} (1 is usual)"
            )
        if not 0 < self.fade_until <= 1:
            raise ConfigError(f"curriculum fade_until is {self.fade_until}; it must lie in (0, 1]")

    def weights(self, percentile_N: Floats, trust_N: Floats, progress: float) -> Floats:
        b = self.strength * max(0.0, 1.0 - progress / self.fade_until)
        if b == 0:
            return np.ones(len(percentile_N))
        return np.exp(-2 * b * trust_N * (np.where(np.isnan(percentile_N), 0.5, percentile_N) - 0.5))


POLICIES: dict[str, type[Policy]] = {"uniform": Uniform, "low_adm_first": LowAdmFirst}


def find_policy(name: str, **settings: float) -> Policy:
    """The policy `name` with those of `settings` that it has. Raises ConfigError listing the known names."""
    if name not in POLICIES:
        raise ConfigError(f"no curriculum {name!r}; known: {', '.join(POLICIES)}")
    has = inspect.signature(POLICIES[name]).parameters
    return POLICIES[name](**{key: value for key, value in settings.items() if key in has})


def trust(age_N: npt.NDArray[np.int64], bound: int) -> Floats:
    """How far a score counts: 1 up to `bound` versions, then linearly to 0 at twice that; 0 where unscored (-1)."""
    faded_N = np.clip(1.0 - (age_N - bound) / max(bound, 1), 0.0, 1.0)
    return np.where(age_N < 0, 0.0, np.where(age_N <= bound, 1.0, faded_N))
