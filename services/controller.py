"""The controller: the one owner of leases, commits and the wanted number of scorers.

A plain class; deploy makes an actor of it. Scorers call `lease` and `submit`, the driver calls `decide` and carries the
decisions out, REST calls `status` and `set_wanted`. Commits run in a thread of the controller's own.
"""

import collections
import dataclasses
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from services.audit import Audit, comparable, fidelity
from services.autoscaler import Autoscaler, checkpoints_after
from services.blocks import BlockTable
from services.config import ControllerConfig
from services.passes import Passes
from services.quarantine import Quarantine
from shared.attempts import abandoned
from shared.attempts import count as count_attempts
from shared.errors import ConfigError, Fenced, ServiceError, SteppeError
from shared.events import Events
from shared.freshness import ABANDONED, age_versions
from shared.leases import MAX_REPLICAS, Lease
from shared.measures import find_measure
from shared.schema import FLOAT_COLUMNS
from shared.score_store import ScoreReader, ScoreWriter
from shared.storage import Folder, local_path

logger = logging.getLogger(__name__)

EVENT_INTERVAL_S = 1.0
NOT_FINITE = "a measured value is not finite"
RATE_WINDOW_S = 10.0
ATTEMPTS_AT_CLOSE = 5
NAME = "controller"  # in its own reports


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
        wanted: scorers to begin with; a controller restarted within an attempt goes on with as many as there were.
        measure: that audits compare; `adm` in place of one that a row alone has no value of.
    """

    def __init__(
        self,
        run_uri: str,
        num_samples: int,
        scoring_id: str,
        config: ControllerConfig,
        *,
        wanted: int = 1,
        measure: str = "adm",
    ) -> None:
        self._config = config
        self._run = Folder(local_path(run_uri))
        scores = self._run.path / "scores"
        left_behind = abandoned(self._run.path)  # this and the next may fail: before the takeover
        self._quarantine = Quarantine(self._run)
        self._writer = ScoreWriter(scores, num_samples, scoring_id=scoring_id, retention=config.retention)
        self._blocks = BlockTable(num_samples, config.block_size, config.permutation_seed)
        reader = ScoreReader(scores)
        version_N = reader.dense("model_version")
        is_abandoned_N = age_versions(version_N, 0, left_behind) == ABANDONED
        self._blocks.restore(np.where(is_abandoned_N, 0, version_N))
        self._events = Events(self._run.path)
        self._reports: collections.Counter[str] = collections.Counter(reader.metadata.get("reports", {}))
        self._attempt = count_attempts(self._run.path)
        of_attempt = reader.metadata if reader.metadata.get("attempt") == self._attempt else {}
        self._wanted = int(of_attempt.get("wanted", wanted))
        logger.info("opened the score store at version %d, %d scorers wanted", self._writer.version, self._wanted)
        self._scorers: dict[str, dict[str, Any]] = {}
        self._waiting = ""
        self._submitted: list[tuple[int, int, int]] = []  # lease, block, model_version of rows not yet committed
        self._work_pending = False  # rows, or notes, that are not committed
        self._passes = Passes(len(self._blocks), reader.metadata)
        self._audit = Audit(num_samples, config.audit_share, config.permutation_seed, reader.metadata.get("fidelity"))
        self._audit.pass_over(int(reader.metadata.get("newest_scored_version", 0)))  # its rows are in the store already
        wish = self._wanted if of_attempt.get("wished") else None
        self._autoscaler = Autoscaler(config.autoscale, num_samples, config.block_size, len(self._audit), wish)
        self._audit_timeout_s = config.lease_timeout_s * max(1.0, len(self._audit) / config.block_size)
        self._measure = measure if find_measure(measure).of_one_row else "adm"
        self._audit_reader: ScoreReader | None = None
        self._auditing = threading.Lock()
        self._audited_rows = int(reader.metadata.get("audited_rows", 0))
        self._audit_untold: dict[str, Any] = {}
        self._audit_told_at = -math.inf
        self._quarantine.count = int(reader.metadata.get("quarantined_rows", 0))
        self._told, self._told_at = (self._writer.version, self._writer.rows), 0.0
        self._rates: collections.deque[tuple[float, int]] = collections.deque()
        self._first_lease = self._last_submit = 0.0
        self._received = 0
        self._trouble: Exception | None = None  # the last commit failed and is tried again
        self._failure: Exception | None = None  # no commit is possible any more
        self._lock = threading.RLock()
        self._came = threading.Condition(self._lock)
        self._committing = threading.Lock()
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
        """The audit's samples, or a block not yet scored at `model_version`; None when there is none now.

        A scorer that registered with an earlier life of this controller is registered again.
        """
        with self._lock:
            self._check()
            self.register(scorer_id, pid)
            self._scorers[scorer_id]["model_version"] = model_version
            now = time.monotonic()
            self._first_lease = self._first_lease or now
            if not self._writer.rows:
                self._audit.pass_over(model_version)
            audit = self._audit.lease(scorer_id, model_version, now, self._audit_timeout_s)
            lease = audit or self._blocks.lease(scorer_id, model_version, now, self._config.lease_timeout_s)
            if lease is not None:
                self._autoscaler.leased(scorer_id, lease.lease_id, now)
            return lease

    def submit(
        self, scorer_id: str, lease_id: int, rows: pa.Table, failed: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        """Rows of a lease. Rows of an expired lease are welcome too: the store keeps the latest whoever scored it.

        Non-finite rows go to quarantine, counted, and never to the store; `failed` holds the reasons of those samples
        that could not be scored at all. Rows of an audit go nowhere: they are compared with the store's.
        """
        version = int(rows.column("model_version")[0].as_py()) if rows.num_rows else 0
        with self._lock:
            self._check()
            ids = rows.column("sample_id").to_numpy()
            block = self._blocks.block_of(ids)
            is_audit = self._audit.submitted(lease_id, ids, version, is_block=block is not None)
            if is_audit:
                self._audited_rows += rows.num_rows
            else:
                self._take(scorer_id, rows, failed)
            if block is not None and not is_audit:  # also of a lease that has expired, or that an earlier life gave
                self._blocks.submitted(lease_id, block, scorer_id)
                self._submitted.append((lease_id, block, version))
                self._passes.scored(block, version)
            self._count(scorer_id, lease_id, rows.num_rows)
            self._wake()
        if is_audit:
            self._compare(rows, version)

    def report(self, scorer_id: str, event: str, detail: str) -> None:
        """Something that people should hear of, such as a checkpoint that was skipped; counted by its name."""
        logger.warning("%s: %s: %s", scorer_id, event, detail)
        self._events.append(event, scorer_id=scorer_id, detail=detail)
        with self._lock:
            self._reports[event] += 1
            self._wake()

    def release(self, scorer_id: str) -> int:
        """A scorer hands back its leases; returns how many."""
        with self._lock:
            return self._blocks.release(scorer_id) + self._audit.release(scorer_id)

    # -- driver ----------------------------------------------------------------------------------------------------

    def decide(self, alive: tuple[str, ...], waiting: str = "") -> list[Decision]:
        """What to do about the scorers that the driver says are `alive` (starting ones included, draining ones not).

        Args:
            waiting: why some of them are not up, for people.
        """
        self._autoscale()
        with self._lock:
            self._check()
            self._waiting = waiting
            for gone in set(self._scorers) - set(alive):
                self.release(gone)
                self._autoscaler.forget(gone)
                del self._scorers[gone]
            surplus = len(alive) - self._wanted
            if surplus < 0:
                return [Start(-surplus)]
            return [Drain(alive[-surplus:])] if surplus > 0 else []

    def set_wanted(self, replicas: int) -> None:
        """Somebody's wish: it holds, and ends autoscaling in this attempt. Raises ConfigError outside 0..1024."""
        if not 0 <= replicas <= MAX_REPLICAS:
            raise ConfigError(
                f"replicas is {replicas}, outside 0..{MAX_REPLICAS}",
                fix=f"ask for a number in 0..{MAX_REPLICAS}",
                key="replicas",
            )
        with self._lock:
            before, self._wanted = self._wanted, replicas
            self._autoscaler.wish(replicas)
            self._wake()
        self._events.append("scaled", wanted=replicas, before=before, reason="asked for")

    def status(self) -> dict[str, Any]:
        """Numbers for people and REST."""
        with self._lock:
            trouble = _for_operators(self._failure) if self._failure else self._trouble
            return {
                "pid": os.getpid(),
                "wanted": self._wanted,
                "autoscaler": self._autoscaler.status(),
                "scorers": [dict(scorer) for scorer in self._scorers.values()],
                "blocks": len(self._blocks),
                "leased": self._blocks.leased + self._audit.leased,
                "leases_expired": self._blocks.expired + self._audit.expired,
                "oldest_block_version": self._blocks.oldest_version,
                "store_version": self._writer.version,
                "rows_received": self._received,
                "samples_per_second": self._rate(),
                "samples_per_second_mean": self._received / max(self._last_submit - self._first_lease, 1e-9),
                "audited_rows": self._audited_rows,
                "fidelity": self._fidelity(),
                "quarantined_rows": self._quarantine.count,
                "reports": dict(self._reports),
                "waiting": self._waiting or None,
                "trouble": str(trouble or "") or None,
            }

    @property
    def is_lost(self) -> bool:
        """Whether it can commit no more, though a new one could: it was not fenced off."""
        return self._failure is not None and not isinstance(self._failure, Fenced)

    def flush(self) -> None:
        """Commit what came in, now. Raises OSError when that is not possible, and the rows stay pending; or Fenced."""
        with self._lock:
            self._check()
        try:
            self._commit()
        except OSError as error:
            with self._lock:
                self._trouble = error
                self._wake()
            raise

    def close(self) -> None:
        """Commit what came in and end. Raises ServiceError when that is not possible."""
        with self._lock:
            self._closing = True
            self._came.notify()
        self._thread.join()
        self._check()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _autoscale(self) -> None:
        """When it is time, look for new checkpoints, which needs files and so no lock, and decide."""
        with self._lock:
            now, newest = time.monotonic(), self._autoscaler.newest_version
            if not self._autoscaler.is_due(now):
                return
        try:
            news = checkpoints_after(self._run.path, newest)
        except OSError as error:  # scorers report it too
            logger.warning("the checkpoints cannot be listed, and %d scorers stay wanted: %s", self._wanted, error)
            return
        with self._lock:
            if not self._autoscaler.is_on:  # somebody asked for a number meanwhile
                return
            self._autoscaler.published(news, now)
            scaling = self._autoscaler.decide(self._wanted, self._blocks.oldest_version, now)
            before, self._wanted = self._wanted, scaling.wanted
            if scaling.wanted == before:
                return
            self._wake()
        logger.info("%d scorers wanted after %d: %s", scaling.wanted, before, scaling.reason)
        self._events.append("scaled", wanted=scaling.wanted, before=before, reason=scaling.reason)

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
                    self._tell_commits(at_least_after_s=0.0)
                    self._tell_audits(at_least_after_s=0.0)
                    return
            except OSError as error:  # such as a full disk: the rows are still pending
                logger.exception("a commit failed, it is tried again")
                if self._trouble is None:
                    self._events.append("commit_failed", reason=str(error))
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
        with self._committing:
            with self._lock:
                self._work_pending = False
                submitted = list(self._submitted)
                notes = self._passes.notes() | {
                    **self._autoscaler.notes(self._wanted),
                    "attempt": self._attempt,
                    "quarantined_rows": self._quarantine.count,
                    "audited_rows": self._audited_rows,
                    "reports": dict(self._reports),
                }
                if (audits := self._fidelity()) is not None:
                    notes["fidelity"] = audits
            self._quarantine.save()
            self._writer.commit(notes)
            self._tell_commits(at_least_after_s=EVENT_INTERVAL_S)
            self._tell_audits(at_least_after_s=EVENT_INTERVAL_S)
            with self._lock:
                self._trouble = None
                self._blocks.committed(submitted)
                del self._submitted[: len(submitted)]

    def _tell_commits(self, at_least_after_s: float) -> None:
        """One line in the diary for the commits since the last line."""
        version, rows = self._told
        if self._writer.version > version and time.monotonic() - self._told_at >= at_least_after_s:
            self._told, self._told_at = (self._writer.version, self._writer.rows), time.monotonic()
            self._events.append(
                "committed",
                store_version=self._writer.version,
                commits=self._told[0] - version,
                rows=self._told[1] - rows,
            )

    def _tell_audits(self, at_least_after_s: float) -> None:
        """One line in the diary for the latest audit; what one before it said is in the notes' mean, min and count."""
        with self._lock:
            if not self._audit_untold or time.monotonic() - self._audit_told_at < at_least_after_s:
                return
            facts, self._audit_untold, self._audit_told_at = self._audit_untold, {}, time.monotonic()
        self._events.append("audited", **facts)

    def _compare(self, rows: pa.Table, version: int) -> None:
        """Fresh rows of the audit's samples with the committed ones: outside the lock, since it reads the store."""
        with self._auditing:
            if not self._audit.is_news(version):
                return
            try:
                if self._audit_reader is None:
                    self._audit_reader = ScoreReader(self._run.path / "scores")
                self._audit_reader.refresh()
                known = self._audit_reader.lookup(self._audit.compared_ids)
            except (OSError, SteppeError) as error:
                self.report(NAME, "audit_skipped", f"version {version}: the score store cannot be read: {error}")
                return
            store_value_S = self._values(known)
            store_version_S = known.column("model_version").fill_null(-1).to_numpy()
            rows = rows.sort_by("sample_id")  # as the audit's ids are
            fresh_value_A = np.where(_is_finite(rows), self._values(rows), np.nan)
            value = fidelity(store_value_S, store_version_S, fresh_value_A)
            samples = int(comparable(store_value_S, store_version_S, fresh_value_A).sum())
            with self._lock:
                self._audit.compared(version, value)
                if value is None:
                    logger.info("version %d cannot be audited: %d comparable samples", version, samples)
                else:
                    found = {"model_version": version, "fidelity": value, "samples": samples}
                    self._audit_untold = found | {"measure": self._measure}
                self._wake()
        self._tell_audits(at_least_after_s=EVENT_INTERVAL_S)

    def _fidelity(self) -> dict[str, Any] | None:
        """The audits so far, and of which measure they are; None before the first."""
        notes = self._audit.notes()
        return notes and notes | {"measure": self._measure}

    def _values(self, rows: pa.Table) -> npt.NDArray[np.float64]:
        rule = find_measure(self._measure)
        columns = {name: rows.column(name).to_numpy() for name in rule.columns}
        return np.asarray(rule.rank(columns), dtype=np.float64)

    def _take(self, scorer_id: str, rows: pa.Table, failed: Mapping[int, str]) -> None:
        """Finite rows for the store, the others for the quarantine."""
        finite = _is_finite(rows)
        if not finite.all():
            self._put_in_quarantine(scorer_id, rows.filter(pa.array(~finite)), failed)
            rows = rows.filter(pa.array(finite))
        self._writer.append(rows)

    def _wake(self) -> None:
        self._work_pending = True
        self._came.notify()

    def _put_in_quarantine(self, scorer_id: str, rows: pa.Table, failed: Mapping[int, str]) -> None:
        reasons = [failed.get(sample_id, NOT_FINITE) for sample_id in rows.column("sample_id").to_pylist()]
        self._quarantine.add(rows, reasons)
        for reason, count in collections.Counter(reasons).items():
            self._events.append("quarantine", scorer_id=scorer_id, rows=count, reason=reason)

    def _check(self) -> None:
        if (failure := self._failure) is not None:
            told = _for_operators(failure)
            problem = f"the controller cannot commit any more: {told.problem}"
            raise ServiceError(problem, fix=told.fix, key=told.key) from failure

    def _count(self, scorer_id: str, lease_id: int, rows: int) -> None:
        now = time.monotonic()
        self._autoscaler.submitted(scorer_id, lease_id, rows, now)
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


def _for_operators(failure: Exception) -> SteppeError:
    """The failure with a fix for people who cannot open another writer."""
    if isinstance(failure, Fenced):
        fix = "find out which other process writes to this run, end it, and start the run again with --resume"
        return Fenced(failure.problem, fix=fix, key=failure.key)
    if isinstance(failure, SteppeError):
        return failure
    return SteppeError(str(failure), fix="look into the controller's log for the reason")


def _is_finite(rows: pa.Table) -> npt.NDArray[np.bool_]:
    finite = np.ones(rows.num_rows, dtype=bool)
    for name in FLOAT_COLUMNS:
        finite &= np.isfinite(rows.column(name).to_numpy())
    return finite
