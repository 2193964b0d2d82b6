"""`steppe bench store-crash`: a writer killed by kill -9 at random instants, again and again, with a reader beside it.

After each kill the store must hold every commit that was reported, whole, and nothing of any other but perhaps the one
that was going on; the next writer goes on from there.
"""

import contextlib
import multiprocessing
import random
import sys
import tempfile
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
    chance, live = random.Random(seed), ScoreReader(uri)
    version_N, applied, opening = np.full(num_samples, -1), 0, []
    for kill in range(kills):
        receive, send = processes.Pipe(duplex=False)
        writer = processes.Process(target=_write_without_end, args=(str(uri), num_samples, send))
        writer.start()
        send.close()
        reported = _kill(writer, receive, chance)
        began = time.monotonic()
        reopened = ScoreReader(uri)
        opening.append(time.monotonic() - began)
        for version in range(applied + 1, reopened.version + 1):
            version_N[_ids_of(version, num_samples)] = version
        applied = reopened.version
        _check(reopened, reported, version_N)
        live.refresh()
        _check(live, reported, version_N)
        if (kill + 1) % TOLD_EVERY == 0:
            sys.stderr.write(f"{kill + 1} kills, store version {applied}\n")
    return {
        "what": "kills of a writer; seconds to open the store afterwards",
        "kills": kills,
        "commits": applied,
        "rows": live.rows,
        "p50": round(float(np.median(opening)), 4),
        "max": round(max(opening), 4),
    }


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
    """Commit for ever, going on from the store; report each commit once it returned."""
    writer = ScoreWriter(uri, num_samples, retention=Retention(0), grace_s=GRACE_S)
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


def _check(reader: ScoreReader, reported: int, version_N: npt.NDArray[np.int64]) -> None:
    if reader.version - reported not in (0, 1):  # one may have become durable and not been reported any more
        raise StoreCorrupt(f"{reader.uri}: version {reported} was reported, a reader finds {reader.version}")
    margin_N = reader.dense("margin")
    scored_N = version_N >= 0
    if not np.array_equal(reader.dense("model_version"), version_N) or (margin_N != version_N)[scored_N].any():
        raise StoreCorrupt(f"{reader.uri}: version {reader.version} does not hold what was committed")
