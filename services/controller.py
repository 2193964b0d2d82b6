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
from services.passes import Passes
from services.quarantine import Quarantine
from shared.errors import ConfigError, ServiceError
from shared.leases import Lease
from shared.schema import FLOAT_COLUMNS
from shared.score_store import ScoreReader, ScoreWriter
from shared.storage import Folder, local_path

logger = logging.getLogger(__name__)

RATE_WINDOW_S = 10.0
MAX_REPLICAS = 1024
ATTEMPTS_AT_CLOSE = 5


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
        wanted: scorers to begin with; a restarted controller takes the last wish from the store.
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
        self._wanted = int(reader.metadata.get("wanted", wanted))
        self._scorers: dict[str, dict[str, Any]] = {}
        self._submitted: list[tuple[int, int, int]] = []  # lease, block, model_version of rows not yet committed
        self._work_pending = False  # rows, or notes, that are not committed
        self._passes = Passes(len(self._blocks), reader.metadata)
        self._quarantine = Quarantine(self._run, int(reader.metadata.get("quarantined_rows", 0)))
        self._rates: collections.deque[tuple[float, int]] = collections.deque()
        self._first_lease = self._last_submit = 0.0
        self._received = 0
        self._trouble: Exception | None = None  # the last commit failed and is tried again
        self._failure: Exception | None = None  # no commit is possible any more
        self._lock = threading.RLock()
        self._came = threading.Condition(self._lock)
        self._closing = False
        self._thread = threading.Thread(target=self._commit_loop, name="commits", daemon=True)
        self._thread.start()

    # -- scorers ---------------------------------------------------------------------------------------------------

    def register(self, scorer_id: str, pid: int) -> None:
        """A scorer is up: it has its data and waits for weights."""
        with self._lock:
            known = {"scorer_id": scorer_id, "pid": pid, "scored": 0, "model_version": 0}
            self._scorers.setdefault(scorer_id, known)

    def lease(self, scorer_id: str, model_version: int, pid: int = 0) -> Lease | None:
        """A block not yet scored at `model_version`; None when there is none now.

        A scorer that registered with an earlier life of this controller is registered again.
        """
        with self._lock:
            self._check()
            self.register(scorer_id, pid)
            self._scorers[scorer_id]["model_version"] = model_version
            self._first_lease = self._first_lease or time.monotonic()
            return self._blocks.lease(scorer_id, model_version, time.monotonic(), self._config.lease_timeout_s)

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table) -> None:
        """Rows of a lease. Rows of an expired lease are welcome too: the store keeps the latest whoever scored it.

        Non-finite rows go to quarantine, counted, and never to the store.
        """
        with self._lock:
            self._check()
            finite = np.ones(rows.num_rows, dtype=bool)
            for name in FLOAT_COLUMNS:
                finite &= np.isfinite(rows.column(name).to_numpy())
            if not finite.all():
                self._quarantine.add(rows.filter(pa.array(~finite)), "a measured value is not finite")
            self._writer.append(rows.filter(pa.array(finite)))
            block = self._blocks.block_of(rows.column("sample_id").to_numpy())
            if block is not None:  # also of a lease that has expired, or that an earlier controller gave
                version = int(rows.column("model_version")[0].as_py())
                self._blocks.submitted(lease_id, block, scorer_id)
                self._submitted.append((lease_id, block, version))
                self._passes.scored(block, version)
            self._count(scorer_id, rows.num_rows)
            self._wake()

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
            self._wake()

    def status(self) -> dict[str, Any]:
        """Numbers for people and REST."""
        with self._lock:
            return {
                "pid": os.getpid(),
                "wanted": self._wanted,
                "scorers": [dict(scorer) for scorer in self._scorers.values()],
                "blocks": len(self._blocks),
                "leased": self._blocks.leased,
                "leases_expired": self._blocks.expired,
                "oldest_block_version": self._blocks.oldest_version,
                "store_version": self._writer.version,
                "rows_received": self._received,
                "samples_per_second": self._rate(),
                "samples_per_second_mean": self._received / max(self._last_submit - self._first_lease, 1e-9),
                "quarantined_rows": self._quarantine.count,
                "trouble": str(self._failure or self._trouble or "") or None,
            }

    def close(self) -> None:
        """Commit what came in and end. Raises ServiceError when that is not possible."""
        with self._lock:
            self._closing = True
            self._came.notify()
        self._thread.join()
        self._check()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _commit_loop(self) -> None:
        attempts_at_close = 0
        while True:
            with self._lock:
                self._came.wait_for(lambda: self._work_pending or self._closing)
                closing = self._closing
            try:
                self._commit()
                if closing:
                    self._writer.close()
                    return
            except OSError as error:  # such as a full disk: the rows are still pending
                logger.exception("a commit failed, it is tried again")
                attempts_at_close += closing
                with self._lock:
                    self._trouble, self._work_pending = error, True
                    if attempts_at_close == ATTEMPTS_AT_CLOSE:
                        self._failure = error
                        return
            except Exception as error:
                logger.exception("the score store cannot be written any more")
                self._failure = error
                return
            with self._lock:  # paces commits
                if self._trouble:
                    self._came.wait(self._config.commit_interval_s)
                else:
                    self._came.wait_for(lambda: self._closing, self._config.commit_interval_s)

    def _commit(self) -> None:
        with self._lock:
            self._work_pending = False
            submitted = list(self._submitted)
            notes = self._passes.notes() | {"wanted": self._wanted, "quarantined_rows": self._quarantine.count}
        self._quarantine.save()
        self._writer.commit(notes)
        with self._lock:
            self._trouble = None
            self._blocks.committed(submitted)
            del self._submitted[: len(submitted)]

    def _wake(self) -> None:
        self._work_pending = True
        self._came.notify()

    def _check(self) -> None:
        if self._failure is not None:
            raise ServiceError(f"the controller cannot commit any more: {self._failure}")

    def _count(self, scorer_id: str, rows: int) -> None:
        now = time.monotonic()
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
