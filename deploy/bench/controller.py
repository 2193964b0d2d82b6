"""`steppe bench controller`: what the controller carries from many scorers, beside what its store alone takes in.

The scorers are simulated: they lease and submit as `scorer.worker.Worker` does, the next lease in flight, but with rows
made before in place of scoring. Controller and store are the real ones. Rows count once they are durable, by the
manifests; the store's own figure is that of `steppe bench store` for commits of one block. The controller is measured
twice: alone, with the scorers as threads of its process; and as the actor of a run, with the scorers in processes of
their own, which share the cores with it and with Ray, and whose rows go through Ray's object store.
"""

import contextlib
import datetime
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pyarrow as pa
import rich
from rich.table import Table

from deploy.bench.store import committing, random_rows, seconds_without_pause
from deploy.cluster import end_processes, local_cluster, new_ray_folder
from deploy.every_epoch import LocalLeases
from deploy.interrupts import interrupts
from scorer.worker import LeaseSource
from services.config import ControllerConfig
from services.controller import Controller
from shared.errors import ServiceError
from shared.schema import SCORE_SCHEMA
from shared.score_store import Retention, ScoreWriter
from shared.store_files import Manifest, StoreFiles

if TYPE_CHECKING:
    from deploy.actors import Handle
    from shared.leases import Lease

Answers = tuple[list[float], list[float]]  # seconds until the answers: of leases, of submits

NUM_SAMPLES = 4_000_000
BLOCK_SIZES = (256, 8192)
SECONDS = 8.0  # of one load
PROCESSES, SCORERS = 2, 4  # of scorers, and scorers in each
LEASE_TIMEOUT_S = 5.0  # not the 60 s of a run: a load is shorter
INGEST_COMMITS = 200
EDGE_S = 0.5  # at the beginning and the end of a load, which do not count
START_TIMEOUT_S = 120.0
REPLY_TIMEOUT_S = 30.0


def measure(repeats: int) -> dict[str, Any]:
    """`repeats` loads of each block size, each after a series of the store alone."""
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        return load(Path(place), repeats)


def load(place: Path, repeats: int, num_samples: int = NUM_SAMPLES, seconds: float = SECONDS) -> dict[str, Any]:
    """As `measure`, with runs and a store below `place`."""
    found = [_measured(place / str(size), repeats, num_samples, size, seconds) for size in BLOCK_SIZES]
    return {
        "what": f"{PROCESSES * SCORERS} simulated scorers of {num_samples:,} samples, medians of {repeats} loads of "
        f"{seconds:g} s; a lease expires after {LEASE_TIMEOUT_S:g} s",
        "blocks": found,
    }


def _end(run_folder: Path) -> None:
    end_processes(run_folder, 0)


def show(found: Mapping[str, Any]) -> None:
    """A table on stdout, a column per block size."""
    rich.print(found["what"])
    table = Table("", box=None)
    for one in found["blocks"]:
        table.add_column(f"blocks of {one['block_size']:,}", justify="right")
    for name in found["blocks"][0]:
        table.add_row(name.replace("_", " "), *(f"{one[name]:,}" for one in found["blocks"]))
    rich.print(table)


def _measured(place: Path, repeats: int, num_samples: int, block_size: int, seconds: float) -> dict[str, Any]:
    config = ControllerConfig(block_size=block_size, lease_timeout_s=LEASE_TIMEOUT_S, keep_last=0)
    run, alone = place / "run", place / "alone"
    sys.stderr.write(f"blocks of {block_size}\n")
    with interrupts() as interrupted, contextlib.ExitStack() as stack:
        for folder in (run, alone):
            _open_store(folder / "scores", num_samples).close()
        store = stack.enter_context(_open_store(place / "scores", num_samples))
        interrupted.at_once = partial(_end, run)
        stack.enter_context(local_cluster(new_ray_folder(), run, "bench"))
        actor = _Actor(run, stack.enter_context(_controller(run, num_samples, config)), block_size)
        here = _Here(alone, stack.enter_context(_controller_here(alone, num_samples, config)), block_size)
        for one in (here, actor):
            _put_load(one, 2 * EDGE_S + 1.0)  # all are warm
        loads = []
        for _ in range(repeats):
            store_rows_per_s = _ingest(store, block_size)
            carried = _put_load(here, seconds)["rows_per_s"]
            load = _put_load(actor, seconds)
            loads.append(
                {
                    "store_rows_per_s": store_rows_per_s,
                    "rows_per_s_alone": carried,
                    "alone_to_store": carried / store_rows_per_s,
                    **load,
                    "actor_to_store": load["rows_per_s"] / store_rows_per_s,
                }
            )
        expired = sum(one.status()["leases_expired"] for one in (here, actor))
    medians = {name: median(one[name] for one in loads) for name in loads[0]}
    return {
        "block_size": block_size,
        **{name: round(value) if value >= 1000 else round(value, 3) for name, value in medians.items()},
        "leases_expired": expired,
    }


