"""`steppe bench store-crash`: a writer killed by kill -9 at random instants, again and again, with a reader beside it.

After each kill the store must hold every commit that was reported, whole, and nothing of any other but perhaps the one
that was going on; the next writer goes on from there.
"""

import contextlib
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import StoreCorrupt
from shared.schema import SCORE_SCHEMA
from shared.score_store import Retention, ScoreReader, ScoreWriter

NUM_SAMPLES = 100_000
GRACE_S = 2.0  # so that a thousand lives do not fill the disk
LONGEST_WAIT_S = 0.02
MOST_COMMITS = 12
TOLD_EVERY = 100


def measure(repeats: int) -> dict[str, Any]:
    """`repeats` kills. Raises StoreCorrupt at the first answer that is not whole."""
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        return crash(Path(place) / "scores", repeats)


def crash(uri: Path, kills: int, num_samples: int = NUM_SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Kill writers of the store at `uri`, which commit fragments of up to `num_samples` rows without pause.

    Raises StoreCorrupt when a reported commit is lost, or one is half visible.
    """
    ScoreWriter(uri, num_samples).close()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    chance, expected = random.Random(seed), Expected(num_samples)
    reader_s, writer_s = [], []
    with _LiveReader(uri) as live:
        for kill in range(kills):
            receive, send = processes.Pipe(duplex=False)
            writer = processes.Process(target=_write_without_end, args=(str(uri), num_samples, send))
            writer.start()
            send.close()
            writer_s.append(float(receive.recv()))
            reported = _kill(writer, receive, chance)
            began = time.monotonic()
            reopened = ScoreReader(uri)
            reader_s.append(time.monotonic() - began)
            if reopened.version - reported not in (0, 1):  # one may have become durable and not been reported any more
                problem = f"{uri}: version {reported} was reported, a reader finds {reopened.version}"
                raise StoreCorrupt(problem, key=str(uri))
            expected.check(reopened)
            live.check()
            if (kill + 1) % TOLD_EVERY == 0:
                sys.stderr.write(f"{kill + 1} kills, store version {reopened.version}\n")
    return {
        "what": "kills of a writer; seconds until a reader and the next writer have opened the store",
        "kills": kills,
        "commits": reopened.version,
        "rows": reopened.rows,
        "live_reader_refreshes": live.refreshes,
        "reader_s_p50": round(float(np.median(reader_s)), 4),
        "reader_s_max": round(max(reader_s), 4),
        "writer_s_p50": round(float(np.median(writer_s)), 4),
        "writer_s_max": round(max(writer_s), 4),
    }


class Expected:
    """What the store must hold at each version; versions are asked for in rising order."""

    def __init__(self, num_samples: int) -> None:
        self._version_N, self._version = np.full(num_samples, -1), 0

    def check(self, reader: ScoreReader) -> None:
        """Raises StoreCorrupt when it does not hold just that."""
        if reader.version < self._version:
            problem = f"{reader.uri}: version {reader.version} came after {self._version}"
            raise StoreCorrupt(problem, key=str(reader.uri))
        while self._version < reader.version:
            self._version += 1
            self._version_N[_ids_of(self._version, len(self._version_N))] = self._version
        margin_N, scored_N = reader.dense("margin"), self._version_N >= 0
        wrong = (margin_N != self._version_N)[scored_N].any()
        if wrong or not np.array_equal(reader.dense("model_version"), self._version_N):
            problem = f"{reader.uri}: version {reader.version} does not hold what was committed"
            raise StoreCorrupt(problem, key=str(reader.uri))


class _LiveReader:
    """Refreshes and checks without pause, in a thread, whatever happens to the writers."""

    def __init__(self, uri: Path) -> None:
        self._reader, self.refreshes = ScoreReader(uri), 0
        self._failure: Exception | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "_LiveReader":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.set()
        self._thread.join()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _read(self) -> None:
        expected = Expected(self._reader.num_samples)
        try:
            while not self._ends.is_set():
                self._reader.refresh()
                expected.check(self._reader)
                self.refreshes += 1
        except Exception as error:  # whatever it is, a reader must not meet it
            self._failure = error


def _ids_of(version: int, num_samples: int) -> npt.NDArray[np.int64]:
    """The samples whose rows commit number `version` brings, all at model_version `version`."""
    rng = np.random.default_rng(version)
    return rng.choice(num_samples, size=int(rng.integers(1, num_samples)), replace=False)


def make_rows(ids: npt.NDArray[np.int64], version: int) -> pa.Table:
    fields = {"sample_id": ids, "model_version": version, "step": version, "margin": float(version)}
    columns = []
    for field in SCORE_SCHEMA:
        value = np.broadcast_to(np.asarray(fields.get(field.name, 0)), ids.shape)
        columns.append(pa.array(value).cast(field.type))
    return pa.table(columns, schema=SCORE_SCHEMA)


def _write_without_end(uri: str, num_samples: int, reports: Connection) -> None:
    """Commit for ever, going on from the store; report how long it took to open, and each commit once it returned."""
    began = time.monotonic()
    writer = ScoreWriter(uri, num_samples, retention=Retention(0), grace_s=GRACE_S)
    reports.send(time.monotonic() - began)
    while True:
        version = writer.version + 1
        writer.append(make_rows(_ids_of(version, num_samples), version))
        reports.send(writer.commit())


def _kill(writer: multiprocessing.process.BaseProcess, reports: Connection, chance: random.Random) -> int:
    """Kill the writer somewhere inside an append, commit or compaction; the last version that it reported."""
    for _ in range(chance.randint(1, MOST_COMMITS)):
        reported = int(reports.recv())
    time.sleep(chance.random() * LONGEST_WAIT_S)
    writer.kill()
    writer.join()
    with contextlib.suppress(EOFError):
        while True:
            reported = int(reports.recv())
    reports.close()
    return reported
