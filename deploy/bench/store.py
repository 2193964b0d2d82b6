"""`steppe bench store`: what the score store costs, beside what the disk and other stores make of the same rows."""

import itertools
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.schema import SCORE_SCHEMA, arrow_file
from shared.score_store import Retention, ScoreReader, ScoreWriter

SIZES = (1_000_000, 10_000_000)
BATCH_ROWS = 8192
CHANGED_SHARE = 0.01
REFRESHES = 5
OTHERS_BATCHES = 20
SERIES = 20

Act = Callable[[pa.Table], None]

MEMORY = """
import sys
from shared.score_store import ScoreReader
from shared.tracking import Tracker


def private():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


before = private()
reader = ScoreReader(sys.argv[1])
reader.lookup([0])
opened = private()
kept = Tracker("adm")
kept.update(reader)
print(opened - before, private() - opened)
"""


def measure(repeats: int) -> dict[str, Any]:
    """Stores of 1 and 10 million samples; `repeats` commits of each, in turn with the floor. Times are medians."""
    return {
        "what": f"score stores; commits of {BATCH_ROWS} rows; milliseconds are medians",
        "sizes": [_measured(size, repeats) for size in SIZES],
    }


def show(found: Mapping[str, Any]) -> None:
    """A table on stdout, a column per size."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=None, title=found["what"])
    for size in found["sizes"]:
        table.add_column(f"{size['samples']:,} samples", justify="right")
    for name in dict.fromkeys(name for size in found["sizes"] for name in size):
        table.add_row(name.replace("_", " "), *(str(size.get(name, "-")) for size in found["sizes"]))
    Console().print(table)


def _measured(num_samples: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        uri = Path(place) / "scores"
        rng = np.random.default_rng(0)
        sys.stderr.write(f"{num_samples:,} samples\n")
        with ScoreWriter(uri, num_samples, retention=Retention(0), grace_s=0.0) as writer:
            for ids in np.array_split(np.arange(num_samples), 10):
                writer.append(random_rows(ids, 1, rng))
                writer.commit()
            writer.compact()
            found: dict[str, Any] = (
                {"samples": num_samples} | _refreshes(writer, uri, rng) | _commits(writer, place, rng, repeats)
            )
            found |= _memory(uri, num_samples, "_of_fragments")
            writer.compact()
        found["open_ms"] = _median_ms(lambda: ScoreReader(uri), REFRESHES)
        found |= _memory(uri, num_samples)
        shutil.rmtree(uri)
        for name, other in OTHERS.items():
            found[f"{name}_rows_per_s"] = _rows_per_second(other, place, num_samples)
        return found


def _refreshes(writer: ScoreWriter, uri: Path, rng: np.random.Generator) -> dict[str, Any]:
    """A reader's, after 1 % of the samples changed in commits of one batch; and the fold of it all."""
    reader, seconds = ScoreReader(uri), []
    size = int(CHANGED_SHARE * writer.num_samples)
    for version in range(2, 2 + REFRESHES):
        changed = rng.permutation(writer.num_samples)[:size]
        for ids in np.array_split(changed, -(-size // BATCH_ROWS)):
            writer.append(random_rows(ids, version, rng))
            writer.commit()
        began = time.perf_counter()
        reader.refresh()
        seconds.append(time.perf_counter() - began)
        if version == 2:
            fold = _median_ms(reader.snapshot, REFRESHES)
    return {"refresh_1_percent_ms": _ms(seconds), "fold_ms": fold}


def _commits(writer: ScoreWriter, place: str, rng: np.random.Generator, repeats: int) -> dict[str, Any]:
    """Durable commits beside the floor: the rows as one file, synced and renamed, and its folder synced.

    In turn, now one first and now the other, with the time between them that it takes to make rows; and as series
    without a pause, of rows made before, in which a writer cannot get ready for what comes.
    """
    (Path(place) / "floor").mkdir()
    numbers = itertools.count()

    def floor(rows: pa.Table) -> None:
        _raw(Path(place) / "floor", next(numbers), rows)

    commit = committing(writer)

    def batches(count: int) -> Iterator[pa.Table]:
        for _ in range(count):
            yield random_rows(rng.permutation(writer.num_samples)[:BATCH_ROWS], 100 + next(numbers), rng)

    turns: dict[Act, list[float]] = {floor: [], commit: []}
    for turn, rows in enumerate(batches(repeats)):
        for act in list(turns)[:: 1 if turn % 2 else -1]:
            turns[act] += _seconds(act, [rows])
    series = seconds_without_pause((floor, commit), batches, repeats)
    return {
        "commit_ms": _ms(turns[commit]),
        "floor_ms": _ms(turns[floor]),
        "floor_to_commit": round(statistics.median(turns[floor]) / statistics.median(turns[commit]), 3),
        "floor_to_commit_without_pause": round(statistics.median(series[floor]) / statistics.median(series[commit]), 3),
        "commit_p99_ms": round(1e3 * float(np.quantile(turns[commit] + series[commit], 0.99)), 3),
        "rows_per_s_without_pause": round(BATCH_ROWS / statistics.median(series[commit])),
    }


def committing(writer: ScoreWriter) -> Act:
    """A durable commit of some rows."""

    def commit(rows: pa.Table) -> None:
        writer.append(rows)
        writer.commit()

    return commit


def seconds_without_pause(
    acts: Iterable[Act], batches: Callable[[int], Iterable[pa.Table]], repeats: int
) -> dict[Act, list[float]]:
    """Of each act, on the same rows, which `batches(count)` makes before: series of 20, in turn."""
    seconds: dict[Act, list[float]] = {act: [] for act in acts}
    for _ in range(max(repeats // SERIES, 1)):
        made = list(batches(SERIES))
        for act in seconds:
            seconds[act] += _seconds(act, made)
    return seconds


def _seconds(act: Act, batches: Iterable[pa.Table]) -> list[float]:
    found = []
    for rows in batches:
        began = time.perf_counter()
        act(rows)
        found.append(time.perf_counter() - began)
    return found


def _raw(folder: Path, number: int, rows: pa.Table) -> None:
    with open(folder / "temporary", "wb") as file:
        file.write(arrow_file(rows))
        file.flush()
        os.fsync(file.fileno())
    (folder / "temporary").rename(folder / f"{number}.arrow")
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _memory(uri: Path, num_samples: int, when: str = "") -> dict[str, float]:
    """Private bytes of a reader, and of a measure's values and percentiles beside it, in a process of its own."""
    output = subprocess.run([sys.executable, "-c", MEMORY, uri], check=True, capture_output=True, text=True).stdout
    each = (round(int(word) / num_samples, 2) for word in output.split())
    return {f"{what}_bytes_per_sample{when}": size for what, size in zip(("reader", "measure"), each, strict=True)}


def random_rows(ids: npt.NDArray[np.int64], version: int, rng: np.random.Generator) -> pa.Table:
    value = rng.standard_normal(len(ids), dtype=np.float32)
    given: dict[str, Any] = {"sample_id": ids, "correct": value > 0, "robust": value > 1, "predicted": 0}
    given |= dict.fromkeys(("model_version", "step", "scored_at"), version)
    arrays = [np.broadcast_to(np.asarray(given.get(field.name, value)), ids.shape) for field in SCORE_SCHEMA]
    return pa.table([pa.array(a).cast(f.type) for a, f in zip(arrays, SCORE_SCHEMA, strict=True)], schema=SCORE_SCHEMA)


# -- other stores, for information: as durable, the same batches -------------------------------------------------------


def _duckdb(place: str) -> Iterator[Act]:
    import duckdb

    with duckdb.connect(f"{place}/scores.duckdb") as connection:
        empty = SCORE_SCHEMA.empty_table()  # noqa: F841  named in the query
        connection.execute("create table scores as select * from empty")

        def append(batch: pa.Table) -> None:
            connection.execute("insert into scores select * from batch")

        yield append


def _sqlite(place: str) -> Iterator[Act]:
    connection = sqlite3.connect(f"{place}/scores.sqlite")
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    columns = ", ".join(SCORE_SCHEMA.names)
    connection.execute(f"create table scores ({columns}, primary key (sample_id)) without rowid")
    insert = "insert or replace into scores values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

    def append(batch: pa.Table) -> None:
        plain = batch.set_column(3, "scored_at", batch.column("scored_at").cast(pa.int64()))
        with connection:
            connection.executemany(insert, zip(*(column.to_pylist() for column in plain.columns), strict=True))

    yield append
    connection.close()


def _lance(place: str) -> Iterator[Act]:
    import lance

    def append(batch: pa.Table) -> None:
        lance.write_dataset(batch, f"{place}/scores.lance", mode="append")

    yield append


OTHERS: dict[str, Callable[[str], Iterator[Act]]] = {"duckdb": _duckdb, "sqlite": _sqlite, "lance": _lance}


def _rows_per_second(other: Callable[[str], Iterator[Act]], place: str, num_samples: int) -> int | str:
    rng = np.random.default_rng(1)
    try:
        store = other(place)
        append = next(store)
    except ImportError:
        return "not installed"
    seconds = []
    for version in range(OTHERS_BATCHES):
        rows = random_rows(rng.permutation(num_samples)[:BATCH_ROWS], version, rng)
        began = time.perf_counter()
        append(rows)
        seconds.append(time.perf_counter() - began)
    next(store, None)
    return round(BATCH_ROWS / statistics.median(seconds))


def _median_ms(act: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return _ms(seconds)


def _ms(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 3)