def _open_store(uri: Path, num_samples: int) -> ScoreWriter:
    """A new one that holds all samples."""
    rng = np.random.default_rng(0)
    writer = ScoreWriter(uri, num_samples, retention=Retention(0), grace_s=0.0)
    for ids in np.array_split(np.arange(num_samples), 10):
        writer.append(random_rows(ids, 1, rng))
        writer.commit()
    writer.compact()
    return writer


def _ingest(writer: ScoreWriter, block_size: int) -> float:
    """Rows a second that the store alone takes in, in commits of one block without a pause: by the median commit."""
    rng = np.random.default_rng(writer.version)
    numbers = itertools.count(writer.version + 1)

    def batches(count: int) -> Iterator[pa.Table]:
        for _ in range(count):
            yield random_rows(rng.permutation(writer.num_samples)[:block_size], next(numbers), rng)

    (seconds,) = seconds_without_pause([committing(writer)], batches, INGEST_COMMITS).values()
    return block_size / median(seconds)


@contextlib.contextmanager
def _controller(run: Path, num_samples: int, config: ControllerConfig) -> "Iterator[Handle]":
    import ray

    from deploy.actors import ControllerActor, ask

    remote: Any = ray.remote
    controller = remote(num_cpus=0, max_restarts=-1)(ControllerActor).remote(
        str(run), num_samples, "", config, wanted=PROCESSES * SCORERS
    )
    ask(controller.status.remote(), START_TIMEOUT_S)
    yield controller
    ask(controller.close.remote(), START_TIMEOUT_S)


@contextlib.contextmanager
def _controller_here(run: Path, num_samples: int, config: ControllerConfig) -> Iterator[Controller]:
    controller = Controller(str(run), num_samples, "", config, wanted=PROCESSES * SCORERS)
    yield controller
    controller.close()


class _Here:
    """The controller and its scorers in this process."""

    def __init__(self, run: Path, controller: Controller, block_size: int) -> None:
        self.run, self._controller = run, controller
        self._scorers = SimulatedScorers("here", LocalLeases(controller), block_size, PROCESSES * SCORERS)
        self._pool = ThreadPoolExecutor(1)

    def status(self) -> dict[str, Any]:
        return self._controller.status()

    def begin(self, seconds: float) -> "Callable[[], list[Answers]]":
        """Put a load of so many seconds; what is returned waits for its end."""
        load = self._pool.submit(self._scorers.run, seconds)
        return lambda: [load.result()]


class _Actor:
    """The controller as an actor, and its scorers in processes of their own."""

    def __init__(self, run: Path, controller: "Handle", block_size: int) -> None:
        import ray

        from deploy.actors import RemoteFleet, RemoteLeases, ask

        self.run = run
        self._controller = RemoteFleet(controller)
        remote: Any = ray.remote
        actor = remote(num_cpus=0)(SimulatedScorers)
        leases = RemoteLeases(controller)
        self._scorers = [actor.remote(f"process-{n}", leases, block_size, SCORERS) for n in range(PROCESSES)]
        for scorer in self._scorers:
            ask(scorer.ready.remote(), START_TIMEOUT_S)

    def status(self) -> dict[str, Any]:
        return self._controller.status()

    def begin(self, seconds: float) -> "Callable[[], list[Answers]]":
        """As `_Here.begin`."""
        from deploy.actors import ask

        answers = [scorer.run.remote(seconds) for scorer in self._scorers]
        return lambda: [ask(answer, seconds + REPLY_TIMEOUT_S) for answer in answers]


