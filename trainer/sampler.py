"""The curriculum sampler: plans windows of draws from fresh scores, by systematic sampling."""

import copy
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from shared.checkpoints import newest
from shared.errors import ConfigError, StateError, SteppeError
from shared.freshness import ABANDONED
from shared.score_store import ScoreReader
from shared.tracking import Tracker
from trainer.curriculum import Policy, Seen, find_policy, trust
from trainer.feed import NoScores, Scores, ScoreView

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
ScoreSource = Scores | ScoreReader | str | os.PathLike[str] | None

MAX_AGE_COUNTED = 4096
ROUNDING = 1e-9  # an expected count this close below a whole number is that number


@dataclasses.dataclass
class DrawCounts:
    """What the planned draws were worth, counted as they are planned. `age_counts[a]`: draws of age a versions."""

    fresh: int = 0
    stale: int = 0
    unscored: int = 0
    age_counts: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def total(self) -> int:
        return self.fresh + self.stale + self.unscored

    def count(self, age_B: npt.NDArray[np.int64], bound: int) -> None:
        scored = age_B[age_B >= 0]
        fresh = int((scored <= bound).sum())
        self.fresh += fresh
        self.stale += len(scored) - fresh
        self.unscored += len(age_B) - len(scored)
        dated = scored[scored < ABANDONED]  # what a resumed trainer left behind is stale and has no age
        counts = np.bincount(np.minimum(dated, MAX_AGE_COUNTED), minlength=len(self.age_counts))
        counts[: len(self.age_counts)] += self.age_counts
        self.age_counts = counts

    def age_quantile(self, q: float) -> int | None:
        """Quantile of the draws' ages in versions; None when none had one."""
        if not self.age_counts.sum():
            return None
        return int(np.searchsorted(np.cumsum(self.age_counts), max(q * self.age_counts.sum(), 1)))


