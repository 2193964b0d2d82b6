"""Columnar answers: the same columns as JSON or as an Arrow table, with nulls where there is nothing to tell."""

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

STREAMED_ROWS = 1 << 16  # to a record batch
HEAD = b"steppe"  # the key of an Arrow answer's metadata


@dataclasses.dataclass(frozen=True)
class Column:
    """Values side by side. What is not finite is null.

    Args:
        valid: where there is a value; None: everywhere.
        names: then `values` are places in these.
    """

    values: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_] | None = None
    names: Sequence[str] = ()

    def json(self) -> Any:
        """For orjson, which writes numpy's arrays as they are, and null for NaN and infinities."""
        if self.names:
            if len(self.values) and (self.values == self.values[0]).all():  # as almost always
                return [self.names[self.values[0]]] * len(self.values)
            return [self.names[place] for place in self.values.tolist()]
        if self.valid is None or self.valid.all():
            return np.ascontiguousarray(self.values)
        values = self.values.astype(object)
        values[~self.valid] = None
        return values.tolist()

    def arrow(self) -> pa.Array:
        if self.names:
            return pa.DictionaryArray.from_arrays(self.values, pa.array(self.names)).cast(pa.string())
        valid = self.valid
        if self.values.dtype.kind == "f":
            valid = np.isfinite(self.values) if valid is None else valid & np.isfinite(self.values)
        return pa.array(self.values, mask=None if valid is None else ~valid)


@dataclasses.dataclass(frozen=True)
class Answer:
    """`head` is told once, `columns` of each row."""

    head: Mapping[str, Any]
    columns: Mapping[str, Column | pa.ChunkedArray]

    def json(self) -> dict[str, Any]:
        return {**self.head, **{name: _json(column) for name, column in self.columns.items()}}

    def table(self) -> pa.Table:
        """The columns; the head is JSON in the schema's metadata, under `steppe`."""
        columns = {
            name: column.arrow() if isinstance(column, Column) else column for name, column in self.columns.items()
        }
        head = orjson.dumps(dict(self.head), option=orjson.OPT_SERIALIZE_NUMPY)
        return pa.table(columns).replace_schema_metadata({HEAD: head})


def of_table(head: Mapping[str, Any], table: pa.Table) -> Answer:
    return Answer(head, dict(zip(table.column_names, table.columns, strict=True)))


def arrow_stream(table: pa.Table, compression: str | None = None) -> Iterator[bytes]:
    """An Arrow IPC stream, piece by piece; its buffers compressed by `lz4` or `zstd` where asked."""
    sink = _Sink()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as stream:
        for batch in table.to_batches(max_chunksize=STREAMED_ROWS):
            stream.write_batch(batch)
            yield sink.taken()
    yield sink.taken()


class _Sink(io.RawIOBase):
    """Holds what Arrow wrote until it is taken."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        data = b"".join(self._written)
        self._written.clear()
        return data


def _json(column: Column | pa.ChunkedArray) -> Any:
    if isinstance(column, Column):
        return column.json()
    if pa.types.is_timestamp(column.type):
        return pc.strftime(column.cast(pa.timestamp("us")), format="%Y-%m-%dT%H:%M:%SZ").to_pylist()
    if not column.null_count and not pa.types.is_string(column.type):
        return np.ascontiguousarray(column.to_numpy())
    return column.to_pylist()
