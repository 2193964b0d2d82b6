"""What is known of a run's difficulty at one moment, from its files alone; and how that follows the run.

A `View` never changes: an answer that is made of one view belongs to one store version and one newest checkpoint.
`Difficulty` gives the newest one. While one thread makes the next, the others answer from the one before, as long as
that was the newest a moment ago.
"""

import collections
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.attempts import Ranges, abandoned
from shared.attempts import count as count_attempts
from shared.beside import Beside
from shared.catalogue import Run
from shared.checkpoints import newest
from shared.errors import DataError, NoSuchVersion, RunError, StoreCorrupt, StoreError, StoreMismatch
from shared.events import EventFollower
from shared.freshness import ABANDONED, Status, age_versions, staleness_bound
from shared.measures import find_measure
from shared.score_store import ScoreReader
from shared.store_view import column_array
from shared.tracking import Tracker

LOOK_EVERY_S = 0.025  # no more often than this is looked whether there is something new
WAIT_AFTER_S = 0.25  # answers come from views that were the newest so long ago at most
KEPT_VIEWS = 4  # that cursors speak of; older ones are made anew from the store
KEPT_ANSWERS = 8  # such as orders of all samples, of one view
DEFAULT_MEASURE = "adm"
STATUSES = [status.value for status in Status]
FRESH, STALE, UNSCORED = (np.int8(STATUSES.index(status)) for status in (Status.FRESH, Status.STALE, Status.UNSCORED))

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Answer = TypeVar("Answer")


class Moment(NamedTuple):
    """What an answer belongs to: which store, which of its versions, and by what its scores are judged."""

    store: str
    store_version: int
    newest_version: int
    newest_step: int
    bound: int
    abandoned: Ranges


