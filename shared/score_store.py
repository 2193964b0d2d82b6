"""The score store: an append-only folder of Arrow files that one writer extends and any number of readers follow.

Format 2, in full (`<store>` is a run's `scores/`):

    store.json                    {"format": 2, "num_samples": N, "scoring_id": "...", "xxh3_128": "..."}, written once,
                                  before all else; the checksum is that of the text "2 N ...", the values before it
    manifests/<generation>.json   what the store holds, 12 digits; the highest generation counts
    fragments/<24 hex>.arrow      Arrow IPC file, SCORE_SCHEMA: the rows of one commit, in any order
    snapshots/<24 hex>.arrow      Arrow IPC file, SNAPSHOT_SCHEMA: the latest row of each scored sample, by sample_id
    unneeded.json                 the writers' notes of what they found unneeded and when; nobody else reads them

Columns are in the schema's order and have no nulls; sample ids lie in 0..N-1; any number of record batches. Files
called .draft-<16 hex>, and fragments and snapshots that no manifest names (whole, torn or empty), are made ready, are
being written or were left by a crash: readers pass over them, as over any other name.

**A manifest** has two lines: a JSON object, and the checksum (XXH3, 128 bits, in hex) of its bytes. The object has
these keys and no others; new ones come with a new format:

    format, generation            this format; as in the file's name
    version, rows                 number of commits of rows so far, 0 before the first; and of their rows
    writer, committed_at          which writer's; when this version was committed (ISO 8601, UTC)
    snapshot, fragments           {name, rows, bytes, xxh3_128, version} or null; a list of such, by rising version;
                                  xxh3_128 is the checksum of the file, bytes its length
    earlier                       [{generation, first, last}]: kept manifests, each for versions first..last
    metadata                      an object of the writer's

The store at this version is the snapshot (which holds all up to its own `version`) and the fragments (each the rows of
the commit `version`), folded: of a sample's rows that of the highest model_version counts, of equal ones that of the
later commit, within a commit the later row. In snapshots `store_version` is the commit that brought the row. Version v
of the past is the newest manifest without the fragments above v, if its snapshot is not above v; else the same of any
kept manifest with first <= v <= last. Several may be: they agree.

**What makes a version visible**: a manifest appears under its final name, whole, only if its generation was free (link;
on an object store put-if-absent), and after all that it names is durable. That one operation is the commit, and the
fence: a successor's first act is to create the next generation. An older writer then finds its next place taken, or,
if that manifest was removed in the meantime, a higher generation beside its own, which therefore does not count.

**What a reader may assume**: files that a manifest names never change. The highest generation of a listing was the
highest when the listing began, or came later; when its file is gone before it is read, a higher one is there: list
again. A named file that is missing was collected, then a higher generation is there that does not name it; else the
store is damaged or half copied. Where fragments or snapshots are, a manifest has been. Lengths and Arrow's footers tell
torn files; what else can be wrong, the checksums tell.

**What a writer must leave**: only the writer of the newest generation removes files, and but for manifests superseded
long ago it looks that it still is that after it has listed them. It leaves what the newest manifest and the kept ones
name, the last 8 superseded manifests, whatever was found unneeded within a grace period, for readers that are about to
open it, and all that has another name than those above.

A store of another format is refused with a message that says which, and nothing in it is touched. There is no append to
a file and no lock, and only unneeded.json is ever written anew: a store on an object store needs nothing else.
"""

import contextlib
import copy
import dataclasses
import datetime
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from shared.errors import ConfigError, DataError, Fenced, NoSuchVersion, StoreCorrupt, StoreError, StoreMismatch
from shared.schema import SCORE_SCHEMA
from shared.store_files import FRAGMENTS, SNAPSHOTS, Anchor, Manifest, NewPart, StoreFiles
from shared.store_view import StoreView, column_array, last_rows, rows_with

logger = logging.getLogger(__name__)

