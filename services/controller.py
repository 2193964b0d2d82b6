"""The controller: the one owner of leases, commits and the wanted number of scorers.

A plain class; deploy makes an actor of it. Scorers call `lease` and `submit`, the driver calls `decide` and carries the
decisions out, REST calls `status` and `set_wanted`. Commits run in a thread of the controller's own.
"""

import collections
import dataclasses
import logging
import os
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa

from services.blocks import BlockTable
from services.config import ControllerConfig
from shared.errors import ConfigError, ServiceError, StoreError
from shared.freshness import DEFAULT_BOUND_PASSES, DEFAULT_BOUND_VERSIONS
from shared.leases import Lease
from shared.schema import FLOAT_COLUMNS, QUARANTINE_SCHEMA
from shared.score_store import ScoreReader, ScoreWriter
from shared.storage import Folder, local_path

logger = logging.getLogger(__name__)

RATE_WINDOW_S = 10.0
MAX_REPLICAS = 1024


@dataclasses.dataclass(frozen=True)
class Start:
    """Start `count` more scorers."""

    count: int


@dataclasses.dataclass(frozen=True)
class Drain:
    """Let these scorers finish their batch and go."""

    scorer_ids: tuple[str, ...]


Decision = Start | Drain


class Controller:
    """Leases blocks, oldest version first, and commits the rows that come back.

    Opening it takes the score store over and restores the blocks' versions from it: a restarted controller goes on
    where the last commit was.

    Args:
        run_uri: the run folder.
        num_samples: N.
        scoring_id: what makes rows comparable; the store's must be the same.
        wanted: scorers to begin with.
    """

    def __init__(
        self, run_uri: str, num_samples: int, scoring_id: str, config: ControllerConfig, *, wanted: int = 1
    ) -> None:
        self._config = config
        self._run = Folder(local_path(run_uri))
        scores = self._run.path / "scores"
        self._writer = ScoreWriter(scores, num_samples, scoring_id=scoring_id, keep_versions=config.store_versions)
        self._blocks = BlockTable(num_samples, config.block_size, config.permutation_seed)
        reader = ScoreReader(scores)
        self._blocks.restore(reader.dense("model_version"))
        self._wanted = wanted
        self._scorers: dict[str, dict[str, Any]] = {}
        self._submitted: list[tuple[int, int, int]] = []  # lease, block, model_version of rows not yet committed
        self._rows_pending = False
        self._passes = _Passes(reader.metadata)
        self._quarantine: list[pa.Table] = self._read_quarantine()
        self._rates: collections.deque[tuple[float, int]] = collections.deque()
        self._first_submit = self._last_submit = 0.0
        self._received = 0
        self._failure: BaseException | None = None
        self._lock = threading.RLock()
        self._rows_came = threading.Condition(self._lock)
        self._closing = False
        self._thread = threading.Thread(target=self._commit_loop, name="commits", daemon=True)
        self._thread.start()

    # -- scorers ---------------------------------------------------------------------------------------------------

    def register(self, scorer_id: str, pid: int) -> None:
        """A scorer is up: it has its data and waits for weights."""
        with self._lock:
            self._scorers[scorer_id] = {"scorer_id": scorer_id, "pid": pid, "scored": 0, "model_version": 0}

    def lease(self, scorer_id: str, model_version: int) -> Lease | None:
        """A block not yet scored at `model_version`; None when there is none now."""
        with self._lock:
            self._check()
            if scorer_id in self._scorers:
                self._scorers[scorer_id]["model_version"] = model_version
            return self._blocks.lease(scorer_id, model_version, time.monotonic(), self._config.lease_timeout_s)

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table) -> None:
        """Rows of a lease. Rows of an expired lease are welcome too: the store keeps the latest whoever scored it.

        Non-finite rows go to quarantine, counted, and never to the store.
        """
        with self._lock:
            self._check()
            bad = np.zeros(rows.num_rows, dtype=bool)
            for name in FLOAT_COLUMNS:
                bad |= ~np.isfinite(rows.column(name).to_numpy())
            if bad.any():
                self._put_in_quarantine(rows.filter(pa.array(bad)), "a measured value is not finite")
                rows_good = rows.filter(pa.array(~bad))
            else:
                rows_good = rows
            self._writer.append(rows_good)
            block = self._blocks.block_of(lease_id)
            if block is not None:
                self._blocks.submitted(lease_id)
                self._submitted.append((lease_id, block, int(rows.column("model_version")[0].as_py())))
            self._count(scorer_id, rows.num_rows)
            self._rows_pending = True
            self._rows_came.notify()

    def release(self, scorer_id: str) -> int:
        """A scorer hands back its leases; returns how many."""
        with self._lock:
            return self._blocks.release(scorer_id)

    # -- driver ----------------------------------------------------------------------------------------------------

    def decide(self, alive: tuple[str, ...]) -> list[Decision]:
        """What to do about the scorers that the driver says are `alive` (starting ones included, draining ones not)."""
        with self._lock:
            self._check()
            for gone in set(self._scorers) - set(alive):
                self._blocks.release(gone)
                del self._scorers[gone]
            surplus = len(alive) - self._wanted
            if surplus < 0:
                return [Start(-surplus)]
            return [Drain(alive[-surplus:])] if surplus > 0 else []

    def set_wanted(self, replicas: int) -> None:
        """Raises ConfigError outside 0..1024."""
        if not 0 <= replicas <= MAX_REPLICAS:
            raise ConfigError(f"replicas is {replicas}; it must lie in 0..{MAX_REPLICAS}")
        with self._lock:
            self._wanted = replicas

    def status(self) -> dict[str, Any]:
        """Numbers for people and REST."""
        with self._lock:
            return {
                "pid": os.getpid(),
                "wanted": self._wanted,
                "scorers": list(self._scorers.values()),
                "blocks": len(self._blocks),
                "leased": self._blocks.leased,
                "leases_expired": self._blocks.expired,
                "oldest_block_version": self._blocks.oldest_version,
                "store_version": self._writer.version,
                "rows_received": self._received,
                "samples_per_second": self._rate(),
                "samples_per_second_mean": self._received / max(self._last_submit - self._first_submit, 1e-9)
                if self._last_submit > self._first_submit
                else 0.0,
                "quarantined_rows": sum(table.num_rows for table in self._quarantine),
                "failure": str(self._failure) if self._failure else None,
            }

    def close(self) -> None:
        """Commit what came in and end."""
        with self._lock:
            self._closing = True
            self._rows_came.notify()
        self._thread.join()
        self._check()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _commit_loop(self) -> None:
        while True:
            with self._lock:
                self._rows_came.wait_for(lambda: self._rows_pending or self._closing)
                closing = self._closing
            try:
                self._commit()
                if closing:
                    self._writer.close()
                    return
            except OSError as error:  # such as a full disk: the rows are still pending, so try again
                logger.exception("a commit failed, it is tried again")
                with self._lock:
                    self._failure, self._rows_pending = error, True
            except StoreError as error:
                logger.exception("the score store cannot be written any more")
                self._failure = error
                return
            with self._lock:
                self._rows_came.wait_for(lambda: self._closing, timeout=self._config.commit_interval_s)  # paces commits

    def _commit(self) -> None:
        with self._lock:
            self._rows_pending = False
            submitted = list(self._submitted)
            blocks: dict[int, int] = {}
            for _, block, version in submitted:
                blocks[block] = max(version, blocks.get(block, 0))
            self._passes.scored(blocks)
        self._writer.commit(self._passes.metadata(len(self._blocks)))
        with self._lock:
            self._failure = None
            self._blocks.committed(blocks, [lease_id for lease_id, _, _ in submitted])
            del self._submitted[: len(submitted)]

    def _check(self) -> None:
        if isinstance(self._failure, StoreError):
            raise ServiceError(f"the controller lost its score store: {self._failure}")

    def _count(self, scorer_id: str, rows: int) -> None:
        now = time.monotonic()
        self._first_submit = self._first_submit or now
        self._last_submit = now
        self._received += rows
        self._rates.append((now, rows))
        if scorer_id in self._scorers:
            self._scorers[scorer_id]["scored"] += rows

    def _rate(self) -> float:
        now = time.monotonic()
        while self._rates and self._rates[0][0] < now - RATE_WINDOW_S:
            self._rates.popleft()
        if not self._rates:
            return 0.0
        return sum(rows for _, rows in self._rates) / max(now - self._rates[0][0], 1.0)

    def _read_quarantine(self) -> list[pa.Table]:
        path = self._run.path / "quarantine.arrow"
        return [pa.ipc.open_file(path.read_bytes()).read_all()] if path.exists() else []

    def _put_in_quarantine(self, rows: pa.Table, reason: str) -> None:
        self._quarantine.append(rows.append_column("reason", pa.array([reason] * rows.num_rows)))
        table = pa.concat_tables(self._quarantine).cast(QUARANTINE_SCHEMA).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, QUARANTINE_SCHEMA) as file:
            file.write_table(table)
        self._run.put("quarantine.arrow", sink.getvalue())
        self._quarantine = [table]
        logger.warning("%d rows in quarantine: %s", rows.num_rows, reason)