def _put_load(on: _Here | _Actor, seconds: float) -> dict[str, float]:
    """What was committed between two manifests inside the load, and how long the answers took."""
    process = psutil.Process(_status(on)["pid"])
    wait = on.begin(seconds)
    time.sleep(EDGE_S)
    began, first = _cpu_seconds(process), _newest(on.run)
    time.sleep(seconds - 2 * EDGE_S)
    cpu_seconds, last = _cpu_seconds(process) - began, _newest(on.run)
    took = wait()
    between = _committed_at(last) - _committed_at(first)
    if last.version == first.version:
        raise ServiceError(
            f"the controller committed nothing in {seconds:g} s", fix=f"look into {on.run}/logs", key=str(on.run)
        )
    found = {
        "rows_per_s": (last.rows - first.rows) / between.total_seconds(),
        "rows_per_commit": (last.rows - first.rows) / (last.version - first.version),
        "controller_cores": cpu_seconds / (seconds - 2 * EDGE_S),
    }
    for number, name in enumerate(("lease", "submit")):
        milliseconds = 1e3 * np.concatenate([each[number] for each in took])
        p50, p99 = np.quantile(milliseconds, (0.5, 0.99))
        found |= {f"{name}_p50_ms": float(p50), f"{name}_p99_ms": float(p99)}
    return found


def _status(on: _Here | _Actor) -> dict[str, Any]:
    status = on.status()
    if status["trouble"]:
        raise ServiceError(
            f"the controller cannot commit: {status['trouble']}", fix=f"look into {on.run}/logs", key=str(on.run)
        )
    return status


def _newest(run: Path) -> Manifest:
    manifest = StoreFiles(run / "scores").newest()
    if manifest is None:
        raise ServiceError(f"{run}/scores has no manifest", fix=f"look into {run}/logs", key=f"{run}/scores")
    return manifest


def _committed_at(manifest: Manifest) -> datetime.datetime:
    return datetime.datetime.fromisoformat(manifest.committed_at)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


class SimulatedScorers:
    """Some scorers in one process, a thread each."""

    def __init__(self, name: str, leases: LeaseSource, block_size: int, count: int) -> None:
        self._leases = leases
        self._scorer_ids = [f"{name}-{number}" for number in range(count)]
        self._version_of = dict.fromkeys(self._scorer_ids, 2)
        self._rows = random_rows(np.arange(block_size), 0, np.random.default_rng(0))

    def ready(self) -> None: ...

    def run(self, seconds: float) -> "Answers":
        """Lease and submit for so long. Returns the seconds until the answers: of the leases, of the submits."""
        self._lease_s: list[float] = []
        self._submit_s: list[float] = []
        self._ends_at = time.monotonic() + seconds
        threads = [threading.Thread(target=self._work, args=(scorer_id,)) for scorer_id in self._scorer_ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self._lease_s, self._submit_s

    def _work(self, scorer_id: str) -> None:
        coming = self._lease(scorer_id)
        while time.monotonic() < self._ends_at:
            lease = coming.result(REPLY_TIMEOUT_S)
            if lease is None:  # all is scored, as if a new checkpoint had come
                self._version_of[scorer_id] += 1
            coming = self._lease(scorer_id)
            if lease is not None:
                rows = self._rows_of(lease, self._version_of[scorer_id])
                began = time.perf_counter()
                self._leases.submit(scorer_id, lease.lease_id, rows, {}).result(REPLY_TIMEOUT_S)
                self._submit_s.append(time.perf_counter() - began)
        coming.result(REPLY_TIMEOUT_S)
        self._leases.release(scorer_id).result(REPLY_TIMEOUT_S)

    def _lease(self, scorer_id: str) -> Any:
        began = time.perf_counter()
        future = self._leases.lease(scorer_id, self._version_of[scorer_id])
        future.add_done_callback(lambda _: self._lease_s.append(time.perf_counter() - began))
        return future

    def _rows_of(self, lease: "Lease", version: int) -> pa.Table:
        count = len(lease.sample_ids)
        stamps = {"sample_id": lease.sample_ids, "model_version": np.full(count, version)}
        rows = (
            self._rows if count == len(self._rows) else random_rows(lease.sample_ids, version, np.random.default_rng(0))
        )
        for name, values in stamps.items():
            rows = rows.set_column(SCORE_SCHEMA.get_field_index(name), SCORE_SCHEMA.field(name), pa.array(values))
        return rows