COMPACT_AFTER_FRAGMENTS = 64  # when they hold this share of the snapshot's rows, or in any case
COMPACT_AT_SHARE = 0.25
COMPACT_AFTER_MOST_FRAGMENTS = 256
COMPACT_AFTER_ROWS = 1 << 16  # in fragments, or this many of each sample if that is more
COMPACT_AFTER_SCORINGS = 2
MOST_DEBT = 4.0  # so often what makes a compaction due: then commits wait for it
GRACE_S = 60.0  # a reader may still be opening what a manifest of this age names

Uri = str | os.PathLike[str]
Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which store versions stay readable by `ScoreReader.table(version)`; the newest always does.

    The price is room: each compaction whose versions are kept leaves its snapshot and fragments on the disk.

    Args:
        keep_last: so many before the newest.
        keep_every: the multiples of this; 0 keeps none for that.
        keep_all: everything.
    """

    keep_last: int = 256
    keep_every: int = 0
    keep_all: bool = False

    def __post_init__(self) -> None:
        for key, value in (("keep_last", self.keep_last), ("keep_every", self.keep_every)):
            if value < 0:
                raise ConfigError(f"{key} is {value}", fix="set it to 0 or more", key=key)

    def keeps(self, first: int, end: int, newest: int) -> bool:
        """Whether any of the versions first..end-1 is kept."""
        multiple = -(-max(first, 1) // self.keep_every) * self.keep_every if self.keep_every else end
        return self.keep_all or max(newest - self.keep_last, first) < end or multiple < end

    def kept(self, anchors: Sequence[Anchor], base_version: int, newest: int) -> tuple[Anchor, ...]:
        """Those without which a kept version could not be read; the newest manifest reads from `base_version` on."""
        ends = [*(anchor.first for anchor in anchors), base_version][1:]
        return tuple(
            anchor
            for anchor, end in zip(anchors, ends, strict=True)
            if self.keeps(anchor.first, min(end, anchor.last + 1), newest)
        )


class ScoreWriter:
    """The store's one writer. Opening it takes the store over at once: an older writer's next commit raises Fenced.

    Threads may append while one commits. Appending a sample's latest row again changes nothing. Fragments are folded
    into a snapshot by a thread of the writer's, beside the commits.

    Args:
        uri: the store's folder; created when missing.
        num_samples: N; sample ids are 0..N-1.
        scoring_id: what makes rows comparable; a store has one.
        retention: which versions stay readable.
        grace_s: how long files stay that nothing names any more, for readers and successors that are about to open.

    Raises: StoreMismatch for a store of another size, scoring_id or format; ConfigError for a remote URI.
    """

    def __init__(
        self,
        uri: Uri,
        num_samples: int,
        *,
        scoring_id: str = "",
        retention: Retention = Retention(),
        grace_s: float = GRACE_S,
    ) -> None:
        if num_samples < 1:
            raise StoreMismatch(f"num_samples is {num_samples}", fix="set it to 1 or more", key="num_samples")
        self._store = StoreFiles(uri)
        self.num_samples = int(num_samples)
        self._store.create(self.num_samples, scoring_id)
        self._retention, self._grace_s = retention, grace_s
        self._token, self._process = secrets.token_hex(8), os.getpid()
        self._pending: list[pa.Table] = []
        self._pending_lock = threading.Lock()
        self._turn_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._compaction_lock = threading.Lock()
        self._compactor: threading.Thread | None = None
        self._due = 1.0  # the debt at which the next compaction begins
        self._needs_room = False
        self._state = "open"
        self._doubt: _Doubt | None = None
        self._reader = ScoreReader(uri)  # what cannot be read is not taken over
        self._manifest = self._take_over()
        self._reader.refresh()
        self._latest_version_N = self._reader.dense("model_version")

    @property
    def version(self) -> int:
        return self._manifest.version

    @property
    def snapshot_version(self) -> int:
        """The version that the snapshot holds; 0 before the first."""
        return self._manifest.base_version

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the last commit with `metadata` said."""
        return copy.deepcopy(self._manifest.metadata)

    @property
    def rows(self) -> int:
        """Rows committed in the store's whole life."""
        return self._manifest.rows

    def append(self, table: pa.Table | pa.RecordBatch) -> None:
        """Add score rows, any ids in any order, to the next commit. Raises StoreMismatch for rows that do not fit."""
        self._check_process()
        rows = _conform(table, self.num_samples)
        with self._pending_lock:
            self._check_open(appending=True)
            if rows.num_rows:
                self._pending.append(rows)

    def commit(self, metadata: Mapping[str, Any] | None = None) -> int:
        """Make all appended rows visible and durable; returns the store version.

        Without new rows the version stays; new `metadata` is written all the same. Where compaction falls far behind,
        this waits for it, so that a store can always be opened soon.

        Raises Fenced when another writer took over. After an OSError the rows are still pending: commit again.
        """
        notes = (
            None if metadata is None else orjson.loads(orjson.dumps(dict(metadata), option=orjson.OPT_SERIALIZE_NUMPY))
        )
        with self._turn():
            self._make_room()
            with self._pending_lock:
                pending, self._pending = self._pending, []
            try:
                if not (pending and self._commit(pending, notes)) and notes not in (None, self._manifest.metadata):
                    self._advance(metadata=notes)
            except BaseException as error:
                self._needs_room = isinstance(error, OSError)
                with self._pending_lock:
                    self._pending = pending + self._pending
                raise
            self._needs_room = False
            version, debt = self._manifest.version, self._debt()
            compactor = self._compacting() if debt >= self._due else None
        if compactor is not None and debt >= MOST_DEBT:
            compactor.join()
        return version

    def compact(self) -> None:
        """Fold snapshot and fragments into one snapshot, and remove what nothing needs. No new version.

        It removes first: that makes room where a disk is full, and comes to it also where lives end in their fold.
        """
        self._check_process()
        with self._compaction_lock:
            with self._turn():
                with contextlib.suppress(OSError, StoreCorrupt):  # of an earlier version, which may be let go next
                    self._collect()
                self._retain()
                self._collect()
                manifest = self._manifest
            if manifest.fragments:
                snapshot = self._fold(manifest)
                with self._turn():
                    self._replace_by(snapshot)
                    self._collect()
            self._due = 1.0

    def close(self) -> None:
        """Commit what is pending, wait for a compaction that goes on, and end. Twice is fine.

        After an error other than Fenced the writer is still open.
        """
        self._check_process()
        with self._pending_lock:
            if self._state == "fenced":
                self._store.close()
            if self._state != "open":
                return
            self._state = "closing"
        try:
            self.commit()
        except Fenced:
            self._store.close()
            raise
        except BaseException:
            self._state = "open"
            raise
        if self._compactor is not None:
            self._compactor.join()
        self._state = "closed"
        self._store.close()

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_process(self) -> None:
        """Before any lock: after a fork nobody may be there who gives it back."""
        if os.getpid() != self._process:
            wrong = f"this ScoreWriter belongs to process {self._process}, and this is a fork of it"
            raise StoreError(wrong, fix="open another one here", key=str(self._store.path))

    def _check_open(self, appending: bool = False) -> None:
        if self._state == "closed" or (appending and self._state == "closing"):
            raise StoreError("this ScoreWriter is closed", fix="open a new one", key=str(self._store.path))
        if self._state == "fenced":
            self._fence()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """To write manifests. Who waits comes next: a writer that commits without pause lets its compaction pass."""
        self._check_process()
        with self._turn_lock:
            self._commit_lock.acquire()
        try:
            with self._fenced_when_missing():
                self._check_open()
                self._settle()
                yield
        finally:
            self._commit_lock.release()

    @contextlib.contextmanager
    def _fenced_when_missing(self) -> Iterator[None]:
        """A successor removes what it does not need, also what this writer reads or is writing."""
        try:
            yield
        except FileNotFoundError:
            self._newest()
            raise

    def _fence(self) -> NoReturn:
        self._state = "fenced"
        raise Fenced(
            f"another writer took over {self._store.path}, so that this one can commit no more",
            fix="open a new one to take it back",
            key=str(self._store.path),
        )

    def _take_over(self) -> Manifest:
        while True:
            last = self._store.newest()
            if last is None:
                manifest = Manifest(1, 0, self._token, _now(), 0, None, (), (), {})
            else:
                manifest = dataclasses.replace(last, generation=last.generation + 1, writer=self._token)
            try:
                if self._store.write_manifest(manifest) and self._store.newest(manifest) is manifest:
                    return manifest
            except FileNotFoundError:  # others went on, and removed what was the newest; or collected this one's draft
                if self._store.newest(last) is last:
                    raise

    def _commit(self, pending: Sequence[pa.Table], notes: Mapping[str, Any] | None) -> bool:
        """Whether there was a row that is not known yet."""
        version = self._manifest.version + 1
        everything = pa.concat_tables(pending)
        fragment = self._store.begin_part(FRAGMENTS, everything, version)  # almost always all are new
        rows = self._without_known(everything)
        if rows.num_rows < everything.num_rows:
            fragment.give_up()
            if not rows.num_rows:
                return False
            fragment = self._store.begin_part(FRAGMENTS, rows, version)
        self._advance(
            _Doubt(len(pending), fragment),
            version=version,
            committed_at=_now(),
            rows=self._manifest.rows + rows.num_rows,
            fragments=(*self._manifest.fragments, fragment.part()),
            metadata=self._manifest.metadata if notes is None else notes,
        )
        return True

    def _advance(self, doubt: "_Doubt | None" = None, **changes: Any) -> None:
        """Write the next manifest. Until that has worked it may be there or not: `_settle` finds out."""
        manifest = dataclasses.replace(self._manifest, generation=self._manifest.generation + 1, **changes)
        self._doubt = doubt or _Doubt()
        is_free = self._store.write_manifest(manifest, self._doubt.part)
        if not is_free:
            self._doubt.give_up()  # else a successor may have gone on from it
        if not is_free or self._store.newest(manifest) is not manifest:
            self._fence()
        self._manifest, self._doubt = manifest, None
        self._store.prepare(manifest)

    def _newest(self) -> Manifest:
        """Raises Fenced when it is another writer's."""
        newest = self._store.newest(self._manifest)
        if newest is None or newest.writer != self._token:
            self._fence()
        return newest

    def _settle(self) -> None:
        """After a failed manifest write: was it made after all? Then go on from it, and its rows are not pending."""
        if self._doubt is None:
            return
        found = self._newest()
        doubt, is_made = self._doubt, found is not self._manifest
        if is_made:
            self._store.sync_manifests()  # that it can be read does not say that it would survive a power cut
        self._reader.refresh()
        self._latest_version_N = self._reader.dense("model_version")
        self._manifest, self._doubt = found, None
        if is_made:
            with self._pending_lock:
                del self._pending[: doubt.tables]
        else:
            doubt.give_up()

    def _without_known(self, rows: pa.Table) -> pa.Table:
        """Drop rows that are a sample's latest already, to the last bit: a scorer may send a block twice."""
        ids, versions = column_array(rows, "sample_id"), column_array(rows, "model_version")
        latest = self._latest_version_N[ids]
        suspects = np.flatnonzero(latest == versions)
        if len(versions) and versions.min() == versions.max():
            self._latest_version_N[ids] = np.maximum(latest, versions)
        else:
            np.maximum.at(self._latest_version_N, ids, versions)
        if not len(suspects):
            return rows
        self._reader.refresh()
        known = self._reader.lookup(ids[suspects])
        same = np.ones(len(suspects), dtype=bool)
        for name in SCORE_SCHEMA.names:
            new, old = column_array(rows, name)[suspects], column_array(known, name)
            equal = new == old
            if new.dtype.kind == "f":
                equal |= np.isnan(new) & np.isnan(old)
            same &= equal
        keep = np.ones(len(ids), dtype=bool)
        # A known row that comes with a different one of the same version must stay, to be the later of the two.
        keep[suspects] = np.isin(ids[suspects], ids[suspects][~same])
        return rows.filter(pa.array(keep))

    def _debt(self) -> float:
        """How much there is to compact; 1 when it is due."""
        fragments, snapshot = self._manifest.fragments, self._manifest.snapshot
        rows = sum(part.rows for part in fragments)
        is_share = rows >= COMPACT_AT_SHARE * (snapshot.rows if snapshot else 0)
        return max(
            len(fragments) / (COMPACT_AFTER_FRAGMENTS if is_share else COMPACT_AFTER_MOST_FRAGMENTS),
            rows / max(COMPACT_AFTER_ROWS, COMPACT_AFTER_SCORINGS * self.num_samples),
        )

    def _compacting(self) -> threading.Thread | None:
        """The compaction that goes on, or a new one; None when no thread can be started."""
        if self._compactor is None or not self._compactor.is_alive():
            compactor = threading.Thread(target=self._compact_quietly, name="compactor", daemon=True)
            try:
                compactor.start()
            except RuntimeError as error:  # the commit is made
                logger.warning("the score store could not be compacted now: %s", error)
                return None
            self._compactor = compactor
        return self._compactor

    def _compact_quietly(self) -> None:
        try:
            self.compact()
        except (OSError, StoreError) as error:  # the rows are committed, and each try may read all of the store
            self._due = self._debt() + 1
            logger.warning("the score store could not be compacted now: %s", error)

    def _fold(self, manifest: Manifest) -> NewPart:
        """A durable snapshot of the manifest's version, which nothing names yet.

        Raises StoreCorrupt for a file that does not match its checksum: the snapshot would get a good one.
        """
        with self._fenced_when_missing():
            for kind, part in manifest.parts():
                self._store.check_part(kind, part)
            view = StoreView.empty(self.num_samples).advance(self._store, manifest)
            snapshot = self._store.begin_part(SNAPSHOTS, view.latest(), manifest.version)
            snapshot.wait()
            return snapshot

    def _replace_by(self, snapshot: NewPart) -> None:
        """The snapshot in place of what it holds; what was before stays readable as far as retention says."""
        before, part = self._manifest, snapshot.part()
        self._advance(
            _Doubt(part=snapshot),
            snapshot=part,
            fragments=tuple(fragment for fragment in before.fragments if fragment.version > part.version),
            earlier=self._retention.kept((*before.earlier, before.anchor), part.version, before.version),
        )

    def _retain(self) -> None:
        """Let go of earlier versions that are not kept any more."""
        now = self._manifest
        earlier = self._retention.kept(now.earlier, now.base_version, now.version)
        if earlier != now.earlier:
            self._advance(earlier=earlier)

    def _make_room(self) -> None:
        """After a commit that failed, perhaps on a full disk: remove what nothing needs.

        Not while a compaction goes on, which does so too: what it is writing is not named yet.
        """
        if self._needs_room and self._compaction_lock.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError, StoreCorrupt):
                    self._collect()
            finally:
                self._compaction_lock.release()

    def _collect(self) -> None:
        if not self._store.collect(self._manifest, self._grace_s):
            self._fence()