class _Passes:
    """How long a full scoring pass is, in versions, from the blocks as they are scored; kept in the store's metadata.

    A pass ends when every block has been scored since it began; its length is the rise of the newest scored version
    meanwhile. The staleness bound is 4 versions or 2 passes, whichever is more.
    """

    def __init__(self, metadata: Any) -> None:
        self._length = int(metadata.get("pass_versions", 0))
        self._seen_before = int(metadata.get("newest_scored_version", 0))
        self._versions_before = int(metadata.get("model_versions_scored", 0))
        self._versions: set[int] = set()
        self._newest = self._seen_before
        self._began_at: int | None = None
        self._done: set[int] = set()

    def scored(self, blocks: dict[int, int]) -> None:
        for block, version in blocks.items():
            if version > self._seen_before:
                self._versions.add(version)
            self._newest = max(self._newest, version)
            self._began_at = version if self._began_at is None else self._began_at
            self._done.add(block)

    def metadata(self, num_blocks: int) -> dict[str, Any]:
        if len(self._done) >= num_blocks and self._began_at is not None:
            self._length = max(self._newest - self._began_at, 0) + 1
            self._done.clear()
            self._began_at = None
        return {
            "pass_versions": self._length,
            "staleness_bound": max(DEFAULT_BOUND_VERSIONS, DEFAULT_BOUND_PASSES * self._length),
            "newest_scored_version": self._newest,
            "model_versions_scored": self._versions_before + len(self._versions),
        }
