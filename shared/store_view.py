"""One version of the score store in memory, and how rows fold into it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import StoreError
from shared.schema import SCORE_SCHEMA, SNAPSHOT_SCHEMA
from shared.store_files import Manifest, StoreFiles

Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class StoreView:
    """One version in memory: the snapshot and, folded, what was committed after it. Immutable.

    `base` and `overlay` are sorted by sample_id with one row each; an overlay row always beats its base row.
    """

    num_samples: int
    manifest: Manifest | None
    base: pa.Table
    overlay: pa.Table

    @classmethod
    def empty(cls, num_samples: int) -> "StoreView":
        nothing = SNAPSHOT_SCHEMA.empty_table()
        return cls(num_samples, None, nothing, nothing)

    @property
    def version(self) -> int:
        return self.manifest.version if self.manifest else 0

    def advance(self, store: StoreFiles, manifest: Manifest | None) -> "StoreView":
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
        return StoreView(self.num_samples, manifest, base, overlay)

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
            return latest.filter(pa.array(column_array(latest, "store_version") > since))
        return self.overlay.filter(pa.array(column_array(self.overlay, "store_version") > since))

    def dense(self, column: str) -> npt.NDArray[Any]:
        if column not in SNAPSHOT_SCHEMA.names:
            raise StoreError(f"no column {column!r}; there are {', '.join(SNAPSHOT_SCHEMA.names)}")
        kind = column_array(SNAPSHOT_SCHEMA.empty_table(), column).dtype
        dtype = np.dtype(np.int8) if kind.kind == "b" else kind
        fill = np.datetime64("NaT") if kind.kind == "M" else (np.nan if kind.kind == "f" else -1)
        out = np.full(self.num_samples, fill, dtype=dtype)
        for table in (self.base, self.overlay):
            out[column_array(table, "sample_id")] = column_array(table, column)
        return out


def fold(tables: Sequence[pa.Table]) -> pa.Table:
    """The latest row of each sample in `tables` (earlier commits first), sorted by sample_id."""
    table = pa.concat_tables([t for t in tables if t.num_rows] or tables[:1])
    ids = column_array(table, "sample_id")
    order = np.lexsort((column_array(table, "model_version"), ids))  # stable: of equal versions the later commit last
    is_last = np.ones(len(ids), dtype=bool)
    is_last[:-1] = ids[order][1:] != ids[order][:-1]
    return table.take(pa.array(order[is_last])).combine_chunks()


def _beating(rows: pa.Table, base: pa.Table) -> pa.Table:
    """The rows that are later than the base's row of their sample."""
    position = _positions(base, column_array(rows, "sample_id"))
    if not (position >= 0).any():
        return rows
    base_version = np.where(position >= 0, column_array(base, "model_version")[position], -1)
    wins = column_array(rows, "model_version") >= base_version
    return rows if wins.all() else rows.filter(pa.array(wins))


def _positions(sorted_rows: pa.Table, ids: Ids) -> Ids:
    """Row numbers of `ids` in rows sorted by sample_id; -1 where absent."""
    have = column_array(sorted_rows, "sample_id")
    if not len(have):
        return np.full(len(ids), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(have, ids), len(have) - 1)
    return np.where(have[at] == ids, at, -1)


def column_array(table: pa.Table, column: str) -> npt.NDArray[Any]:
    """A column as numpy, without a copy where Arrow allows; times as datetime64[us]."""
    values = table.column(column)
    array: npt.NDArray[Any] = (
        values.chunk(0).to_numpy(zero_copy_only=False) if values.num_chunks == 1 else values.to_numpy()
    )
    return array
