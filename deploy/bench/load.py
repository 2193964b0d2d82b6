"""`steppe bench store-load`: a writer that commits and compacts without pause, and two readers that check all they see.

Commit number v brings the samples of stripe v mod 16, with v in their margins. So a reader knows what each version must
hold, whole: of each stripe the last commit up to that version.
"""

import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bench.crash import make_rows
from shared.errors import StoreCorrupt
from shared.score_store import Retention, ScoreReader, ScoreWriter

NUM_SAMPLES = 160_000
STRIPES = 16
READERS = 2
GRACE_S = 2.0


def measure(repeats: int) -> dict[str, Any]:
    """For `repeats` seconds. Raises StoreCorrupt for a torn or backward read."""
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        return load(Path(place) / "scores", float(repeats))


def load(uri: Path, seconds: float, num_samples: int = NUM_SAMPLES) -> dict[str, Any]:
    """As `measure`, with a store at `uri`. Refreshes that found nothing new do not count."""
    processes = multiprocessing.get_context("spawn")
    with ScoreWriter(uri, num_samples, retention=Retention(0), grace_s=GRACE_S) as writer:
        pipes = [processes.Pipe() for _ in range(READERS)]
        readers = [processes.Process(target=_read, args=(str(uri), pipe[1])) for pipe in pipes]
        for reader in readers:
            reader.start()
        for ours, _ in pipes:
            ours.recv()  # it is up
        compactions, deadline = 0, time.monotonic() + seconds
        snapshot = 0
        while time.monotonic() < deadline:
            version = writer.version + 1
            writer.append(make_rows(np.arange(version % STRIPES, num_samples, STRIPES), version))
            writer.commit()
            compactions += writer.snapshot_version != snapshot
            snapshot = writer.snapshot_version
        for ours, _ in pipes:
            ours.send("stop")
        found = [ours.recv() for ours, _ in pipes]
        for reader in readers:
            reader.join()
        commits = writer.version
    for answer in found:
        if isinstance(answer, str):
            raise StoreCorrupt(answer, key=str(uri))
    refresh_ms = 1e3 * np.concatenate(found)
    p50, p99 = np.quantile(refresh_ms, (0.5, 0.99))
    return {
        "what": f"{READERS} readers beside a writer of {num_samples // STRIPES} rows a commit; refresh in ms",
        "seconds": seconds,
        "commits": commits,
        "compactions": compactions,
        "refreshes": len(refresh_ms),
        "p50": round(float(p50), 3),
        "p99": round(float(p99), 3),
        "max": round(float(refresh_ms.max()), 3),
    }


def _read(uri: str, pipe: Connection) -> None:
    """Refresh and check until told to stop; answer with the seconds of each refresh that moved on, or what is wrong."""
    reader, seconds, version = ScoreReader(uri), [], 0
    pipe.send("up")
    try:
        while not pipe.poll():
            began = time.perf_counter()
            now = reader.refresh()
            took = time.perf_counter() - began
            if now == version:
                time.sleep(0.001)
                continue
            seconds.append(took)
            if problem := _problem(reader, version):
                pipe.send(problem)
                return
            version = now
    except Exception as error:  # whatever it is, the writer hears of it
        pipe.send(f"{uri}: {error!r}")
        return
    pipe.send(np.array(seconds))


def _problem(reader: ScoreReader, before: int) -> str | None:
    if reader.version < before:
        return f"{reader.uri}: version {reader.version} was read after {before}"
    stripe_N = np.arange(reader.num_samples) % STRIPES
    due_N = reader.version - (reader.version - stripe_N) % STRIPES
    margin_N = reader.dense("margin")
    if not np.array_equal(np.where(np.isnan(margin_N), 0, margin_N), np.maximum(due_N, 0)):
        return f"{reader.uri}: version {reader.version} is torn"
    return None
