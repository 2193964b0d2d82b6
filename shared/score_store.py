"""The score store: an append-only folder of Arrow files that one writer extends and any number of readers follow.

Format 1, in full (`<store>` is a run's `scores/`):

    store.json              {"format": 1, "num_samples": N, "scoring_id": "..."}; written once
    fragments/*.arrow       Arrow IPC files, SCORE_SCHEMA: the rows of one commit, in any order
    snapshots/*.arrow       Arrow IPC files, SNAPSHOT_SCHEMA: the latest row of each scored sample, sorted by sample_id
    manifests/<generation>.json   what the store holds; the newest generation counts

A *manifest* names one snapshot (or none) and the fragments committed after it, with their lengths and SHA-256 sums, and
carries its own checksum. Its *version* counts commits of rows; its *generation* counts manifests: a commit makes a new
version, a takeover or a compaction a new generation of the same version. A manifest is created only if its
generation is absent (link), after everything that it names is durable. That one operation is the commit, and the fence:
a successor's first act is to create the next generation, so that the old writer's next manifest finds its place taken.
Manifests of takeovers are kept for ever for that reason; of the others, those that time travel needs. Files that no
such manifest names do not exist for readers; they are removed when they are older than a minute.

The *latest row* of a sample is that of the highest model_version, of equal ones that of the later commit.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import secrets
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import DataError, Fenced, StoreCorrupt, StoreError, StoreMismatch
from shared.schema import SCORE_SCHEMA
from shared.store_files import Manifest, StoreFiles
from shared.store_view import StoreView, column_array

logger = logging.getLogger(__name__)

COMPACT_AFTER_FRAGMENTS = 64

Uri = str | os.PathLike[str]


class ScoreWriter:
    """The store's one writer. Opening it takes the store over at once: an older writer's next commit raises Fenced.

    Threads may append while one commits. Appending a sample's latest row again changes nothing.

    Args:
        uri: the store's folder; created when missing.
        num_samples: N; sample ids are 0..N-1.
        scoring_id: what makes rows comparable; a store has one.
        keep_versions: how many of the latest store versions stay readable by `ScoreReader.table(version)`.

    Raises: StoreMismatch for a store of another size, scoring_id or a newer format; ConfigError for a remote URI.
    """

    def __init__(self, uri: Uri, num_samples: int, *, scoring_id: str = "", keep_versions: int = 256) -> None:
        if num_samples < 1:
            raise StoreMismatch(f"num_samples is {num_samples}; a score store needs at least 1")
        self._store = StoreFiles(uri)
        self._store.create(num_samples, scoring_id)
        self.num_samples = num_samples
        self._keep_versions = keep_versions
        self._token = secrets.token_hex(8)
        self._pending: list[pa.Table] = []
        self._in_flight: list[pa.Table] = []  # of a commit that failed half-way: still pending, or visible after all
        self._pending_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._state = "open"
        self._unsure = False  # a manifest write failed half-way: it may be there or not
        self._manifest = self._take_over()
        self._reader = ScoreReader(uri)
        self._latest_version_N = self._reader.dense("model_version")

    @property
    def version(self) -> int:
        return self._manifest.version

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the last commit with `metadata` said."""
        return self._manifest.metadata

    @property
    def rows(self) -> int:
        """Rows committed in the store's whole life."""
        return self._manifest.rows

    def append(self, table: pa.Table | pa.RecordBatch) -> None:
        """Add score rows, any ids in any order, to the next commit. Raises StoreMismatch for rows that do not fit."""
        rows = _conform(table, self.num_samples)
        with self._pending_lock:
            self._check_open(appending=True)
            if rows.num_rows:
                self._pending.append(rows)

    def commit(self, metadata: Mapping[str, Any] | None = None) -> int:
        """Make all appended rows visible and durable; returns the store version.

        Without new rows the version stays; new `metadata` is written all the same.

        Raises Fenced when another writer took over. After an OSError the rows are still pending: commit again.
        """
        with self._commit_lock:
            self._check_open()
            self._settle()
            with self._pending_lock:
                pending, self._pending = self._pending, []
            self._in_flight = pending
            try:
                rows = self._without_known(pa.concat_tables(pending)) if pending else SCORE_SCHEMA.empty_table()
                if rows.num_rows:
                    self._commit(rows, metadata)
                elif metadata is not None and dict(metadata) != self._manifest.metadata:
                    self._advance(metadata=dict(metadata))
            except BaseException:
                with self._pending_lock:
                    self._pending = pending + self._pending
                raise
            if len(self._manifest.fragments) >= COMPACT_AFTER_FRAGMENTS:
                try:
                    self._compact()
                except (OSError, StoreError) as error:  # the rows are committed; compaction is tried again next time
                    logger.warning("the score store could not be compacted now: %s", error)
            return self._manifest.version

    def compact(self) -> None:
        """Fold snapshot and fragments into one snapshot and remove what no kept version needs. No new version."""
        with self._commit_lock:
            self._check_open()
            self._settle()
            self._compact()

    def close(self) -> None:
        """Commit what is pending and end. Twice is fine. After an OSError the writer is still open."""
        with self._pending_lock:
            if self._state != "open":
                return
            self._state = "closing"
        try:
            self.commit()
        except OSError:
            self._state = "open"
            raise
        self._state = "closed"

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self, appending: bool = False) -> None:
        if self._state == "closed" or (appending and self._state == "closing"):
            raise StoreError("this ScoreWriter is closed; open a new one")
        if self._state == "fenced":
            raise Fenced(f"another writer took over {self._store.path}; this one can commit no more")

    def _take_over(self) -> Manifest:
        while True:
            last = self._store.newest()
            if last is None:
                manifest = Manifest(1, 0, self._token, _now(), 0, None, (), {}, takes_over=True)
            else:
                generation = last.generation + 1
                manifest = dataclasses.replace(last, generation=generation, writer=self._token, takes_over=True)
            if self._store.write_manifest(manifest):
                return manifest

    def _commit(self, rows: pa.Table, metadata: Mapping[str, Any] | None) -> None:
        version = self._manifest.version + 1
        part = self._store.write_part("fragments", f"{version:012d}-{self._token}", rows, version)
        self._advance(
            version=version,
            committed_at=_now(),
            rows=self._manifest.rows + rows.num_rows,
            fragments=(*self._manifest.fragments, part),
            metadata=dict(self._manifest.metadata if metadata is None else metadata),
        )
        ids = column_array(rows, "sample_id")
        np.maximum.at(self._latest_version_N, ids, column_array(rows, "model_version"))

    def _advance(self, **changes: Any) -> None:
        manifest = dataclasses.replace(
            self._manifest, generation=self._manifest.generation + 1, takes_over=False, **changes
        )
        self._unsure = True
        created = self._store.write_manifest(manifest)
        self._unsure = False
        if not created:
            self._state = "fenced"
            self._check_open()
        self._manifest = manifest

    def _settle(self) -> None:
        """After a failed manifest write: was it made after all? Then go on from it, and its rows are not pending."""
        if not self._unsure:
            return
        made = self._store.read_manifest(self._manifest.generation + 1)
        if made is not None and made.writer == self._token:
            if made.version > self._manifest.version:
                with self._pending_lock:
                    del self._pending[: len(self._in_flight)]
            self._manifest = made
            self._reader.refresh()
            self._latest_version_N = self._reader.dense("model_version")
        self._unsure = False

    def _without_known(self, rows: pa.Table) -> pa.Table:
        """Drop rows that are a sample's latest already, to the last bit: a scorer may send a block twice."""
        ids, versions = column_array(rows, "sample_id"), column_array(rows, "model_version")
        suspects = np.flatnonzero(self._latest_version_N[ids] == versions)
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

    def _compact(self) -> None:
        version = self._manifest.version
        if self._manifest.fragments:
            self._reader.refresh()
            part = self._store.write_part(
                "snapshots", f"{version:012d}-{self._token}", self._reader.snapshot(), version
            )
            self._advance(snapshot=part, fragments=())
        self._store.collect(oldest_version=version - self._keep_versions)


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
        """The writer's notes at this version, such as the measured length of a scoring pass."""
        return self._view.manifest.metadata if self._view.manifest else {}

    @property
    def rows(self) -> int:
        """Rows committed in the store's whole life up to this version."""
        return self._view.manifest.rows if self._view.manifest else 0

    @property
    def committed_at(self) -> datetime.datetime | None:
        """When this version was committed (UTC)."""
        manifest = self._view.manifest
        return datetime.datetime.fromisoformat(manifest.committed_at) if manifest and manifest.version else None

    def refresh(self) -> int:
        """Move on to the newest version and return it; reads only what changed."""
        with self._refresh_lock:
            for attempt in range(5):
                manifest = self._store.newest(self._view.manifest)
                try:
                    self._view = self._view.advance(self._store, manifest)
                except FileNotFoundError as error:
                    # Compacted and collected between reading the manifest and opening its files: a newer one is there.
                    if attempt == 4:
                        raise StoreCorrupt(f"{error.filename} is named by a manifest and missing") from error
                else:
                    break
            return self._view.version

    def table(self, version: int | None = None) -> pa.Table:
        """The latest row of each scored sample, sorted by sample_id, at `version` (default: this reader's).

        Raises StoreError for a version that is not there yet or no longer kept.
        """
        view = self._view
        if version is not None and version != view.version:
            view = self._at(version)
        return view.latest().select(SCORE_SCHEMA.names)

    def snapshot(self) -> pa.Table:
        """As `table()`, with `store_version`: the commit that brought each row."""
        return self._view.latest()

    def lookup(self, ids: npt.ArrayLike) -> pa.Table:
        """The latest rows of `ids`, in the order asked, repeats included; all but sample_id null where unscored.

        Raises DataError for an id outside 0..N-1.
        """
        wanted = np.asarray(ids).reshape(-1)
        if len(wanted) and wanted.dtype.kind not in "iu":
            raise DataError(f"sample ids are {wanted.dtype}; they must be integers in 0..{self.num_samples - 1}")
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.num_samples):
            wrong = wanted[(wanted < 0) | (wanted >= self.num_samples)][0]
            raise DataError(f"sample_id {wrong} is outside 0..{self.num_samples - 1}")
        return self._view.rows_of(wanted.astype(np.int64)).select(SCORE_SCHEMA.names)

    def changes(self, since: int) -> pa.Table:
        """The latest rows of samples whose latest row came after store version `since`, sorted by sample_id."""
        latest = self._view.changed(since)
        return latest.select(SCORE_SCHEMA.names)

    def dense(self, column: str) -> npt.NDArray[Any]:
        """One column as an array of length N indexed by sample_id.

        Where unscored: NaN for floats, -1 for integers and for booleans (as int8), NaT for times.
        """
        return self._view.dense(column)

    def _at(self, version: int) -> StoreView:
        if not 0 <= version <= self._view.version:
            raise StoreError(f"version {version} is not there; this reader is at version {self._view.version}")
        for generation in reversed(self._store.generations()):
            manifest = self._store.read_manifest(generation)
            if manifest is not None and manifest.base_version <= version <= manifest.version:
                kept = tuple(part for part in manifest.fragments if part.version <= version)
                then = dataclasses.replace(manifest, version=version, fragments=kept)
                with contextlib.suppress(FileNotFoundError):
                    return StoreView.empty(self.num_samples).advance(self._store, then)
        raise StoreError(f"version {version} is no longer kept; raise keep_versions to keep more")


