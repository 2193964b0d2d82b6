"""The score feed: a background thread that keeps an immutable view of the newest scores for the sampler.

The trainer never waits for it: until there are scores, and whenever the store cannot be read, the last view stands.
"""

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.attempts import Ranges, abandoned
from shared.checkpoints import newest
from shared.errors import StoreMismatch
from shared.freshness import ABANDONED, DEFAULT_BOUND_VERSIONS, age_versions, staleness_bound
from shared.score_store import ScoreReader
from shared.storage import local_path
from shared.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ScoreView:
    """Scores of one store version. Arrays of length N are read-only and never change.

    `percentile_N` is of one measure, NaN where that is unknown; `model_version_N` is -1 where unscored; `bound` is the
    staleness bound in versions; `abandoned` are the versions that a resumed trainer left behind; `margin_N` is the
    logit margin, NaN where unscored, for curricula that look at losses whatever their measure.
    """

    store_version: int
    percentile_N: npt.NDArray[np.float64]
    model_version_N: npt.NDArray[np.int64]
    bound: int
    abandoned: Ranges = ()
    margin_N: npt.NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, num_samples: int) -> "ScoreView":
        return cls(0, np.full(num_samples, np.nan), np.full(num_samples, -1), DEFAULT_BOUND_VERSIONS).frozen()

    @classmethod
    def read(cls, reader: ScoreReader, tracker: Tracker) -> "ScoreView":
        """The view of the reader's version, by the measure of `tracker`, which is brought up to it."""
        _, percentile_N = tracker.update(reader)
        return cls(
            reader.version,
            percentile_N,
            reader.dense("model_version"),
            staleness_bound(reader.metadata),
            abandoned(reader.uri.parent),
            reader.dense("margin"),
        ).frozen()

    def frozen(self) -> "ScoreView":
        for array_N in (self.percentile_N, self.model_version_N, self.margin_N):
            if array_N is not None:
                array_N.flags.writeable = False
        return self

    def ages(self, newest_version: int) -> npt.NDArray[np.int64]:
        """Age of each score in versions (`shared.freshness.age_versions`)."""
        return age_versions(self.model_version_N, newest_version, self.abandoned)

    def newest_scored(self) -> int:
        """The newest model_version among the scores; -1 when there is none."""
        return int(self.model_version_N.max())

    def fresh_share_and_median_age(self, newest_version: int) -> tuple[float, float | None]:
        """Share of all samples whose score is fresh, and the median age in versions of those that have one."""
        age_N = self.ages(newest_version)
        dated = age_N[(age_N >= 0) & (age_N < ABANDONED)]
        fresh = float(((age_N >= 0) & (age_N <= self.bound)).mean())
        return fresh, float(np.median(dated)) if len(dated) else None


class Scores(Protocol):
    """Where the sampler finds scores: the feed below, or scores that a test or a script made."""

    def view(self) -> ScoreView:
        """The newest view, at once."""
        ...

    def newest_version(self) -> int:
        """The newest published model_version, against which ages count."""
        ...


class NoScores:
    """Every sample neutral, for ever."""

    def __init__(self, num_samples: int) -> None:
        self._view = ScoreView.empty(num_samples)

    def view(self) -> ScoreView:
        return self._view

    def newest_version(self) -> int:
        return 0


class ScoreFeed:
    """Follows a run's score store from a background thread.

    Args:
        uri: the run folder. Its score store need not be there yet.
        measure: whose percentiles the views carry.
        memory: how far percentiles are averaged over a sample's scorings (`shared.tracking.Tracker`); what it remembers
            is not saved: after a resume it begins anew.
        newest_version: where the trainer publishes itself, its publisher's newest version; else the checkpoint feed is
            read in the background.

    `failures` counts refreshes that failed; `first_seen` holds, for each model_version that was once the newest of a
    view, when that view came (time.monotonic).
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        num_samples: int,
        measure: str = "adm",
        *,
        memory: float | None = None,
        refresh_interval_s: float = 0.5,
        newest_version: Callable[[], int] | None = None,
    ) -> None:
        self.measure = measure
        self._tracker = Tracker(measure, memory)
        self.run_path = local_path(uri)
        self._refresh_interval_s = refresh_interval_s
        self._published = newest_version
        self._seen_version = 0
        self._view = ScoreView.empty(num_samples)
        self._reader: ScoreReader | None = None
        self._refreshing = threading.Lock()
        self.failures = 0
        self.first_seen: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="score feed", daemon=True)
        self._thread.start()

    def view(self) -> ScoreView:
        return self._view

    def newest_version(self) -> int:
        return self._published() if self._published else self._seen_version

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "ScoreFeed":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def refresh(self) -> None:
        """Read what is new, now. The thread calls this all the time; anyone else may too."""
        with self._refreshing:
            try:
                self._refresh()
            except BaseException:
                self._reader = None  # a repaired store is read afresh
                raise

    def _refresh(self) -> None:
        if self._published is None and (checkpoint := newest(self.run_path)):
            self._seen_version = max(self._seen_version, checkpoint.model_version)
        if self._reader is None:
            if not (self.run_path / "scores" / "store.json").exists():
                return
            reader = ScoreReader(self.run_path / "scores")
            if reader.num_samples != len(self._view.model_version_N):
                raise StoreMismatch(
                    f"{reader.uri} holds scores of {reader.num_samples} samples, not {len(self._view.model_version_N)}",
                    fix="bring back the store of this run",
                    key=str(reader.uri),
                )
            self._reader = reader
        if self._reader.refresh() != self._view.store_version:
            self._view = view = ScoreView.read(self._reader, self._tracker)
            self.first_seen.setdefault(view.newest_scored(), time.monotonic())

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.refresh()
            except Exception as error:  # whatever is wrong with the files, the trainer goes on and the feed tries again
                self.failures += 1
                level = logging.WARNING if self.failures == 1 else logging.DEBUG
                logger.log(level, "scores cannot be read now, the last view stands: %s", error)
            self._stop.wait(self._refresh_interval_s)
