"""The log of a training's draws, from which `--replay` trains again, without scorers, on exactly the same.

    <run>/train/draws-0001.arrows     of attempt 1: an Arrow IPC stream, one record batch per window as it was planned

Of each window: `epoch` and `position` of its first draw, the `store_version` that it was planned by, `sha256` of the
ids (int64, little-endian), the `ids`, in the weighting form `weight` of all samples, and what the draws were worth.
What an attempt planned replaces all that earlier ones did from there on. A torn end is passed over.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import StateError
from shared.storage import Folder, local_path
from trainer.sampler import DrawCounts, Window

PREFIX, SUFFIX = "draws-", ".arrows"
SCHEMA = pa.schema(
    {
        "epoch": pa.int64(),
        "position": pa.int64(),
        "store_version": pa.int64(),
        "sha256": pa.string(),
        "ids": pa.list_(pa.int64()),
        "weight": pa.list_(pa.float64()),
        "fresh": pa.int64(),
        "stale": pa.int64(),
        "unscored": pa.int64(),
        "age_counts": pa.list_(pa.int64()),
    }
)


class DrawLog:
    """Writes the windows of one attempt as they are planned, unless it cannot: then it says so once, by `failed`."""

    def __init__(self, uri: str | os.PathLike[str], attempt: int) -> None:
        folder = Folder(local_path(uri) / "train").make()
        self._path = folder.path / f"{PREFIX}{attempt:04d}{SUFFIX}"
        self._file: Any = None
        self._writer: Any = None
        self.failed: OSError | None = None

    def __call__(self, window: Window) -> None:
        if self.failed is not None:
            return
        try:
            if self._writer is None:
                self._file = open(self._path, "wb")  # noqa: SIM115
                options = pa.ipc.IpcWriteOptions(compression="zstd")
                self._writer = pa.ipc.new_stream(self._file, SCHEMA, options=options)
            self._writer.write_batch(_row(window))
            self._file.flush()
        except OSError as error:  # such as a full disk: the training goes on
            self.failed = error

    def close(self) -> None:
        """No end mark: a log that was cut off reads like one that was not."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self.failed = self.failed or error


class Recorded:
    """The windows of a run's surviving line, by epoch and position; read as they are asked for, best in their order.

    Raises: StateError when there are none.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        folder = Folder(local_path(uri) / "train")
        self._folder = folder.path
        self._places: dict[tuple[int, int], tuple[str, int]] = {}  # of a window: which file, and which batch of it
        for name in sorted(folder.names()):
            if name.startswith(PREFIX) and name.endswith(SUFFIX):
                self._index(name)
        if not self._places:
            raise StateError(
                f"{self._folder} holds no draws to replay",
                fix="train that run anew to have them",
                key=str(self._folder),
            )
        self._open: tuple[str, int, Iterator[pa.RecordBatch]] = ("", 0, iter(()))

    def __call__(self, epoch: int, position: int) -> Window:
        """Raises StateError for a window that is not there, or whose ids are not those that were logged."""
        if (epoch, position) not in self._places:
            raise StateError(
                f"{self._folder} holds no draws for epoch {epoch} from position {position} on",
                fix="replay the run with its own windows_per_epoch, and no further than it was trained",
                key=str(self._folder),
            )
        name, number = self._places[epoch, position]
        row = self._batch(name, number)
        ids = row.column("ids").flatten().to_numpy()
        if _sha256(ids) != row.column("sha256")[0].as_py():
            raise StateError(
                f"the draws of epoch {epoch}, position {position} in {self._folder / name} are damaged",
                fix="restore it from a copy, or train that run anew",
                key=str(self._folder / name),
            )
        store_version, fresh, stale, unscored = (
            int(row.column(name)[0].as_py()) for name in ("store_version", "fresh", "stale", "unscored")
        )
        worth = DrawCounts(fresh, stale, unscored, row.column("age_counts").flatten().to_numpy())
        weight = row.column("weight")
        weight_N = weight.flatten().to_numpy().copy() if weight.null_count == 0 else None
        return Window(epoch, position, store_version, ids.copy(), weight_N, worth)

    def _index(self, name: str) -> None:
        """What an attempt planned takes the place of all that earlier ones did from there on."""
        for number, batch in enumerate(_batches(self._folder / name)):
            key = (batch.column("epoch")[0].as_py(), batch.column("position")[0].as_py())
            if number == 0:
                self._places = {known: place for known, place in self._places.items() if known < key}
            self._places[key] = (name, number)

    def _batch(self, name: str, number: int) -> pa.RecordBatch:
        at, coming, batches = self._open
        if at != name or coming > number:
            coming, batches = 0, _batches(self._folder / name)
        row = next(itertools.islice(batches, number - coming, None))
        self._open = (name, number + 1, batches)
        return row


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Up to where the file was cut off."""
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            yield from stream
    except (pa.ArrowInvalid, OSError):
        return


def _row(window: Window) -> pa.RecordBatch:
    values = {
        "epoch": [window.epoch],
        "position": [window.position],
        "store_version": [window.store_version],
        "sha256": [_sha256(window.ids)],
        "ids": _list_of(window.ids),
        "weight": pa.nulls(1, pa.list_(pa.float64())) if window.weight_N is None else _list_of(window.weight_N),
        "fresh": [window.worth.fresh],
        "stale": [window.worth.stale],
        "unscored": [window.worth.unscored],
        "age_counts": _list_of(window.worth.age_counts.astype(np.int64)),
    }
    return pa.record_batch(list(values.values()), schema=SCHEMA)


def _list_of(values: npt.NDArray[Any]) -> pa.Array:
    """One list, without a Python object for each value."""
    flat = pa.array(values)
    return pa.ListArray.from_arrays(pa.array([0, len(flat)], pa.int32()), flat)


def _sha256(ids: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
