"""One version of the score store in memory, and how rows fold into it."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.beside import Beside
from shared.errors import StoreCorrupt, StoreError
from shared.schema import SNAPSHOT_SCHEMA
from shared.store_files import FRAGMENTS, SNAPSHOTS, Anchor, Manifest, Part, StoreFiles

Ids = npt.NDArray[np.int64]

NOTHING = SNAPSHOT_SCHEMA.empty_table()
FOLDING_THREADS = 2
JOINED_ROWS = 4096  # larger tables stay memory-mapped


@dataclasses.dataclass(frozen=True)
class Overlay:
    """The fragments' rows that beat the snapshot's: one per sample, sorted by sample_id. Immutable.

    Rows are numbered through all fragments in the order of their commits. `tables` hold them in that order: fragments
    as they lie on the disk, small ones joined so that they stay few.

    Shapes: R samples.
    """

    tables: tuple[pa.Table, ...]
    id_R: Ids
    row_R: Ids
    model_version_R: Ids

    @classmethod
    def empty(cls) -> "Overlay":
        nothing = np.zeros(0, dtype=np.int64)
        return cls((), nothing, nothing, nothing)

    def extended(self, newer: Sequence[pa.Table], base: pa.Table) -> "Overlay":
        """With the rows of newer fragments."""
        id_F, version_F, row_F = last_rows(_column(newer, "sample_id"), _column(newer, "model_version"))
        at_F, base_at_F = positions(self.id_R, id_F), positions(column_array(base, "sample_id"), id_F)
        beat_F = np.full(len(id_F), -1)
        in_base_F, known_F = base_at_F >= 0, at_F >= 0
        beat_F[in_base_F] = column_array(base, "model_version")[base_at_F[in_base_F]]
        beat_F[known_F] = self.model_version_R[at_F[known_F]]
        wins_F = version_F >= beat_F
        row_F += sum(table.num_rows for table in self.tables)
        # Samples that the overlay does not hold yet move those behind them on; the others change in place. So with
        # [1, 4] here, 2 and 4 of the newer go to places 1 and 2 of [1, 2, 4].
        new_F = wins_F & (at_F < 0)
        place_F = np.searchsorted(self.id_R, id_F) + np.cumsum(new_F) - new_F
        is_kept = np.ones(len(self.id_R) + np.count_nonzero(new_F), dtype=bool)
        is_kept[place_F[new_F]] = False
        kept_R = np.flatnonzero(is_kept)

        def merged(of_R: Ids, of_F: Ids) -> Ids:
            both = np.empty(len(is_kept), dtype=np.int64)
            both[kept_R] = of_R
            both[place_F[wins_F]] = of_F[wins_F]
            return both

        return Overlay(
            _joined(self.tables, newer),
            merged(self.id_R, id_F),
            merged(self.row_R, row_F),
            merged(self.model_version_R, version_F),
        )

    def column(self, name: str) -> npt.NDArray[Any]:
        """Shape [R]."""
        values: npt.NDArray[Any] = _column(self.tables, name)[self.row_R]
        return values


@dataclasses.dataclass(frozen=True)
class StoreView:
    """One version: the snapshot, memory-mapped, and what was committed after it. Immutable.

    `base` is sorted by sample_id with one row of each; an overlay row always beats its base row.
    """

    num_samples: int
    manifest: Manifest | None
    base: pa.Table
    overlay: Overlay

    @classmethod
    def empty(cls, num_samples: int) -> "StoreView":
        return cls(num_samples, None, NOTHING, Overlay.empty())

    @property
    def version(self) -> int:
        return self.manifest.version if self.manifest else 0

    def advance(self, store: StoreFiles, manifest: Manifest | None) -> "StoreView":
        """The view of `manifest`, reusing what this one has read."""
        if manifest is None or (self.manifest and manifest.generation == self.manifest.generation):
            return self
        base, overlay, read = self.base, self.overlay, self.manifest.fragments if self.manifest else ()
        if (
            self.manifest is None
            or manifest.snapshot != self.manifest.snapshot
            or manifest.fragments[: len(read)] != read
        ):
            base = self._part(store, SNAPSHOTS, manifest.snapshot) if manifest.snapshot else NOTHING
            overlay, read = Overlay.empty(), ()
        if newer := [self._part(store, FRAGMENTS, part) for part in manifest.fragments[len(read) :]]:
            overlay = overlay.extended(newer, base)
        return StoreView(self.num_samples, manifest, base, overlay)

    @property
    def base_version(self) -> int:
        """The snapshot's."""
        return self.manifest.base_version if self.manifest else 0

    def parts(self) -> list[tuple[str, Part]]:
        """Folder and part of all that this view has read."""
        return list(self.manifest.parts()) if self.manifest else []

    def _part(self, store: StoreFiles, kind: str, part: Part) -> pa.Table:
        rows = store.read_part(kind, part)
        ids = column_array(rows, "sample_id")
        if kind == SNAPSHOTS:  # sorted
            ids = ids[[0, -1]] if len(ids) else ids
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_samples):
            path = store.part_path(kind, part)
            raise StoreCorrupt.of(path, f"has sample ids {ids.min()}..{ids.max()}, outside 0..{self.num_samples - 1}")
        return rows

    def earlier(self) -> list[tuple[Manifest, Anchor]]:
        """This view's manifest with each of those that it keeps."""
        return [(self.manifest, anchor) for anchor in self.manifest.earlier] if self.manifest else []

    def at(self, version: int) -> "StoreView":
        """As it was at an earlier version, from the snapshot's on."""
        if self.manifest is None or version == self.version:
            return self
        newest = self.manifest
        fragments = tuple(part for part in newest.fragments if part.version <= version)
        rows = newest.rows - sum(part.rows for part in newest.fragments[len(fragments) :])
        manifest = dataclasses.replace(  # of no generation that there is; nothing says when that version was committed
            newest, generation=0, version=version, committed_at="", rows=rows, fragments=fragments
        )
        overlay = Overlay.empty()
        if fragments:
            overlay = overlay.extended(_first(self.overlay.tables, sum(part.rows for part in fragments)), self.base)
        return StoreView(self.num_samples, manifest, self.base, overlay)

    def rows_ever_of(self, sample_id: int) -> pa.Table:
        """The sample's row of the snapshot and all that came after, in no order."""
        return pa.concat_tables(rows_with(table, sample_id) for table in (self.base, *self.overlay.tables))

    def latest(self) -> pa.Table:
        """The latest row of each scored sample, sorted by sample_id."""
        if not len(self.overlay.id_R):
            return self.base
        base_id = column_array(self.base, "sample_id")
        at_base: slice | Ids = slice(None)
        new_id = self.overlay.id_R[positions(base_id, self.overlay.id_R) < 0]
        ids = base_id
        if len(new_id):
            ids = np.insert(base_id, np.searchsorted(base_id, new_id), new_id)
            at_base = np.searchsorted(ids, base_id)
        at_R = positions(ids, self.overlay.id_R)

        def folded(field: pa.Field) -> pa.Array:
            if field.name == "sample_id":
                return pa.array(ids)
            values = np.empty(len(ids), dtype=column_array(NOTHING, field.name).dtype)
            values[at_base] = column_array(self.base, field.name)
            values[at_R] = self.overlay.column(field.name)
            return pa.array(values, type=field.type)

        beside = Beside(FOLDING_THREADS)
        columns = [beside(functools.partial(folded, field)) for field in SNAPSHOT_SCHEMA]
        beside.close()
        return pa.table([column() for column in columns], schema=SNAPSHOT_SCHEMA)

    def row_of(self, sample_id: int) -> dict[str, Any] | None:
        """The latest row of one sample as plain values, times in microseconds since 1970; None where unscored."""
        ids = self._overlay_ids
        at = bisect.bisect_left(ids, sample_id)
        if at < len(ids) and ids[at] == sample_id:
            number = self.base.num_rows + int(self.overlay.row_R[at])
        else:
            number = self._place_in_base(sample_id)
            if number < 0:
                return None
        index = bisect.bisect_right(self._first_numbers, number) - 1
        row = number - self._first_numbers[index]
        return {name: read(row) for name, read in self._getters(index).items()}

    def _place_in_base(self, sample_id: int) -> int:
        if self.base.num_rows == self.num_samples:
            return sample_id
        at = bisect.bisect_left(ids := self._base_ids.data, sample_id)
        return at if at < len(ids) and ids[at] == sample_id else -1

    @functools.cached_property
    def _base_ids(self) -> Ids:
        return column_array(self.base, "sample_id")

    @functools.cached_property
    def _overlay_ids(self) -> memoryview:
        """For one id a fifth of the time that numpy takes."""
        return self.overlay.id_R.data

    @functools.cached_property
    def _first_numbers(self) -> list[int]:
        """Of the rows of base and fragments."""
        rows = [self.base.num_rows, *(table.num_rows for table in self.overlay.tables)]
        return [0, *itertools.accumulate(rows[:-1])]

    def _getters(self, index: int) -> dict[str, Callable[[int], Any]]:
        """By column, what gives the value of a row of the base or a fragment."""
        if (found := self._known_getters.get(index)) is None:
            table = self.overlay.tables[index - 1] if index else self.base
            found = self._known_getters[index] = {name: _getter(table.column(name)) for name in table.column_names}
        return found

    @functools.cached_property
    def _known_getters(self) -> dict[int, dict[str, Callable[[int], Any]]]:
        return {}

    def values_of(self, ids: Ids, columns: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Of each column the latest values of `ids`, with the fill of `dense` where unscored."""
        at_B, in_overlay_B = positions(self._base_ids, ids), positions(self.overlay.id_R, ids)
        places = [*self._places(np.flatnonzero(in_overlay_B >= 0), in_overlay_B)]
        for _, place_P, _ in places:
            at_B[place_P] = 0
        unscored = np.flatnonzero(at_B < 0)
        found = []
        for name in columns:
            dtype, fill = _dense(name)
            base = column_array(self.base, name)
            value_B = base[at_B].astype(dtype, copy=False) if len(base) else np.full(len(ids), fill, dtype=dtype)
            for table, place_P, row_P in places:
                value_B[place_P] = column_array(table, name)[row_P]
            if len(unscored):
                value_B[unscored] = fill
            found.append(value_B)
        return found

    def _places(self, new_P: Ids, in_overlay_B: Ids) -> Iterator[tuple[pa.Table, Ids, Ids]]:
        """Where rows of fragments go: for each fragment the places among those asked, and its rows."""
        if len(new_P):
            number_P = self.overlay.row_R[in_overlay_B[new_P]] + self.base.num_rows
            table_P = np.searchsorted(self._first_numbers, number_P, side="right") - 1
            for index in np.unique(table_P):
                mine = np.flatnonzero(table_P == index)
                yield self.overlay.tables[index - 1], new_P[mine], number_P[mine] - self._first_numbers[index]

    def rows_of(self, ids: Ids) -> pa.Table:
        """The latest rows of `ids` in that order; all but sample_id null where unscored."""
        at_B, in_overlay_B = positions(column_array(self.base, "sample_id"), ids), positions(self.overlay.id_R, ids)
        is_new_B = in_overlay_B >= 0
        at_B[is_new_B] = self.overlay.row_R[in_overlay_B[is_new_B]] + self.base.num_rows
        rows = _take([self.base, *self.overlay.tables], at_B)
        return rows.set_column(0, SNAPSHOT_SCHEMA.field("sample_id"), pa.array(ids))

    def changed(self, since: int) -> pa.Table:
        """The latest rows of samples whose latest row came after store version `since`, sorted by sample_id."""
        if self.manifest is None or since <= 0:
            return self.latest()
        older = sum(part.rows for part in self.manifest.fragments if part.version <= since)
        is_newer_R = self.overlay.row_R >= older
        in_base = np.zeros(0, dtype=np.int64)
        if since < self.manifest.base_version:
            in_base = np.flatnonzero(column_array(self.base, "store_version") > since)
            in_base = in_base[positions(self.overlay.id_R, column_array(self.base, "sample_id")[in_base]) < 0]
        ids = np.concatenate([column_array(self.base, "sample_id")[in_base], self.overlay.id_R[is_newer_R]])
        rows = np.concatenate([in_base, self.overlay.row_R[is_newer_R] + self.base.num_rows])
        return _take([self.base, *self.overlay.tables], rows[stable_order(ids)])

    def dense(self, column: str) -> npt.NDArray[Any]:
        """One column by sample_id, shape [N]; see `ScoreReader.dense`."""
        dtype, fill = _dense(column)
        if self.base.num_rows == self.num_samples:
            value_N = column_array(self.base, column).astype(dtype)
        else:
            value_N = np.full(self.num_samples, fill, dtype=dtype)
            value_N[column_array(self.base, "sample_id")] = column_array(self.base, column)
        if len(self.overlay.id_R):
            value_N[self.overlay.id_R] = self.overlay.column(column)
        return value_N


def column_array(table: pa.Table, column: str) -> npt.NDArray[Any]:
    """A column as numpy, without a copy where Arrow allows; times as datetime64[us]."""
    values = table.column(column)
    array: npt.NDArray[Any] = (
        values.chunk(0).to_numpy(zero_copy_only=False) if values.num_chunks == 1 else values.to_numpy()
    )
    return array


def _getter(column: pa.ChunkedArray) -> Callable[[int], Any]:
    if column.num_chunks != 1 or pa.types.is_boolean(column.type):  # bits would be copied
        return lambda row: column[row].as_py()
    values = column.chunk(0)
    array = (values.cast(pa.int64()) if pa.types.is_timestamp(values.type) else values).to_numpy()
    read: Callable[[int], Any] = array.item
    return read


def _dense_type(column: str) -> tuple[np.dtype[Any], Any]:
    kind = column_array(NOTHING, column).dtype
    dtype = np.dtype(np.int8) if kind.kind == "b" else kind
    return dtype, np.datetime64("NaT") if kind.kind == "M" else (np.nan if kind.kind == "f" else -1)


_DENSE = {name: _dense_type(name) for name in SNAPSHOT_SCHEMA.names}


def _dense(column: str) -> tuple[Any, Any]:
    """Its type, and the value of unscored samples. Raises StoreError for a column that there is not."""
    if column not in _DENSE:
        raise StoreError(f"no column {column!r}", fix=f"choose one of {', '.join(SNAPSHOT_SCHEMA.names)}", key="column")
    return _DENSE[column]


def rows_with(table: pa.Table, sample_id: int) -> pa.Table:
    """The sample's rows, in the table's order."""
    return table.take(pa.array(np.flatnonzero(column_array(table, "sample_id") == sample_id)))


def positions(sorted_id_R: Ids, ids: Ids) -> Ids:
    """Where `ids` stand in sorted ids without repeats; -1 where they do not."""
    count = len(sorted_id_R)
    if not count:
        return np.full(len(ids), -1, dtype=np.int64)
    if sorted_id_R[-1] - sorted_id_R[0] == count - 1:  # without gaps
        at = ids - sorted_id_R[0]
        return np.where((at >= 0) & (at < count), at, -1)
    at = np.minimum(np.searchsorted(sorted_id_R, ids), count - 1)
    return np.where(sorted_id_R[at] == ids, at, -1)


def last_rows(id_F: Ids, version_F: Ids) -> tuple[Ids, Ids, Ids]:
    """Of each sample the row of the highest model_version, of equal ones the last: ids (sorted), versions, rows."""
    if (version_F[1:] >= version_F[:-1]).all():
        order_F = stable_order(id_F)
    else:
        by_version_F = stable_order(version_F)
        order_F = by_version_F[stable_order(id_F[by_version_F])]
    is_last_F = np.ones(len(id_F), dtype=bool)
    is_last_F[:-1] = id_F[order_F[1:]] != id_F[order_F[:-1]]
    row_F = order_F[is_last_F]
    return id_F[row_F], version_F[row_F], row_F


def stable_order(key_F: Ids) -> Ids:
    """As `np.argsort(key_F, kind="stable")` of keys that are not negative, but sorting key and row as one number.

    That is over ten times as fast, since numpy sorts plain numbers with vector instructions.
    """
    row_bits = len(key_F).bit_length()
    if len(key_F) and int(key_F.max()).bit_length() + row_bits > 63:
        return np.argsort(key_F, kind="stable")
    both_F = np.sort((key_F << row_bits) | np.arange(len(key_F)))
    return both_F & ((1 << row_bits) - 1)


def _column(tables: Sequence[pa.Table], name: str) -> npt.NDArray[Any]:
    parts = [column_array(table, name) for table in tables]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _first(tables: Sequence[pa.Table], count: int) -> list[pa.Table]:
    """The first so many rows."""
    found = []
    for table in tables:
        found.append(table.slice(0, count))
        count -= found[-1].num_rows
    return [table for table in found if table.num_rows]


def _joined(tables: Sequence[pa.Table], newer: Sequence[pa.Table]) -> tuple[pa.Table, ...]:
    """The same rows in the same order. Of small tables each has more than twice the rows of the next."""
    joined = list(tables)
    for table in newer:
        joined.append(table)
        while len(joined) > 1 and joined[-2].num_rows <= min(2 * joined[-1].num_rows, JOINED_ROWS):
            joined[-2:] = [pa.concat_tables(joined[-2:]).combine_chunks()]
    return tuple(joined)


def _take(tables: Sequence[pa.Table], at_B: Ids) -> pa.Table:
    """Rows by their number through all tables; nulls for -1. Much faster than Arrow's own over many chunks."""
    first = np.cumsum([0, *(table.num_rows for table in tables)])
    table_B = np.maximum(np.searchsorted(first, at_B, side="right") - 1, 0)
    pieces, places = [], []
    for index in np.unique(table_B):
        place_P = np.flatnonzero(table_B == index)
        at_P = at_B[place_P]
        pieces.append(tables[index].take(pa.array(at_P - first[index], mask=at_P < 0)))
        places.append(place_P)
    if len(pieces) <= 1:
        return pieces[0] if pieces else tables[0].slice(0, 0)
    order = np.concatenate(places)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_tables(pieces).take(pa.array(back))