@dataclasses.dataclass(frozen=True)
class _Doubt:
    """A manifest that may be there or not: of how many pending tables it brings the rows, and the part made for it."""

    tables: int = 0
    part: NewPart | None = None

    def give_up(self) -> None:
        if self.part is not None:
            self.part.give_up()


class ScoreReader:
    """Follows a score store. Never waits for the writer; every answer belongs to one whole version.

    Safe to use from several threads: `refresh` swaps one immutable view for the next. Files are memory-mapped: keep a
    store on a local disk.

    Raises: StoreError when there is no store at `uri`; StoreCorrupt, naming the file, when one is torn or missing.
    """

    def __init__(self, uri: Uri) -> None:
        self._store = StoreFiles(uri)
        self.uri = self._store.path
        description = self._store.describe()
        self.num_samples: int = description["num_samples"]
        self.scoring_id: str = description["scoring_id"]
        self._view = StoreView.empty(self.num_samples)
        self._refresh_lock = threading.Lock()
        self.refresh()

    @property
    def version(self) -> int:
        """The store version that this reader answers from."""
        return self._view.version

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The writer's notes, such as how long a scoring pass took; of an earlier version perhaps newer ones."""
        return copy.deepcopy(self._view.manifest.metadata) if self._view.manifest else {}

    @property
    def rows(self) -> int:
        """Rows committed in the store's whole life up to this version."""
        return self._view.manifest.rows if self._view.manifest else 0

    @property
    def committed_at(self) -> datetime.datetime | None:
        """When this version was committed (UTC); None of an earlier one, unless it was the last before a compaction."""
        manifest = self._view.manifest
        if not manifest or not manifest.version or not manifest.committed_at:
            return None
        return datetime.datetime.fromisoformat(manifest.committed_at)

    def refresh(self) -> int:
        """Move on to the newest version and return it; reads only what changed."""
        with self._refresh_lock:
            while True:
                manifest = self._store.newest(self._view.manifest)
                try:
                    self._view = self._view.advance(self._store, manifest)
                except FileNotFoundError as error:
                    # Compacted and collected between reading the manifest and opening its files: a newer one is there.
                    if self._store.newest(manifest) is manifest:
                        raise StoreCorrupt.of(error.filename, "is named by a manifest and missing") from error
                else:
                    return self._view.version

    def is_newest(self) -> bool:
        """Whether `refresh` would find nothing new. Raises as it does."""
        return self._store.newest(self._view.manifest) is self._view.manifest

    def pinned(self, version: int | None = None) -> "ScoreReader":
        """Another reader, at `version` (default: this one's), of the files that this one has open.

        Raises NoSuchVersion for one that is not there yet or no longer kept.
        """
        other = copy.copy(self)
        other._view = self._at(version)
        other._refresh_lock = threading.Lock()
        return other

    def table(self, version: int | None = None) -> pa.Table:
        """The latest row of each scored sample, sorted by sample_id, at `version` (default: this reader's).

        Raises NoSuchVersion for one that is not there yet or no longer kept.
        """
        return self._at(version).latest().select(SCORE_SCHEMA.names)

    def snapshot(self, since: int = 0) -> pa.Table:
        """As `table()`, or `changes(since)`, with `store_version`: the commit that brought each row."""
        return self._view.changed(since)

    def row(self, sample_id: int) -> dict[str, Any] | None:
        """The latest row of one sample by column, `scored_at` in microseconds since 1970; None where unscored.

        The quickest way to one row. Raises DataError for an id outside 0..N-1.
        """
        self._check_id(sample_id)
        return self._view.row_of(sample_id)

    def lookup(self, ids: npt.ArrayLike) -> pa.Table:
        """The latest rows of `ids`, in the order asked, repeats included; all but sample_id null where unscored.

        Raises DataError for an id outside 0..N-1.
        """
        wanted = np.asarray(ids).reshape(-1)
        self.check_ids(wanted)
        return self._view.rows_of(wanted.astype(np.int64)).select(SCORE_SCHEMA.names)

    def changes(self, since: int) -> pa.Table:
        """The latest rows of samples whose latest row came after store version `since`, sorted by sample_id."""
        latest = self._view.changed(since)
        return latest.select(SCORE_SCHEMA.names)

    def values(self, ids: npt.NDArray[np.int64], columns: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Of each column the latest values of `ids` (B,), in the order asked; where unscored as in `dense`.

        Raises DataError for an id outside 0..N-1.
        """
        self.check_ids(ids)
        return self._view.values_of(ids, columns)

    def _check_id(self, sample_id: int) -> None:
        if not isinstance(sample_id, int | np.integer) or not 0 <= sample_id < self.num_samples:
            raise self._no_sample(sample_id)

    def _no_sample(self, sample_id: object) -> DataError:
        wrong = f"sample_id {sample_id!r} is outside 0..{self.num_samples - 1}"
        return DataError(wrong, fix="ask for one inside", key="sample_id")

    def check_ids(self, wanted: npt.NDArray[Any]) -> None:
        """Raises DataError for an id outside 0..N-1."""
        if len(wanted) and wanted.dtype.kind not in "iu":
            fix = f"give integers in 0..{self.num_samples - 1}"
            raise DataError(f"sample ids are {wanted.dtype}", fix=fix, key="sample_id")
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.num_samples):
            raise self._no_sample(int(wanted[(wanted < 0) | (wanted >= self.num_samples)][0]))

    def dense(self, column: str) -> npt.NDArray[Any]:
        """One column as an array of length N indexed by sample_id.

        Where unscored: NaN for floats, -1 for integers and for booleans (as int8), NaT for times.
        """
        return self._view.dense(column)

    def history(self, sample_id: int) -> pa.Table:
        """All rows of one sample that are still kept, one per model_version, oldest first. SNAPSHOT_SCHEMA.

        Raises DataError for an id outside 0..N-1.
        """
        self._check_id(sample_id)
        view = self._view
        known, found = set(view.parts()), [view.rows_ever_of(sample_id)]

        def read(manifest: Manifest) -> list[pa.Table]:
            tables = [self._store.read_part(kind, part) for kind, part in set(manifest.parts()) - known]
            known.update(manifest.parts())
            return [rows_with(table, sample_id) for table in tables]

        for newest, anchor in view.earlier():
            found += self._of_kept(anchor, newest, read) or []
        rows = pa.concat_tables(found)
        *_, kept = last_rows(column_array(rows, "model_version"), column_array(rows, "store_version"))
        return rows.take(pa.array(kept))

    def _at(self, version: int | None) -> StoreView:
        view = self._view
        if version is None or version == view.version:
            return view
        if not 0 <= version <= view.version:
            wrong = f"version {version} is not there: the newest that was read is version {view.version}"
            raise NoSuchVersion(wrong, fix="refresh, or ask for an earlier one", key="version")
        if version >= view.base_version:
            return view.at(version)

        def read(manifest: Manifest) -> StoreView:
            return StoreView.empty(self.num_samples).advance(self._store, manifest).at(version)

        for newest, anchor in view.earlier():
            if anchor.first <= version <= anchor.last and (then := self._of_kept(anchor, newest, read)) is not None:
                return then
        fix = "raise keep_last or keep_every to keep more"
        raise NoSuchVersion(f"version {version} is no longer kept", fix=fix, key="version")

    def _of_kept(self, anchor: Anchor, newest: Manifest, read: Callable[[Manifest], Answer]) -> Answer | None:
        """What `read` makes of an earlier manifest; None when it is not kept any more.

        Raises StoreCorrupt, naming the file, when one of its files is missing.
        """
        manifest = self._store.read_kept(anchor, newest)
        if manifest is None:
            return None
        try:
            return read(manifest)
        except FileNotFoundError as error:
            if self._store.read_kept(anchor, newest) is None:
                return None
            raise StoreCorrupt.of(error.filename, "is named by a manifest and missing") from error


def _conform(table: pa.Table | pa.RecordBatch, num_samples: int) -> pa.Table:
    rows = pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table
    if rows.schema != SCORE_SCHEMA:
        rows = _cast(rows)
    for field, column in zip(SCORE_SCHEMA, rows.columns, strict=True):
        if column.null_count:
            wrong = f"column {field.name} has {column.null_count} nulls"
            raise StoreMismatch(wrong, fix="give every score row a value", key=field.name)
    ids = column_array(rows, "sample_id")
    if len(ids) and (ids.min() < 0 or ids.max() >= num_samples):
        wrong = f"sample ids {ids.min()}..{ids.max()} do not fit 0..{num_samples - 1}"
        raise StoreMismatch(wrong, fix="append rows of these samples only", key="sample_id")
    if len(ids) and (lowest := column_array(rows, "model_version").min()) < 0:
        raise StoreMismatch(f"model_version is {lowest}", fix="set it to 0 or more", key="model_version")
    return rows


def _cast(rows: pa.Table) -> pa.Table:
    names = rows.column_names
    if sorted(names) != sorted(SCORE_SCHEMA.names):
        missing, extra = set(SCORE_SCHEMA.names) - set(names), set(names) - set(SCORE_SCHEMA.names)
        twice = {name for name in names if names.count(name) > 1}
        raise StoreMismatch(
            f"score rows lack columns {sorted(missing)}, have unknown ones {sorted(extra)}, some twice {sorted(twice)}",
            fix="give the columns of SCORE_SCHEMA, each once",
            key=min(missing | extra | twice),
        )
    columns = []
    for field in SCORE_SCHEMA:
        try:
            columns.append(rows.column(field.name).cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            wrong = f"column {field.name} does not fit SCORE_SCHEMA: {error}"
            raise StoreMismatch(wrong, fix=f"give it as {field.type}", key=field.name) from error
    return pa.table(columns, schema=SCORE_SCHEMA)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()
