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
Files that no manifest names do not exist for readers; they are removed later.

The *latest row* of a sample is that of the highest model_version, of equal ones that of the later commit.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import DataError, Fenced, StoreCorrupt, StoreError, StoreMismatch
from shared.schema import SCORE_SCHEMA
from shared.storage import Folder

FORMAT = 1
SNAPSHOT_SCHEMA = SCORE_SCHEMA.append(pa.field("store_version", pa.int64()))  # the commit that brought the row
COMPACT_AFTER_FRAGMENTS = 64
COLLECT_AFTER_S = 60.0  # a reader may still be opening what a manifest of this age names

Ids = npt.NDArray[np.int64]
Uri = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Part:
    """A fragment or snapshot as a manifest names it; `version` is the store version that it brings one up to."""

    name: str
    rows: int
    bytes: int
    sha256: str
    version: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the store holds at one generation. `rows` counts all rows ever committed, `metadata` is the writer's."""

    generation: int
    version: int
    writer: str
    committed_at: str
    rows: int
    snapshot: Part | None
    fragments: tuple[Part, ...]
    metadata: Mapping[str, Any]

    @property
    def base_version(self) -> int:
        return self.snapshot.version if self.snapshot else 0

    def dump(self) -> bytes:
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, name: str) -> "Manifest":
        """Raises StoreCorrupt for a torn or altered manifest, StoreMismatch for one of a newer format."""
        try:
            body = json.loads(data)
            written = body.pop("checksum")
            found = _checksum(body)
        except (ValueError, KeyError, AttributeError) as error:
            raise StoreCorrupt(f"{name} is not a whole manifest: {error}") from error
        if written != found:
            raise StoreCorrupt(f"{name} does not match its checksum; restore the file or take the store from a copy")
        _check_format(body, name)
        del body["format"]
        snapshot = body.pop("snapshot")
        fragments = tuple(Part(**part) for part in body.pop("fragments"))
        return cls(**body, snapshot=Part(**snapshot) if snapshot else None, fragments=fragments)


