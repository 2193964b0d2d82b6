"""The curriculum sampler: plans windows of draws from fresh scores, by systematic sampling."""

import copy
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from shared.catalogue import Run
from shared.checkpoints import newest
from shared.errors import ConfigError, StateError, SteppeError
from shared.freshness import ABANDONED
from shared.score_store import ScoreReader
from shared.storage import local_path
from shared.tracking import Tracker
from trainer.comm import ALONE, Comm
from trainer.curriculum import NUM_CLASSES, Policy, Seen, find_policy, trust
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

    @classmethod
    def of(cls, age_B: npt.NDArray[np.int64], bound: int) -> Self:
        """Of draws of these ages in versions, -1 where unscored."""
        scored = age_B[age_B >= 0]
        fresh = int((scored <= bound).sum())
        dated = scored[scored < ABANDONED]  # what a resumed trainer left behind is stale and has no age
        ages = np.bincount(np.minimum(dated, MAX_AGE_COUNTED))
        return cls(fresh, len(scored) - fresh, len(age_B) - len(scored), ages)

    def add(self, other: "DrawCounts") -> None:
        self.fresh += other.fresh
        self.stale += other.stale
        self.unscored += other.unscored
        ages = np.zeros(max(len(self.age_counts), len(other.age_counts)), dtype=np.int64)
        ages[: len(self.age_counts)] += self.age_counts
        ages[: len(other.age_counts)] += other.age_counts
        self.age_counts = ages

    @property
    def total(self) -> int:
        return self.fresh + self.stale + self.unscored

    def age_quantile(self, q: float) -> int | None:
        """Quantile of the draws' ages in versions; None when none had one."""
        if not self.age_counts.sum():
            return None
        return int(np.searchsorted(np.cumsum(self.age_counts), max(q * self.age_counts.sum(), 1)))


@dataclasses.dataclass(frozen=True)
class Window:
    """What was planned at once: the draws from `position` of `epoch` on, by the scores of `store_version`.

    `weight_N` are the loss's weights, None in the sampling form; `worth` is what the draws were worth.
    """

    epoch: int
    position: int
    store_version: int
    ids: npt.NDArray[np.int64]
    weight_N: Floats | None
    worth: DrawCounts