class CurriculumSampler(Sampler[int]):
    """Draws N ids per epoch, in windows, each planned from one view of the scores.

    A window of W draws gives sample i an expected count W p_i / sum(p), p being the policy's weights, plus the credit
    left from earlier windows; systematic sampling draws it floor or ceil of that many times. So a uniform policy visits
    every sample exactly once an epoch.

    It never waits for scores: without them every sample is neutral. Ages are counted as of the end of the window: up to
    `lookahead_versions` may be published between planning and use (windows and prefetching included), so that no draw
    counts as fresh beyond the bound.

    Args:
        num_samples: N.
        scores: a `ScoreFeed`; or a `ScoreReader` or a score store's path, read when a window is planned; or None.
        policy: a `trainer.curriculum` policy or its name.
        form: "sampling", where the policy's weights are chances of being drawn; or "weighting", where every sample is
            drawn alike and `loss_weights` tells its weight by the window that is planned when it is asked.
        seed: of the draws.
        epochs: of the whole training, by which the policy's progress is told; None keeps progress at 0.
        windows_per_epoch: a window is N / windows_per_epoch draws.
        lookahead_versions: see above.

    `seconds` is the time spent planning, `draws` what was drawn.
    """

    def __init__(
        self,
        num_samples: int,
        scores: ScoreSource,
        policy: Policy | str = "soft",
        seed: int = 0,
        *,
        epochs: int | None = None,
        windows_per_epoch: int = 8,
        lookahead_versions: int = 0,
        form: Literal["sampling", "weighting"] = "sampling",
    ) -> None:
        if num_samples < 1:
            raise ConfigError(f"num_samples is {num_samples}; a sampler needs at least 1")
        if windows_per_epoch < 1 or lookahead_versions < 0 or (epochs is not None and epochs < 1):
            raise ConfigError(
                f"windows_per_epoch is {windows_per_epoch} (at least 1), lookahead_versions {lookahead_versions} "
                f"(at least 0), epochs {epochs} (at least 1, or None)"
            )
        if form not in ("sampling", "weighting"):
            raise ConfigError(f"form is {form!r}; it must be 'sampling' or 'weighting'")
        self.num_samples = num_samples
        self.policy = find_policy(policy, seed=seed) if isinstance(policy, str) else policy
        self._scores = _scores_of(scores, num_samples, self.policy)
        if (found := len(self._scores.view().model_version_N)) != num_samples:
            raise ConfigError(f"the scores are of {found} samples, the sampler of {num_samples}")
        self._epochs = epochs
        self._lookahead = lookahead_versions
        self._edges = [num_samples * i // windows_per_epoch for i in range(windows_per_epoch + 1)]
        self._rng = np.random.default_rng(seed)
        self._credit_N = np.zeros(num_samples)
        self._weight_N = np.ones(num_samples) if form == "weighting" else None
        self._epoch = 0
        self._position = 0  # draws handed out in this epoch
        self._window = np.zeros(0, dtype=np.int64)  # the planned ids, of which the first `taken` are handed out
        self._taken = 0
        self.draws = DrawCounts()
        self.seconds = 0.0

    def __len__(self) -> int:
        """Draws left in this epoch."""
        return self.num_samples - self._position

    @property
    def epoch(self) -> int:
        """The epoch that the next draw belongs to, from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """Draws of this epoch that are handed out."""
        return self._position

    @property
    def progress(self) -> float:
        """Share of the training's draws handed out, in [0, 1]."""
        if self._epochs is None:
            return 0.0
        return min((self._epoch + self._position / self.num_samples) / self._epochs, 1.0)

    def loss_weights(self, ids: npt.ArrayLike) -> Floats | None:
        """v_i of the samples `ids` (B,) in the weighting form, 1 on average over all; None in the sampling form."""
        return None if self._weight_N is None else self._weight_N[np.asarray(ids, dtype=np.int64)]

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`; nothing happens within it, so that a resumed epoch goes on.

        A jump forgets the rest of the window and all credit: the epoch begins as a first one does.
        """
        if epoch != self._epoch:
            self._epoch, self._position, self._taken = epoch, 0, 0
            self._window, self._credit_N = self._window[:0], np.zeros(self.num_samples)

    def __iter__(self) -> Iterator[int]:
        """The rest of this epoch; then the next one begins."""
        is_last = False
        while not is_last:
            if self._taken == len(self._window):
                self._window, self._taken = self._plan(), 0
            sample_id = int(self._window[self._taken])
            self._taken += 1
            self._position += 1
            is_last = self._position == self.num_samples
            if is_last:  # before it is handed out, so that a state taken after it begins the next epoch
                self._epoch, self._position = self._epoch + 1, 0
            yield sample_id

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the coming draws, given the scores, and what the draws so far were worth. No store
        version is pinned.

        It goes through `torch.save` and `torch.load` as it is.
        """
        return {
            "num_samples": self.num_samples,
            "epoch": self._epoch,
            "position": self._position,
            "window": torch.from_numpy(self._window[self._taken :].copy()),
            "credit": torch.from_numpy(self._credit_N.copy()),
            "weight": None if self._weight_N is None else torch.from_numpy(self._weight_N.copy()),
            "rng": copy.deepcopy(self._rng.bit_generator.state),
            "draws": dataclasses.asdict(self.draws) | {"age_counts": torch.from_numpy(self.draws.age_counts.copy())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for unknown or missing fields, by name, or another number of samples."""
        expected = {"num_samples", "epoch", "position", "window", "credit", "weight", "rng", "draws"}
        if state.keys() != expected:
            unknown, missing = sorted(state.keys() - expected), sorted(expected - state.keys())
            raise StateError(f"not a state of this sampler: unknown fields {unknown}, missing {missing}")
        if state["num_samples"] != self.num_samples:
            raise StateError(f"the state is of {state['num_samples']} samples, this sampler has {self.num_samples}")
        if (state["weight"] is None) != (self._weight_N is None):
            raise StateError("the state is of the other form, sampling or weighting; resume with the same")
        if len(state["credit"]) != self.num_samples or len(state["window"]) > self.num_samples - state["position"]:
            raise StateError("the state's credit, window and position do not fit together")
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._window, self._taken = torch.as_tensor(state["window"], dtype=torch.int64).clone().numpy(), 0
        self._credit_N = torch.as_tensor(state["credit"], dtype=torch.float64).clone().numpy()
        if state["weight"] is not None:
            self._weight_N = torch.as_tensor(state["weight"], dtype=torch.float64).clone().numpy()
        self._rng.bit_generator.state = copy.deepcopy(state["rng"])
        self.draws = DrawCounts(**state["draws"] | {"age_counts": state["draws"]["age_counts"].clone().numpy()})

    def _plan(self) -> npt.NDArray[np.int64]:
        """The ids of the window that begins at the current position, in random order."""
        began = time.perf_counter()
        view = self._scores.view()
        age_N = view.ages(self._scores.newest_version() + self._lookahead)
        unknown_N = np.full(self.num_samples, np.nan)
        seen = Seen(view.percentile_N, trust(age_N, view.bound), unknown_N if view.margin_N is None else view.margin_N)
        p_N = self.policy.weights(seen, self.progress)
        if self._weight_N is not None:
            self._weight_N, p_N = _of_mean_one(p_N), np.ones(self.num_samples)
        end = next(edge for edge in self._edges if edge > self._position)
        window, self._credit_N = draw(p_N, self._credit_N, end - self._position, self._rng)
        self.draws.count(age_N[window], view.bound)
        self.seconds += time.perf_counter() - began
        return window


def draw(
    p_N: npt.NDArray[np.float64], credit_N: npt.NDArray[np.float64], count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Systematic sampling of `count` ids with weights `p_N` and the credit of earlier draws.

    The expected count of i is e_i = count * p_i / sum(p) + credit_i. What was drawn ahead (e_i < 0) waits; every
    other is drawn floor(e_i) times, and once more with a chance in proportion to what is left of e_i. Sums are float64:
    a float32 sum leaves one in ten of 10 M samples unreachable.

    Returns: the ids (count,) in random order, and the new credit e_i - n_i, which sums to 0.

    Raises: ConfigError for weights that are negative, not finite or all 0.
    """
    total = _total(p_N)
    expected_N = p_N * (count / total) + credit_N
    due_N = np.maximum(expected_N, 0.0)
    drawn_N = np.floor(due_N + ROUNDING).astype(np.int64)
    rest = count - int(drawn_N.sum())
    if rest < 0:  # extreme weights: what was drawn ahead leaves less than the whole parts
        drawn_N, rest = np.zeros(len(p_N), dtype=np.int64), count
    order = rng.permutation(len(p_N))  # neighbours in systematic sampling exclude each other: let them be random ones
    cumulative = np.cumsum(np.maximum(due_N - drawn_N, 0.0)[order])
    points = (np.arange(rest) + rng.random()) * (cumulative[-1] / max(rest, 1))
    np.add.at(drawn_N, order[np.minimum(np.searchsorted(cumulative, points, side="right"), len(order) - 1)], 1)
    window = np.repeat(np.arange(len(p_N)), drawn_N)
    return rng.permutation(window), expected_N - drawn_N


def _total(p_N: Floats) -> float:
    """The sum of weights. Raises ConfigError for weights that are negative, not finite or all 0."""
    total = float(p_N.sum())
    if not (0 < total < np.inf and p_N.min() >= 0):
        raise ConfigError(
            f"a curriculum gave weights from {p_N.min()} to {p_N.max()}; they must be finite, from 0 up, and not all 0"
        )
    return total


def _of_mean_one(v_N: Floats) -> Floats:
    return v_N * (len(v_N) / _total(v_N))


def _scores_of(scores: ScoreSource, num_samples: int, policy: Policy) -> Scores:
    if scores is None:
        return NoScores(num_samples)
    if isinstance(scores, str | os.PathLike):
        scores = ScoreReader(scores)
    if not isinstance(scores, ScoreReader):
        if (measure := getattr(scores, "measure", policy.measure)) != policy.measure:
            raise ConfigError(
                f"the scores are by the measure {measure!r}, the policy wants {policy.measure!r}; give both one"
            )
        return scores
    return _ReaderScores(scores, Tracker(policy.measure, getattr(policy, "memory", None)))


class _ReaderScores:
    """Scores that come from elsewhere, read when a window is planned; while unreadable, the last view stands."""

    def __init__(self, reader: ScoreReader, tracker: Tracker) -> None:
        self._reader = ScoreReader(reader.uri)  # its own: whoever gave it may refresh theirs in the middle of a view
        self._tracker = tracker
        self._view = ScoreView.read(self._reader, self._tracker)

    def view(self) -> ScoreView:
        try:
            if self._reader.refresh() != self._view.store_version:
                self._view = ScoreView.read(self._reader, self._tracker)
        except (SteppeError, OSError) as error:
            logger.warning("scores cannot be read now, the last view stands: %s", error)
        return self._view

    def newest_version(self) -> int:
        """The newest checkpoint of the run that the store is part of; of a store alone, the newest scored version."""
        published = newest(self._reader.uri.parent)
        return max(self._view.newest_scored(), published.model_version if published else 0)