class Samples:
    """What a run's catalogue says of its samples. Row i is sample i."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.label_N: Ids = column_array(table, "label")
        self._getters = {name: _getter(table.column(name).combine_chunks()) for name in table.column_names}

    def about(self, sample_id: int) -> dict[str, Any]:
        """key, label, clean_label and domain of one sample."""
        return {name: get(sample_id) for name, get in self._getters.items()}

    def check(self, sample_id: int) -> None:
        """Raises DataError for an id outside 0..N-1."""
        if not 0 <= sample_id < self.table.num_rows:
            raise DataError(
                f"sample_id {sample_id} is outside 0..{self.table.num_rows - 1}",
                fix="ask for one of these",
                key="sample_id",
            )

    def is_of_domain(self, domain: str) -> npt.NDArray[np.bool_]:
        """Shape [N]."""
        is_it: npt.NDArray[np.bool_] = np.asarray(pc.fill_null(pc.equal(self.table.column("domain"), domain), False))
        return is_it


def _getter(column: pa.Array) -> Callable[[int], Any]:
    """The quickest way to one value."""
    if column.null_count == len(column):
        return lambda _: None
    if pa.types.is_integer(column.type) and not column.null_count:
        read: Callable[[int], Any] = column.to_numpy().item
        return read
    if pa.types.is_string(column.type) and not column.null_count:
        offsets, text = np.frombuffer(column.buffers()[1], np.int32)[column.offset :], column.buffers()[2].to_pybytes()
        return lambda place: text[offsets.item(place) : offsets.item(place + 1)].decode()
    return lambda place: column[place].as_py()


class Scores:
    """The columns of one store version by sample_id, made when first asked for. Shapes: N samples."""

    def __init__(self, reader: ScoreReader, measure: Callable[[ScoreReader, str], tuple[Floats, Floats]]) -> None:
        self.reader = reader
        self._measure = measure
        self._measured: dict[str, tuple[Floats, Floats]] = {}
        self.asked: set[str] = set()

    def measured(self, name: str) -> tuple[Floats, Floats]:
        """Value and percentile; NaN where unscored. Raises ConfigError for an unknown measure."""
        self.prepare(name)
        self.asked.add(name)
        return self._measured[name]

    def prepare(self, name: str) -> None:
        if name not in self._measured:
            self._measured[name] = self._measure(self.reader, name)

    def is_prepared(self, name: str) -> bool:
        return name in self._measured

    @functools.cached_property
    def model_version_N(self) -> Ids:
        return self.reader.dense("model_version")

    @functools.cached_property
    def scored_at_N(self) -> Floats:
        """Seconds since 1970; NaN where unscored."""
        return seconds(self.reader.dense("scored_at"))


def seconds(time_N: npt.NDArray[np.datetime64]) -> Floats:
    """Since 1970; NaN where there is no time."""
    return np.where(np.isnat(time_N), np.nan, time_N.astype(np.int64) / 1e6)


@dataclasses.dataclass(frozen=True)
class View:
    """A run's scores and what judges them, at one moment. Never changes.

    `newest_version` and `newest_step` are of the newest checkpoint, 0 before the first; `bound` is the age in versions
    beyond which a score is stale.
    """

    run: Run
    samples: Samples
    reader: ScoreReader  # stays at its version
    scores: Scores
    moment: Moment
    attempts: int
    _answers: "collections.OrderedDict[Hashable, Any]" = dataclasses.field(default_factory=collections.OrderedDict)
    _age_of: dict[int, int] = dataclasses.field(default_factory=dict)
    _heads: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def store(self) -> str:
        """Which store, as it lies there; also for another process."""
        return self.moment.store.partition(":")[0]

    @property
    def newest_version(self) -> int:
        return self.moment.newest_version

    @property
    def newest_step(self) -> int:
        return self.moment.newest_step

    @property
    def bound(self) -> int:
        return self.moment.bound

    @property
    def abandoned(self) -> Ranges:
        return self.moment.abandoned

    def head(self, measure: str) -> dict[str, Any]:
        """What stands in every answer. Raises ConfigError for an unknown measure."""
        if (head := self._heads.get(measure)) is None:
            head = self._heads[measure] = {
                "measure": measure,
                "meaning": f"higher is more difficult: {find_measure(measure).meaning}",
                "store_version": self.reader.version,
                "newest_model_version": self.newest_version,
                "staleness_bound": self.bound,
            }
        return head.copy()

    @functools.cached_property
    def age_N(self) -> Ids:
        """In versions; -1 where unscored, ABANDONED where the training went on without the version."""
        return self.ages(self.scores.model_version_N)

    @functools.cached_property
    def status_N(self) -> npt.NDArray[np.int8]:
        """As places in STATUSES."""
        return self.statuses(self.age_N)

    def ages(self, model_version_B: Ids) -> Ids:
        """As `age_N`, of samples that were scored at these versions; -1 for -1."""
        return age_versions(model_version_B, self.newest_version, self.abandoned)

    def statuses(self, age_B: Ids) -> npt.NDArray[np.int8]:
        """As `status_N`, of scores of these ages."""
        return np.where(age_B < 0, UNSCORED, np.where(age_B <= self.bound, FRESH, STALE))

    def age_of(self, model_version: int) -> int:
        """As `age_N` of a sample that was scored at this version."""
        age = self._age_of.get(model_version)
        if age is None:
            age = int(self.ages(np.array([model_version]))[0])
            self._age_of[model_version] = age
        return age

    def status_of(self, model_version: int) -> str:
        return Status.FRESH.value if self.age_of(model_version) <= self.bound else Status.STALE.value

    def dated(self, age: Any) -> Any:
        """Whether scores of these ages have any: they are scored, and not of an abandoned version."""
        return (age >= 0) & (age < ABANDONED)

    def remembered(self, key: Hashable, make: Callable[[], Answer]) -> Answer:
        """What `make` gives, kept for the next one who asks this view for it."""
        answer: Answer | None = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = make()
            while len(self._answers) > KEPT_ANSWERS:
                self._answers.popitem(last=False)
        return answer


class Difficulty:
    """Gives the newest view of a run.

    Measures over versions (`instability`) count from when they were first asked for.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._reader: ScoreReader | None = None
        self._opened, self._opened_file = 0, ""
        self._view: View | None = None
        self._look_began = self._looked_at = -math.inf
        self._beside = Beside(1)
        self._refreshing, self._is_followed = threading.Lock(), False
        self._measuring = threading.Lock()
        self._trackers: dict[str, Tracker] = {}
        self._keeping = threading.Lock()
        self._kept: collections.OrderedDict[Moment, View] = collections.OrderedDict()
        self._diary = EventFollower(run.path)
        self._epoch: dict[str, Any] | None = None
        self._reading_diary = threading.Lock()

    @functools.cached_property
    def samples(self) -> Samples:
        """Raises RunError when they cannot be read."""
        table = self.run.samples()
        if table.num_rows != self.run.num_samples:
            path = self.run.path / "samples.arrow"
            raise RunError(
                f"{path} has {table.num_rows} samples of {self.run.num_samples}",
                fix="bring it back from a copy",
                key=str(path),
            )
        return Samples(table)

    def at_hand(self) -> View | None:
        """For an event loop: the view to answer from without waiting, be it for a file. One caller sees to the next.

        None where there is none that was the newest within WAIT_AFTER_S: then callers are to wait for `follow`.
        """
        looked_s, view = time.monotonic() - self._looked_at, self._view  # in this order: the view is made first
        if looked_s >= WAIT_AFTER_S:
            return None
        if looked_s >= LOOK_EVERY_S and not self._is_followed:
            self._is_followed = True
            self._beside(self.follow)
        return view

    def view(self) -> View:
        """The newest view; the one before while another caller makes that, if it was the newest within WAIT_AFTER_S.

        Raises: StoreError while no score store is there or when it cannot be read; RunError likewise of the samples.
        """
        looked_s, view = time.monotonic() - self._looked_at, self._view  # in this order: the view is made first
        if view is not None and (looked_s < LOOK_EVERY_S or (looked_s < WAIT_AFTER_S and self._is_followed)):
            return view
        return self.follow()

    def follow(self) -> View:
        """The newest view, made where need be: those who wait for the same look share it. Raises as `view` does."""
        asked_at = time.monotonic()
        self._is_followed = True
        try:
            with self._refreshing:
                view = self._view
                if view is not None and asked_at < self._look_began <= self._looked_at:
                    return view
                self._look_began = time.monotonic()
                if view is None or not self._is_newest(view):
                    view = self._view = self._refreshed(view)
                self._looked_at = time.monotonic()
                return view
        finally:
            self._is_followed = False

    def view_at(self, moment: Moment) -> View:
        """A view that an earlier answer belongs to. Raises NoSuchVersion when that is gone, or never was."""
        view = self.view()
        if view.moment == moment:
            return view
        if (kept := self._kept.get(moment)) is not None:
            return kept
        now = view.moment
        if moment.store != now.store or (moment.newest_version, moment.newest_step) > (
            now.newest_version,
            now.newest_step,
        ):
            raise NoSuchVersion(
                "the cursor is of another score store than the one that is there now",
                fix="ask without one for the first page",
                key="cursor",
            )
        reader = view.reader.pinned(moment.store_version)
        then = View(self.run, view.samples, reader, Scores(reader, self._measure_alone), moment, view.attempts)
        self.keep(then)
        return then

    def keep(self, view: View) -> None:
        """For those who will ask for this very view."""
        with self._keeping:
            self._kept[view.moment] = view
            self._kept.move_to_end(view.moment)
            while len(self._kept) > KEPT_VIEWS:
                self._kept.popitem(last=False)

    def missing(self) -> str | None:
        """What keeps difficulty from being asked for; None when nothing does."""
        try:
            view = self.view()
        except (StoreError, RunError) as error:
            return str(error)
        return None if view.reader.version else "no scores are committed yet"

    def last_epoch(self) -> dict[str, Any] | None:
        """The last epoch of the training that ended: epoch, step, steps, loss, accuracy; None before the first."""
        with self._reading_diary:
            for event in self._diary.new():
                if event["event"] == "epoch":
                    self._epoch = {key: value for key, value in event.items() if key not in ("event", "time")}
            return self._epoch

    def _is_newest(self, view: View) -> bool:
        try:
            checkpoint = newest(self.run.path)
            return (
                (checkpoint.model_version if checkpoint else 0) == view.newest_version
                and count_attempts(self.run.path) == view.attempts
                and self._identity() == view.moment.store
                and view.reader.is_newest()
            )
        except (OSError, StoreError):  # whoever makes the next view finds out
            return False

    def _refreshed(self, before: View | None) -> View:
        """Raises StoreError, or RunError for what else of the run cannot be read."""
        try:
            reader, attempts = self._follow(), count_attempts(self.run.path)
            checkpoint = newest(self.run.path)
            moment = Moment(
                self._identity(),
                reader.version,
                checkpoint.model_version if checkpoint else 0,
                checkpoint.step if checkpoint else 0,
                staleness_bound(reader.metadata),
                abandoned(self.run.path),
            )
            samples = self.samples
        except OSError as error:
            raise RunError(
                f"cannot read {error.filename}: {error.strerror}",
                fix="bring the run's files back",
                key=str(error.filename),
            ) from error
        if before is not None and before.moment[:2] == moment[:2]:
            scores = before.scores
        else:
            scores = Scores(reader, self._measure)
            for name in {DEFAULT_MEASURE} | (before.scores.asked if before else set()):
                scores.prepare(name)
        return View(self.run, samples, reader, scores, moment, attempts)

    def _follow(self) -> ScoreReader:
        """At the newest version, where it stays. A store that has taken the place of another is opened anew."""
        file, reader = self._file(), self._reader
        if reader is not None and file == self._opened_file:
            try:
                reader.refresh()
            except StoreCorrupt:  # or an older copy was put in place
                reader = None
        if reader is None or file != self._opened_file:
            self._reader, self._opened_file, self._trackers = None, file, {}
            self._reader = reader = ScoreReader(self.run.scores_uri)
            self._opened += 1
        if reader.num_samples != self.run.num_samples:
            raise StoreMismatch(
                f"{reader.uri} holds scores of {reader.num_samples} samples, the run has {self.run.num_samples}",
                fix="bring back the store of this run",
                key=str(reader.uri),
            )
        return reader.pinned()

    def _identity(self) -> str:
        """Of the store that is there. Another one in its place has another, also a copy of it."""
        return f"{self._file()}:{self._opened}"

    def _file(self) -> str:
        """Of the store's description, which is written once."""
        try:
            found = (self.run.scores_uri / "store.json").stat()
        except OSError:  # the reader tells what is wrong
            return ""
        return f"{found.st_ino:x}-{found.st_ctime_ns:x}"

    def _measure(self, reader: ScoreReader, name: str) -> tuple[Floats, Floats]:
        with self._measuring:
            if self._reader is None or reader.version < self._reader.version:
                return self._measure_alone(reader, name)
            tracker = self._trackers.get(name) or self._trackers.setdefault(name, Tracker(name))
            return tracker.update(reader)

    def _measure_alone(self, reader: ScoreReader, name: str) -> tuple[Floats, Floats]:
        """Of an earlier version. Raises NoSuchVersion for a measure over versions: what was seen then is gone."""
        if find_measure(name).over_versions:
            fix = "begin anew, without a cursor"
            raise NoSuchVersion(f"{name} is of the newest version alone", fix=fix, key="measure")
        return Tracker(name).update(reader)
