"""Curricula: from the difficulty of samples to weights v_i. Pure functions of arrays over the N samples.

A measure's percentiles put the samples in an order, a curriculum gives each place in it a weight, a guard sets apart
those whose label looks wrong. The sampler draws by these weights, or draws alike and weights the loss. A new curriculum
is one function, one line in CURRICULA and one test.

Low ADM is not "easy": it is robust relative to its own loss, and holds the misclassified samples.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import CurriculumConfig

Floats = npt.NDArray[np.float64]
NUM_CLASSES = 10  # where nobody says how many


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of the samples when a window is planned.

    `percentile_N` of the policy's measure in [0, 1], NaN where unknown; `trust_N` 1 for a fresh score, towards 0 with
    staleness, 0 for none; `margin_N` the logit margin, NaN where unscored.
    """

    percentile_N: Floats
    trust_N: Floats
    margin_N: npt.NDArray[np.floating]

    @property
    def loss_N(self) -> Floats:
        """Cross-entropy, softplus(margin); NaN where unscored."""
        with np.errstate(invalid="ignore"):
            return np.logaddexp(0.0, self.margin_N.astype(np.float64))


class Policy(Protocol):
    """How difficulty becomes weights."""

    @property
    def measure(self) -> str:
        """The measure whose percentiles `weights` wants."""
        ...

    def weights(self, seen: Seen, progress: float) -> Floats:
        """Weights v (N,), from 0 up, 1 being neutral; `progress` is the share of the training done."""
        ...


class Curriculum:
    """The policy that `config` describes.

    Before `begin_at` every sample is neutral; from there on `progress` runs from 0 to 1. What is not known or trusted
    is neutral too, and in between the weight is mixed: trust * v + (1 - trust). Where nothing known has a weight, such
    as among equal losses, all are neutral.

    Samples that the guard sets apart do not count in shares and thresholds of the others; `soft` leaves the others the
    places that they have among all.

    Args:
        seed: of the random order.
        num_classes: K; a label is less likely than chance where the loss is above ln K.
    """

    def __init__(self, config: "CurriculumConfig", *, seed: int = 0, num_classes: int = NUM_CLASSES) -> None:
        self.measure, self.memory = config.measure, config.memory
        self._config = config
        self._weigh = find_curriculum(config.name)
        self._order = ORDERS[config.order]
        self._guard = GUARDS[config.guard]
        self._guard_loss = config.guard_loss if config.guard_loss is not None else math.log(num_classes)
        self._seed = seed

    def weights(self, seen: Seen, progress: float) -> Floats:
        config = self._config
        if progress < config.begin_at:
            return np.ones(len(seen.percentile_N))
        progress = (progress - config.begin_at) / (1 - config.begin_at)
        loss_N = seen.loss_N
        v_N = self._v(seen.percentile_N, loss_N, progress)
        bad_N = loss_N > self._guard_loss  # False where unscored
        if guarded := guard_strength(bad_N, loss_N, progress, config):
            good_v_N = self._v(np.where(bad_N, np.nan, seen.percentile_N), np.where(bad_N, np.nan, loss_N), progress)
            bad_v_N = (1 - guarded) * v_N + guarded * self._guard(v_N, good_v_N, config)
            v_N = np.where(bad_N, bad_v_N, good_v_N)
        known_N = ~np.isnan(v_N)
        if known_N.any() and not v_N[known_N].any():
            return np.ones(len(v_N))
        return 1 - seen.trust_N + seen.trust_N * np.where(known_N, v_N, 1.0)

    def _v(self, percentile_N: Floats, loss_N: Floats, progress: float) -> Floats:
        """What the curriculum alone says; NaN where nothing is known."""
        with np.errstate(invalid="ignore", over="ignore"):  # of what is unscored, and of losses beyond a lambda of 0
            return self._weigh(self._order(percentile_N, self._seed), loss_N, progress, self._config)


def find_policy(name: str, *, seed: int = 0, num_classes: int = NUM_CLASSES, **settings: object) -> Curriculum:
    """The curriculum `name` with settings as in the section `train.curriculum`. Raises ConfigError."""
    from shared.config import make_config
    from trainer.config import CurriculumConfig

    return Curriculum(make_config(CurriculumConfig, {"name": name, **settings}), seed=seed, num_classes=num_classes)


def trust(age_N: npt.NDArray[np.int64], bound: int) -> Floats:
    """How far a score counts: 1 up to `bound` versions, then linearly to 0 at twice that; 0 where unscored (-1)."""
    faded_N = np.clip(1.0 - (age_N - bound) / max(bound, 1), 0.0, 1.0)
    return np.where(age_N < 0, 0.0, np.where(age_N <= bound, 1.0, faded_N))


# -- curricula: (place_N, loss_N, progress, config) -> v_N; place 0 comes first, 1 last; NaN where unknown -------------

Weigh = Callable[[Floats, Floats, float, "CurriculumConfig"], Floats]


def uniform(place_N: Floats, loss_N: Floats, progress: float, config: "CurriculumConfig") -> Floats:
    """Every sample alike, whatever its scores."""
    return np.ones(len(place_N))


def soft(place_N: Floats, loss_N: Floats, progress: float, config: "CurriculumConfig") -> Floats:
    """exp(-2 b (place - 1/2)), where b is `strength` up to `hold_until` and fades linearly to 0 at `fade_until`."""
    fading = max(config.fade_until - config.hold_until, 1e-12)
    b = config.strength * min(max((config.fade_until - progress) / fading, 0.0), 1.0)
    return np.exp(-2 * b * (place_N - 0.5))