def _conform(table: pa.Table | pa.RecordBatch, num_samples: int) -> pa.Table:
    rows = pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table
    if sorted(rows.column_names) != sorted(SCORE_SCHEMA.names):
        names = rows.column_names
        missing, extra = set(SCORE_SCHEMA.names) - set(names), set(names) - set(SCORE_SCHEMA.names)
        twice = {name for name in names if names.count(name) > 1}
        raise StoreMismatch(
            f"score rows lack columns {sorted(missing)}, have unknown ones {sorted(extra)}, some twice {sorted(twice)}"
        )
    try:
        rows = rows.select(SCORE_SCHEMA.names).cast(SCORE_SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StoreMismatch(f"score rows do not fit SCORE_SCHEMA: {error}") from error
    for name in SCORE_SCHEMA.names:
        if rows.column(name).null_count:
            raise StoreMismatch(f"column {name} has {rows.column(name).null_count} nulls; score rows have none")
    ids = column_array(rows, "sample_id")
    if len(ids) and (ids.min() < 0 or ids.max() >= num_samples):
        raise StoreMismatch(f"sample ids {ids.min()}..{ids.max()} do not fit 0..{num_samples - 1}")
    if len(ids) and column_array(rows, "model_version").min() < 0:
        raise StoreMismatch("model_version is below 0")
    return rows


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()