class ScoreWriter:
    """The store's one writer. Opening it takes the store over at once: an older writer's next commit raises Fenced.

    Threads may append while one commits. Appending the same rows again changes nothing.

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
        self._store = _Store(uri)
        self._store.create(num_samples, scoring_id)
        self.num_samples = num_samples
        self._keep_versions = keep_versions
        self._token = secrets.token_hex(8)
        self._pending: list[pa.Table] = []
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
            self._check_open()
            if rows.num_rows:
                self._pending.append(rows)

    def commit(self, metadata: Mapping[str, Any] | None = None) -> int:
        """Make all appended rows visible and durable; returns the store version. Without new rows nothing happens.

        Raises Fenced when another writer took over. After an OSError the rows are still pending: commit again.
        """
        with self._commit_lock:
            self._settle()
            with self._pending_lock:
                self._check_open()
                pending, self._pending = self._pending, []
            try:
                rows = self._without_known(pa.concat_tables(pending)) if pending else SCORE_SCHEMA.empty_table()
                if rows.num_rows:
                    self._commit(rows, metadata)
            except BaseException:
                with self._pending_lock:
                    self._pending = pending + self._pending
                raise
            if len(self._manifest.fragments) >= COMPACT_AFTER_FRAGMENTS:
                self._compact()
            return self._manifest.version

    def compact(self) -> None:
        """Fold snapshot and fragments into one snapshot and remove what no kept version needs. No new version."""
        with self._commit_lock:
            self._settle()
            self._check_open()
            self._compact()

    def close(self) -> None:
        """Commit what is pending and end. Twice is fine."""
        if self._state == "open":
            self.commit()
            self._state = "closed"

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._state == "closed":
            raise StoreError("this ScoreWriter is closed; open a new one")
        if self._state == "fenced":
            raise Fenced(f"another writer took over {self._store.path}; this one can commit no more")

    def _take_over(self) -> Manifest:
        while True:
            last = self._store.newest()
            if last is None:
                manifest = Manifest(1, 0, self._token, _now(), 0, None, (), {})
            else:
                manifest = dataclasses.replace(last, generation=last.generation + 1, writer=self._token)
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
        ids = _numpy(rows, "sample_id")
        np.maximum.at(self._latest_version_N, ids, _numpy(rows, "model_version"))

    def _advance(self, **changes: Any) -> None:
        manifest = dataclasses.replace(self._manifest, generation=self._manifest.generation + 1, **changes)
        self._unsure = True
        created = self._store.write_manifest(manifest)
        self._unsure = False
        if not created:
            self._state = "fenced"
            self._check_open()
        self._manifest = manifest

    def _settle(self) -> None:
        """After a failed manifest write: was it made after all? Then go on from it; its rows are dropped as known."""
        if not self._unsure:
            return
        made = self._store.read_manifest(self._manifest.generation + 1)
        if made is not None and made.writer == self._token:
            self._manifest = made
            self._reader.refresh()
            self._latest_version_N = self._reader.dense("model_version")
        self._unsure = False

    def _without_known(self, rows: pa.Table) -> pa.Table:
        """Drop rows that are in the store to the last bit: a scorer may send a block twice."""
        ids, versions = _numpy(rows, "sample_id"), _numpy(rows, "model_version")
        suspects = np.flatnonzero(self._latest_version_N[ids] == versions)
        if not len(suspects):
            return rows
        self._reader.refresh()
        known = self._reader.lookup(ids[suspects])
        same = np.ones(len(suspects), dtype=bool)
        for name in SCORE_SCHEMA.names:
            new, old = _numpy(rows, name)[suspects], _numpy(known, name)
            equal = new == old
            if new.dtype.kind == "f":
                equal |= np.isnan(new) & np.isnan(old)
            same &= equal
        keep = np.ones(len(ids), dtype=bool)
        keep[suspects[same]] = False
        return rows.filter(pa.array(keep))

    def _compact(self) -> None:
        if not self._manifest.fragments:
            return
        self._reader.refresh()
        rows = self._reader.snapshot()
        version = self._manifest.version
        part = self._store.write_part("snapshots", f"{version:012d}-{self._token}", rows, version)
        self._advance(snapshot=part, fragments=())
        self._store.collect(self._manifest, oldest_version=version - self._keep_versions)


class ScoreReader:
    """Follows a score store. Never waits for the writer; every answer belongs to one whole version.

    Safe to use from several threads: `refresh` swaps one immutable view for the next. Files are memory-mapped.

    Raises: StoreError when there is no store at `uri`; StoreCorrupt, naming the file, when one is torn or missing.
    """

    def __init__(self, uri: Uri) -> None:
        self._store = _Store(uri)
        description = self._store.describe()
        self.num_samples: int = description["num_samples"]
        self.scoring_id: str = description["scoring_id"]
        self._view = _View.empty(self.num_samples)
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
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.num_samples):
            wrong = wanted[(wanted < 0) | (wanted >= self.num_samples)][0]
            raise DataError(f"sample_id {wrong} is outside 0..{self.num_samples - 1}")
        return self._view.rows_of(wanted).select(SCORE_SCHEMA.names)

    def changes(self, since: int) -> pa.Table:
        """The latest rows of samples whose latest row came after store version `since`, sorted by sample_id."""
        latest = self._view.changed(since)
        return latest.select(SCORE_SCHEMA.names)

    def dense(self, column: str) -> npt.NDArray[Any]:
        """One column as an array of length N indexed by sample_id.

        Where unscored: NaN for floats, -1 for integers and for booleans (as int8), NaT for times.
        """
        return self._view.dense(column)

    def _at(self, version: int) -> "_View":
        if not 0 <= version <= self._view.version:
            raise StoreError(f"version {version} is not there; this reader is at version {self._view.version}")
        for generation in reversed(self._store.generations()):
            manifest = self._store.read_manifest(generation)
            if manifest is not None and manifest.base_version <= version <= manifest.version:
                kept = tuple(part for part in manifest.fragments if part.version <= version)
                then = dataclasses.replace(manifest, version=version, fragments=kept)
                with contextlib.suppress(FileNotFoundError):
                    return _View.empty(self.num_samples).advance(self._store, then)
        raise StoreError(f"version {version} is no longer kept; raise keep_versions to keep more")


@dataclasses.dataclass(frozen=True)
class _View:
    """One version in memory: the snapshot and, folded, what was committed after it. Immutable.

    `base` and `overlay` are sorted by sample_id with one row each; an overlay row always beats its base row.
    """

    num_samples: int
    manifest: Manifest | None
    base: pa.Table
    overlay: pa.Table

    @classmethod
    def empty(cls, num_samples: int) -> "_View":
        nothing = SNAPSHOT_SCHEMA.empty_table()
        return cls(num_samples, None, nothing, nothing)

    @property
    def version(self) -> int:
        return self.manifest.version if self.manifest else 0

    def advance(self, store: "_Store", manifest: Manifest | None) -> "_View":
        """The view of `manifest`, reusing what this one has read."""
        if manifest is None or (self.manifest and manifest.generation == self.manifest.generation):
            return self
        base, overlay, read_up_to = self.base, self.overlay, self.version
        if self.manifest is None or manifest.snapshot != self.manifest.snapshot:
            base = store.read_part("snapshots", manifest.snapshot) if manifest.snapshot else self.base
            overlay, read_up_to = SNAPSHOT_SCHEMA.empty_table(), manifest.base_version
        new = [store.read_part("fragments", part) for part in manifest.fragments if part.version > read_up_to]
        if new:
            overlay = _beating(fold([overlay, *new]), base)
        return _View(self.num_samples, manifest, base, overlay)

    def latest(self) -> pa.Table:
        if not self.overlay.num_rows:
            return self.base
        return fold([self.base, self.overlay]) if self.base.num_rows else self.overlay

    def rows_of(self, ids: Ids) -> pa.Table:
        both = pa.concat_tables([self.base, self.overlay])
        in_base, in_overlay = _positions(self.base, ids), _positions(self.overlay, ids)
        position = np.where(in_overlay >= 0, in_overlay + self.base.num_rows, in_base)
        rows = both.take(pa.array(position, mask=position < 0))
        return rows.set_column(0, SCORE_SCHEMA.field("sample_id"), pa.array(ids))

    def changed(self, since: int) -> pa.Table:
        if since < (self.manifest.base_version if self.manifest else 0):
            latest = self.latest()
            return latest.filter(pa.array(_numpy(latest, "store_version") > since))
        return self.overlay.filter(pa.array(_numpy(self.overlay, "store_version") > since))

    def dense(self, column: str) -> npt.NDArray[Any]:
        if column not in SNAPSHOT_SCHEMA.names:
            raise StoreError(f"no column {column!r}; there are {', '.join(SNAPSHOT_SCHEMA.names)}")
        kind = _numpy(SNAPSHOT_SCHEMA.empty_table(), column).dtype
        dtype = np.dtype(np.int8) if kind.kind == "b" else kind
        fill = np.datetime64("NaT") if kind.kind == "M" else (np.nan if kind.kind == "f" else -1)
        out = np.full(self.num_samples, fill, dtype=dtype)
        for table in (self.base, self.overlay):
            out[_numpy(table, "sample_id")] = _numpy(table, column)
        return out


class _Store:
    """The store's files: names, checks and the collection of what nobody needs."""

    def __init__(self, uri: Uri) -> None:
        self._root = Folder(uri)
        self.path = self._root.path
        self._manifests = Folder(self.path / "manifests")
        self._parts = {name: Folder(self.path / name) for name in ("fragments", "snapshots")}

    def create(self, num_samples: int, scoring_id: str) -> None:
        for folder in (self._root, self._manifests, *self._parts.values()):
            folder.make()
        wanted = {"format": FORMAT, "num_samples": num_samples, "scoring_id": scoring_id}
        if not self._root.create("store.json", json.dumps(wanted).encode()):
            found = self.describe()
            for key in ("num_samples", "scoring_id"):
                if found[key] != wanted[key]:
                    raise StoreMismatch(
                        f"{self.path} holds scores with {key} {found[key]!r}, asked for {wanted[key]!r}; use a new run"
                    )

    def describe(self) -> dict[str, Any]:
        path = self.path / "store.json"
        try:
            description: dict[str, Any] = json.loads(self._root.read("store.json"))
            _check_format(description, str(path))
            description["num_samples"], description["scoring_id"]
        except FileNotFoundError:
            raise StoreError(f"no score store at {self.path}; a ScoreWriter creates one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise (error if isinstance(error, StoreMismatch) else StoreCorrupt(f"{path}: {error}")) from error
        return description

    def generations(self) -> list[int]:
        return [int(name.removesuffix(".json")) for name in self._manifests.names() if name.endswith(".json")]

    def newest(self, known: Manifest | None = None) -> Manifest | None:
        """The newest manifest; `known` itself when it still is."""
        while generations := self.generations():
            if known is not None and generations[-1] <= known.generation:
                return known
            if (manifest := self.read_manifest(generations[-1])) is not None:
                return manifest
        return known

    def read_manifest(self, generation: int) -> Manifest | None:
        name = f"{generation:012d}.json"
        try:
            return Manifest.parse(self._manifests.read(name), str(self._manifests.path / name))
        except FileNotFoundError:
            return None

    def write_manifest(self, manifest: Manifest) -> bool:
        return self._manifests.create(f"{manifest.generation:012d}.json", manifest.dump())

    def write_part(self, kind: str, stem: str, rows: pa.Table, version: int) -> Part:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, rows.schema) as file:
            file.write_table(rows.combine_chunks())
        data = sink.getvalue()
        name = f"{stem}-{secrets.token_hex(3)}.arrow"
        self._parts[kind].put(name, data)
        return Part(name, rows.num_rows, data.size, hashlib.sha256(data).hexdigest(), version)

    def read_part(self, kind: str, part: Part) -> pa.Table:
        """The part's rows, memory-mapped, with store_version. FileNotFoundError when it was collected."""
        path = self._parts[kind].path / part.name
        length = path.stat().st_size
        if length != part.bytes:
            raise StoreCorrupt(f"{path} has {length} bytes, its manifest says {part.bytes}")
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise StoreCorrupt(f"{path}: {error}") from error
        if kind == "fragments":
            table = table.append_column("store_version", pa.array(np.full(table.num_rows, part.version)))
        if table.schema != SNAPSHOT_SCHEMA or table.num_rows != part.rows:
            raise StoreCorrupt(f"{path} does not hold what its manifest says")
        return table

    def collect(self, current: Manifest, oldest_version: int) -> None:
        """Remove manifests that time travel to `oldest_version` does not need, then the files that no manifest names.

        Of the manifests with one snapshot the last is enough: it names all fragments since.
        """
        last_of_base: dict[str | None, Manifest] = {}
        spare: list[Manifest] = []
        for generation in self.generations():
            if (manifest := self.read_manifest(generation)) is None:
                continue
            key = manifest.snapshot.name if manifest.snapshot else None
            if key in last_of_base:
                spare.append(last_of_base[key])
            last_of_base[key] = manifest
        spare += [m for m in last_of_base.values() if m.version < oldest_version]
        for manifest in spare:
            if manifest.generation != current.generation:
                self._delete_old(self._manifests, f"{manifest.generation:012d}.json")
        kept = [m for m in map(self.read_manifest, self.generations()) if m is not None]
        named = {part.name for m in kept for part in (*m.fragments, *([m.snapshot] if m.snapshot else []))}
        for folder in self._parts.values():
            for name in folder.names():
                if name not in named:
                    self._delete_old(folder, name)

    @staticmethod
    def _delete_old(folder: Folder, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - (folder.path / name).stat().st_mtime > COLLECT_AFTER_S:
                folder.delete(name)


def fold(tables: Sequence[pa.Table]) -> pa.Table:
    """The latest row of each sample in `tables` (earlier commits first), sorted by sample_id."""
    table = pa.concat_tables([t for t in tables if t.num_rows] or tables[:1])
    ids = _numpy(table, "sample_id")
    order = np.lexsort((_numpy(table, "model_version"), ids))  # stable: of equal versions the later commit is last
    last = np.append(ids[order][1:] != ids[order][:-1], [True] if len(ids) else [])
    return table.take(pa.array(order[last.astype(bool)])).combine_chunks()


def _beating(rows: pa.Table, base: pa.Table) -> pa.Table:
    """The rows that are later than the base's row of their sample."""
    position = _positions(base, _numpy(rows, "sample_id"))
    if not (position >= 0).any():
        return rows
    base_version = np.where(position >= 0, _numpy(base, "model_version")[position], -1)
    wins = _numpy(rows, "model_version") >= base_version
    return rows if wins.all() else rows.filter(pa.array(wins))


def _positions(sorted_rows: pa.Table, ids: Ids) -> Ids:
    """Row numbers of `ids` in rows sorted by sample_id; -1 where absent."""
    have = _numpy(sorted_rows, "sample_id")
    if not len(have):
        return np.full(len(ids), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(have, ids), len(have) - 1)
    return np.where(have[at] == ids, at, -1)


def _conform(table: pa.Table | pa.RecordBatch, num_samples: int) -> pa.Table:
    rows = pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table
    if sorted(rows.column_names) != sorted(SCORE_SCHEMA.names):
        missing = set(SCORE_SCHEMA.names) - set(rows.column_names)
        extra = set(rows.column_names) - set(SCORE_SCHEMA.names)
        raise StoreMismatch(f"score rows lack columns {sorted(missing)} and have unknown ones {sorted(extra)}")
    try:
        rows = rows.select(SCORE_SCHEMA.names).cast(SCORE_SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StoreMismatch(f"score rows do not fit SCORE_SCHEMA: {error}") from error
    for name in SCORE_SCHEMA.names:
        if rows.column(name).null_count:
            raise StoreMismatch(f"column {name} has {rows.column(name).null_count} nulls; score rows have none")
    ids = _numpy(rows, "sample_id")
    if len(ids) and (ids.min() < 0 or ids.max() >= num_samples):
        raise StoreMismatch(f"sample ids {ids.min()}..{ids.max()} do not fit 0..{num_samples - 1}")
    if len(ids) and _numpy(rows, "model_version").min() < 0:
        raise StoreMismatch("model_version is below 0; versions are 1, 2, 3 ...")
    return rows


def _numpy(table: pa.Table, column: str) -> npt.NDArray[Any]:
    """A column as numpy, without a copy where Arrow allows; times as datetime64[us]."""
    values = table.column(column)
    array: npt.NDArray[Any] = (
        values.chunk(0).to_numpy(zero_copy_only=False) if values.num_chunks == 1 else values.to_numpy()
    )
    return array


def _check_format(description: Mapping[str, Any], name: str) -> None:
    found = description["format"]
    if not isinstance(found, int) or found > FORMAT:
        raise StoreMismatch(f"{name} has format {found}; this steppe reads up to {FORMAT}: install a newer one")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()