def pacing(place_N: Floats, loss_N: Floats, progress: float, config: "CurriculumConfig") -> Floats:
    """1 for the first g(progress) of the samples, rounded up, 0 for the rest (Wu et al., arXiv 2012.03107)."""
    known_N = ~np.isnan(place_N)
    share = _share(progress, config)
    last = np.quantile(place_N[known_N], share, method="inverted_cdf") if known_N.any() else 1.0
    return np.where(known_N, place_N <= last, np.nan)


def self_paced(place_N: Floats, loss_N: Floats, progress: float, config: "CurriculumConfig") -> Floats:
    """Weights of the loss l against a threshold lambda, the quantile g(progress) of all losses (Kumar et al. 2010).

    Losses of different model versions are compared as they are: meant for scores of one version (`every_epoch`).

    Hard: 1 if l < lambda; linear: 1 - l / lambda; logistic: (1 + e^-lambda) / (1 + e^(l - lambda)). With g = 1 lambda
    is infinite, and every weight 1: in the end all data counts.
    """
    share = _share(progress, config)
    threshold = np.inf if share >= 1 or np.isnan(loss_N).all() else float(np.nanquantile(loss_N, share))
    return SELF_PACED[config.regulariser](loss_N, threshold)


CURRICULA: dict[str, Weigh] = {"uniform": uniform, "soft": soft, "pacing": pacing, "self_paced": self_paced}


def find_curriculum(name: str) -> Weigh:
    """Raises ConfigError listing the known names."""
    if name not in CURRICULA:
        raise ConfigError(f"no curriculum {name!r}", fix=f"choose one of {', '.join(CURRICULA)}", key="name")
    return CURRICULA[name]


# -- orders: percentile (N,), seed -> place (N,) -----------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _random_places(num_samples: int, seed: int) -> Floats:
    places = (np.random.default_rng([seed, num_samples]).permutation(num_samples) + 0.5) / num_samples
    places.flags.writeable = False
    return places


def _random(percentile_N: Floats, seed: int) -> Floats:
    """A fixed random place: the control that has the curriculum and no measure. Unknown where the measure is."""
    return np.where(np.isnan(percentile_N), np.nan, _random_places(len(percentile_N), seed))


ORDERS: dict[str, Callable[[Floats, int], Floats]] = {
    "low": lambda percentile_N, seed: percentile_N,
    "high": lambda percentile_N, seed: 1 - percentile_N,
    "random": _random,
}


# -- guards: weights (N,), those of the others (NaN elsewhere) -> weights of samples whose label looks wrong -----------

GUARDS: dict[str, Callable[[Floats, Floats, "CurriculumConfig"], Floats | float]] = {
    "none": lambda v_N, good_v_N, config: v_N,
    "hardest": lambda v_N, good_v_N, config: float(np.fmin.reduce(good_v_N, initial=1.0)),
    "neutral": lambda v_N, good_v_N, config: 1.0,
    "cap": lambda v_N, good_v_N, config: np.minimum(v_N, 1.0),
    "aside": lambda v_N, good_v_N, config: np.minimum(v_N, config.guard_weight),
}


def guard_strength(bad_N: npt.NDArray[np.bool_], loss_N: Floats, progress: float, config: "CurriculumConfig") -> float:
    """How far the guard is in force, in [0, 1], by the share of scored samples whose label looks wrong.

    That share is the run's own estimate of its label noise: hard samples leave it as the network learns them, wrong
    labels stay. Below `guard_floor` it says nothing.
    """
    if progress < config.guard_from or config.guard == "none":
        return 0.0
    noise = float(bad_N.sum()) / max(int((~np.isnan(loss_N)).sum()), 1)
    return min(max((noise - config.guard_floor) / config.guard_floor, 0.0), 1.0) if config.guard_floor else 1.0


# -- pacing functions: t = progress / full_at in [0, 1], b = start_share -> share of the samples (Wu et al.) ----------

PACINGS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda t, b: b + (1 - b) * t,
    "quadratic": lambda t, b: b + (1 - b) * t**2,
    "root": lambda t, b: b + (1 - b) * math.sqrt(t),
    "step": lambda t, b: b + (1 - b) * math.floor(t),
    "exponential": lambda t, b: b + (1 - b) * math.expm1(10 * t) / math.expm1(10),
    "logarithmic": lambda t, b: b + (1 - b) * (1 + math.log(t + math.exp(-10)) / 10),
}


def _share(progress: float, config: "CurriculumConfig") -> float:
    return min(PACINGS[config.pacing](min(progress / config.full_at, 1.0), config.start_share), 1.0)


# -- regularisers of self-paced learning: loss (N,), lambda -> v (N,) --------------------------------------------------


def _logistic(loss_N: Floats, threshold: float) -> Floats:
    """In logarithms, so that no power of e overflows."""
    if math.isinf(threshold):
        return np.where(np.isnan(loss_N), np.nan, 1.0)
    v_N: Floats = np.exp(np.logaddexp(0.0, -threshold) - np.logaddexp(0.0, loss_N - threshold))
    return v_N


SELF_PACED: dict[str, Callable[[Floats, float], Floats]] = {
    "hard": lambda loss_N, threshold: np.where(np.isnan(loss_N), np.nan, loss_N < threshold),
    "linear": lambda loss_N, threshold: np.clip(1 - loss_N / max(threshold, 1e-300), 0.0, 1.0),
    "logistic": _logistic,
}