class CurriculumSampler(Sampler[int]):
    """Draws N ids per epoch, in windows, each planned from one view of the scores.

    A window of W draws gives sample i an expected count W p_i / sum(p), p being the policy's weights, plus the credit
    left from earlier windows; systematic sampling draws it floor or ceil of that many times. So a uniform policy visits
    every sample exactly once an epoch.

    With several ranks, rank 0 plans each window and tells the others; the draws are dealt out one by one, so that each
    *position* goes to exactly one rank. The state is the same whatever the number of ranks: taken where each has drawn
    its share of whole rounds, a training may go on with another number of them. Frameworks that deal batches out
    themselves (Accelerate, Hugging Face's Trainer) want the whole sequence at every rank: `is_sharded` off.

    It never waits for scores: without them every sample is neutral. Ages are counted as of the end of the window: up to
    `lookahead_versions` may be published between planning and use (windows and prefetching included), so that no draw
    counts as fresh beyond the bound.

    Args:
        num_samples: N.
        scores: a `ScoreFeed`; or a `ScoreReader` or a score store's path, read when a window is planned; or None.
        policy: a `trainer.curriculum` policy, as `find_policy` makes it, or the name of one with its default settings.
        form: "sampling", where the policy's weights are chances of being drawn; or "weighting", where every sample is
            drawn alike and `loss_weights` tells its weight by the window that is planned when it is asked.
        seed: of the draws.
        epochs: of the whole training, by which the policy's progress is told; None keeps progress at 0.
        windows_per_epoch: a window is N / windows_per_epoch draws.
        lookahead_versions: see above.
        comm: the ranks; scores, and what the draws were worth, are looked at by rank 0 alone.
        is_sharded: each rank draws its part; else each draws all.
        drop_last: leave out the last N modulo ranks draws of an epoch, so that all ranks draw as many.
        recorder: told of each window that is planned at rank 0 (`trainer.draws.DrawLog`).
        recorded: gives the windows instead of planning them, at rank 0 (`trainer.draws.Recorded`).
        num_classes: K, by which the guard of a policy that is named tells labels that are less likely than chance; by
            default that of the run whose scores these are, and where there is none, 10.

    `seconds` is the time spent planning, `draws` what was drawn, `dealt_to` the number of ranks that share the draws.
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
        comm: Comm = ALONE,
        is_sharded: bool = True,
        drop_last: bool = False,
        recorder: Callable[[Window], None] | None = None,
        recorded: Callable[[int, int], Window] | None = None,
        num_classes: int | None = None,
    ) -> None:
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("windows_per_epoch", windows_per_epoch, 1),
            ("lookahead_versions", lookahead_versions, 0),
            ("epochs", epochs, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, less than {least}", fix=f"set it to {least} or more", key=name)
        if form not in ("sampling", "weighting"):
            raise ConfigError(f"form is {form!r}", fix="set it to 'sampling' or 'weighting'", key="form")
        self.num_samples = num_samples
        if isinstance(policy, str):
            policy = find_policy(policy, seed=seed, num_classes=num_classes or _num_classes(scores))
        self.policy = policy
        self._scores = _scores_of(scores, num_samples, self.policy)
        if (found := len(self._scores.view().model_version_N)) != num_samples:
            raise ConfigError(
                f"the scores are of {found} samples, the sampler of {num_samples}",
                fix="give it scores of the same data",
                key="scores",
            )
        self._epochs = epochs
        self._lookahead = lookahead_versions
        self._edges = [num_samples * i // windows_per_epoch for i in range(windows_per_epoch + 1)]
        self._rng = np.random.default_rng(seed)
        self._credit_N = np.zeros(num_samples)
        self._weight_N = np.ones(num_samples) if form == "weighting" else None
        self._comm = comm
        self._rank, self.dealt_to = (comm.rank, comm.world_size) if is_sharded else (0, 1)
        self._drop_last = drop_last
        self._recorder, self._recorded = recorder, recorded
        self._epoch = 0
        self._position = 0  # draws of all ranks handed out in this epoch
        self._window = np.zeros(0, dtype=np.int64)  # the planned ids, of which the first `taken` are handed out
        self._taken = 0
        self._past: list[npt.NDArray[np.int64]] = []  # the windows of the epoch that was drawn from last, this one too
        self._past_from = 0  # the position that the first of them begins at
        self.draws = DrawCounts()
        self.seconds = 0.0

    def __len__(self) -> int:
        """Draws left for this rank in this epoch."""
        rounds, rest = divmod(self.num_samples - self._position, self.dealt_to)
        return rounds + (self._rank < rest and not self._drop_last)

    @property
    def epoch(self) -> int:
        """The epoch that the next draw belongs to, from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """Draws of this epoch that are handed out, to all ranks."""
        return self._position

    @property
    def progress(self) -> float:
        """Share of the training's draws handed out, in [0, 1]."""
        return self._progress_at(self._position)

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
            self._past, self._past_from = [], 0

    def __iter__(self) -> Iterator[int]:
        """This rank's part of the rest of this epoch; then the next one begins."""
        rank, dealt_to = self._rank, self.dealt_to
        end = self.num_samples - self.num_samples % dealt_to if self._drop_last else self.num_samples
        is_last = False
        while not is_last:
            ids = self._take(min(dealt_to, self.num_samples - self._position))
            self._position += len(ids)
            if self._position == end < self.num_samples:
                self._position += len(self._take(self.num_samples - end))
            is_last = self._position == self.num_samples
            if is_last:  # before it is handed out, so that a state taken after it begins the next epoch
                self._epoch, self._position = self._epoch + 1, 0
            if rank < len(ids):
                yield ids[rank]

    def _progress_at(self, position: int) -> float:
        if self._epochs is None:
            return 0.0
        return min((self._epoch + position / self.num_samples) / self._epochs, 1.0)

    def _take(self, count: int) -> list[int]:
        """The next ids; the windows that they are of are planned as they are reached."""
        ids: list[int] = []
        while len(ids) < count:
            if self._taken == len(self._window):
                position = self._position + len(ids)
                self._window, self._taken = self._plan(position), 0
                if not position or not self._past:
                    self._past, self._past_from = [], position
                self._past.append(self._window)
            part = self._window[self._taken : self._taken + count - len(ids)]
            self._taken += len(part)
            ids += part.tolist()
        return ids

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Everything that decides the coming draws, given the scores, and what the draws so far were worth. No store
        version is pinned.

        It goes through `torch.save` and `torch.load` as it is.

        Args:
            consumed: draws of the epoch last drawn from, all ranks' together, that were trained on, where that is less
                than was handed out: a DataLoader with workers is W * prefetch_factor batches ahead. 0 is the state that
                the epoch begins with, for frameworks that pass over the first batches themselves.

        Raises: StateError when so many were not handed out, or are not remembered since a state was loaded.
        """
        epoch, position, window = self._epoch, self._position, self._window[self._taken :]
        if consumed is not None:
            epoch, position, window = self._rewound(consumed)
        return {
            "num_samples": self.num_samples,
            "epoch": epoch,
            "position": position,
            "window": torch.from_numpy(window.copy()),
            "credit": torch.from_numpy(self._credit_N.copy()),
            "weight": None if self._weight_N is None else torch.from_numpy(self._weight_N.copy()),
            "rng": copy.deepcopy(self._rng.bit_generator.state),
            "draws": dataclasses.asdict(self.draws) | {"age_counts": torch.from_numpy(self.draws.age_counts.copy())},
        }

    def _rewound(self, consumed: int) -> tuple[int, int, npt.NDArray[np.int64]]:
        """Epoch, position and the planned rest of it when `consumed` draws of the epoch last drawn from are used."""
        is_over = self._position == 0 and len(self._past) > 0
        handed_out = self.num_samples if is_over else self._position
        if not self._past_from <= consumed <= handed_out:
            raise StateError(
                f"consumed is {consumed}, but of this epoch {handed_out} draws were handed out, and those from "
                f"{self._past_from} on are remembered",
                fix=f"give a number from {self._past_from} to {handed_out}",
                key="consumed",
            )
        if consumed == self.num_samples:
            return self._epoch, 0, self._window[:0]
        planned = np.concatenate(self._past) if self._past else self._window
        return self._epoch - is_over, consumed, planned[consumed - self._past_from :]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for unknown or missing fields, by name, or another number of samples."""
        expected = {"num_samples", "epoch", "position", "window", "credit", "weight", "rng", "draws"}
        if state.keys() != expected:
            unknown, missing = sorted(state.keys() - expected), sorted(expected - state.keys())
            raise StateError(
                f"not a state of this sampler: unknown fields {unknown}, missing {missing}",
                fix="resume with the version of steppe that saved it",
                key=(unknown + missing)[0],
            )
        if state["num_samples"] != self.num_samples:
            raise StateError(
                f"the state is of {state['num_samples']} samples, this sampler has {self.num_samples}",
                fix="resume with the same data",
                key="num_samples",
            )
        if (state["weight"] is None) != (self._weight_N is None):
            theirs, ours = ("sampling", "weighting") if state["weight"] is None else ("weighting", "sampling")
            raise StateError(
                f"the state is of the form {theirs}, this sampler has {ours}", fix="resume with the same", key="form"
            )
        if len(state["credit"]) != self.num_samples or len(state["window"]) > self.num_samples - state["position"]:
            raise StateError(
                "the state's credit, window and position do not fit together",
                fix="resume from another state",
                key="window",
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._window, self._taken = torch.as_tensor(state["window"], dtype=torch.int64).clone().numpy(), 0
        self._past, self._past_from = ([self._window] if len(self._window) else []), self._position
        self._credit_N = torch.as_tensor(state["credit"], dtype=torch.float64).clone().numpy()
        if state["weight"] is not None:
            self._weight_N = torch.as_tensor(state["weight"], dtype=torch.float64).clone().numpy()
        self._rng.bit_generator.state = copy.deepcopy(state["rng"])
        self.draws = DrawCounts(**state["draws"] | {"age_counts": state["draws"]["age_counts"].clone().numpy()})

    def _plan(self, position: int) -> npt.NDArray[np.int64]:
        """The ids of the window that begins at `position` of the epoch, in random order: rank 0's, at every rank."""
        count = next(edge for edge in self._edges if edge > position) - position
        ids = self._plan_here(position, count) if self._comm.rank == 0 else np.empty(count, dtype=np.int64)
        self._comm.broadcast(torch.from_numpy(ids))
        if self._weight_N is not None:
            self._comm.broadcast(torch.from_numpy(self._weight_N))
        return ids

    def _plan_here(self, position: int, count: int) -> npt.NDArray[np.int64]:
        began = time.perf_counter()
        if self._recorded is not None:
            window = self._recorded(self._epoch, position)
            if window.weight_N is not None:
                self._weight_N = window.weight_N
        else:
            window = self._window_of(position, count)
        self.draws.add(window.worth)
        if self._recorder is not None:
            self._recorder(window)
        self.seconds += time.perf_counter() - began
        return window.ids

    def _window_of(self, position: int, count: int) -> Window:
        view = self._scores.view()
        age_N = view.ages(self._scores.newest_version() + self._lookahead)
        unknown_N = np.full(self.num_samples, np.nan)
        seen = Seen(view.percentile_N, trust(age_N, view.bound), unknown_N if view.margin_N is None else view.margin_N)
        p_N = self.policy.weights(seen, self._progress_at(position))
        if self._weight_N is not None:
            self._weight_N, p_N = _of_mean_one(p_N), np.ones(self.num_samples)
        ids, self._credit_N = draw(p_N, self._credit_N, count, self._rng)
        worth = DrawCounts.of(age_N[ids], view.bound)
        return Window(self._epoch, position, view.store_version, ids, self._weight_N, worth)


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
            f"a curriculum gave weights from {p_N.min()} to {p_N.max()}",
            fix="let its policy give finite ones, from 0 up, and not all 0",
            key="policy",
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
                f"the scores are by the measure {measure!r}, the policy wants {policy.measure!r}",
                fix="give both the same one",
                key="measure",
            )
        return scores
    return _ReaderScores(scores, Tracker(policy.measure, getattr(policy, "memory", None)))


def _num_classes(scores: ScoreSource) -> int:
    """Of the run that the scores belong to, if there is one."""
    folder: Path | None = getattr(scores, "run_path", None)
    if isinstance(scores, str | os.PathLike):
        folder = local_path(scores).parent
    elif isinstance(scores, ScoreReader):
        folder = scores.uri.parent
    return Run(folder).num_classes if folder and (folder / "run.json").exists() else NUM_CLASSES


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
