"""A scorer: follows the newest checkpoint and scores leased blocks until it is told to stop."""

import datetime
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from scorer.adm import score_batch
from scorer.attacks import Attack, Fgsm, Pgd
from scorer.config import AttackConfig
from shared.checkpoints import Checkpoint, load, stable
from shared.errors import CheckpointCorrupt, CheckpointGone, ServiceError, StateError
from shared.leases import Lease
from shared.schema import MEASURED_COLUMNS, SCORE_SCHEMA

logger = logging.getLogger(__name__)

Batches = Callable[[npt.ArrayLike], tuple[torch.Tensor, torch.Tensor]]
REPLY_TIMEOUT_S = 10.0


class LeaseSource(Protocol):
    """What a scorer needs of the controller, whether it is an object or an actor. Answers come as futures."""

    def lease(self, scorer_id: str, model_version: int) -> "Future[Lease | None]":
        """A block not yet scored at `model_version`; None when there is none."""
        ...

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table) -> "Future[None]":
        """Hand in the rows of a lease."""
        ...

    def release(self, scorer_id: str) -> "Future[None]":
        """Hand back all leases of a scorer."""
        ...


def build_attack(config: AttackConfig) -> Attack:
    if config.name == "fgsm":
        return Fgsm(config.epsilon, config.norm)
    return Pgd(config.epsilon, config.steps, config.step_size or 2.5 * config.epsilon / config.steps, config.norm)


class Worker:
    """Scores blocks: newest verified checkpoint, lease, score, submit, with the next lease already in flight.

    It takes no lease before it holds verified weights. A corrupt checkpoint is skipped and counted, an answer that does
    not come is asked for again; both are logged.

    Args:
        scorer_id: its name with the controller.
        run_uri: the run folder with the checkpoint feed.
        batches: x_BCHW in [0,1] and y_B of sample ids.
        model: a network of the trainer's architecture; the worker's own.
        batch_size: samples per forward pass.
        poll_interval_s: how often an idle worker looks for a new checkpoint.
    """

    def __init__(
        self,
        scorer_id: str,
        run_uri: str,
        leases: LeaseSource,
        batches: Batches,
        model: nn.Module,
        attack: Attack,
        *,
        batch_size: int = 256,
        poll_interval_s: float = 0.05,
        device: str = "cpu",
    ) -> None:
        self.scorer_id = scorer_id
        self._run_uri = run_uri
        self._leases = leases
        self._batches = batches
        self._model = model.to(device).eval()
        self._attack = attack
        self._batch_size = batch_size
        self._poll_interval_s = poll_interval_s
        self._device = device
        self._stop = threading.Event()
        self._checkpoint: Checkpoint | None = None
        self._corrupt: set[int] = set()
        self.scored = 0

    @property
    def model_version(self) -> int:
        """Of the weights it holds; 0 before the first."""
        return self._checkpoint.model_version if self._checkpoint else 0

    @property
    def corrupt_checkpoints(self) -> int:
        return len(self._corrupt)

    def stop(self) -> None:
        """Finish the batch at hand, hand back the leases and return from `run`. May be called from any thread."""
        self._stop.set()

    def run(self) -> int:
        """Score until `stop`; returns the number of samples scored."""
        coming: Future[Lease | None] | None = None
        while not self._stop.is_set():
            self.follow_checkpoints()
            if self._checkpoint is None:
                self._stop.wait(self._poll_interval_s)
                continue
            lease = self._answer(coming or self._leases.lease(self.scorer_id, self.model_version))
            coming = None
            if lease is None:
                self._stop.wait(self._poll_interval_s)
                continue
            coming = self._leases.lease(self.scorer_id, self.model_version)
            rows = self.score(lease.sample_ids)
            if rows is not None:
                self._answer(self._leases.submit(self.scorer_id, lease.lease_id, rows))
        self._answer(self._leases.release(self.scorer_id))
        return self.scored

    def follow_checkpoints(self) -> None:
        """Load the newest stable checkpoint whose checksum holds, if it is newer than the one at hand."""
        for checkpoint in stable(self._run_uri):
            if checkpoint.model_version <= self.model_version:
                return
            if checkpoint.model_version in self._corrupt:
                continue
            try:
                self._model.load_state_dict(load(checkpoint))
            except CheckpointGone:
                continue
            except (CheckpointCorrupt, RuntimeError) as error:  # torch's RuntimeError: weights of another network
                logger.warning("skipping checkpoint %d: %s", checkpoint.model_version, error)
                self._corrupt.add(checkpoint.model_version)
            else:
                self._checkpoint = checkpoint
                return

    def score(self, ids: npt.NDArray[np.int64]) -> pa.Table | None:
        """Score rows of `ids` with the weights at hand; None when stopped on the way."""
        if self._checkpoint is None:
            raise StateError("score before any checkpoint was loaded; call follow_checkpoints first")
        parts = []
        for start in range(0, len(ids), self._batch_size):
            if self._stop.is_set():
                return None
            x_BCHW, y_B = self._batches(ids[start : start + self._batch_size])
            parts.append(score_batch(self._model, x_BCHW.to(self._device), y_B.to(self._device), self._attack))
        measured = {name: np.concatenate([part[name].numpy() for part in parts]) for name in MEASURED_COLUMNS}
        self.scored += len(ids)
        now = np.datetime64(datetime.datetime.now(datetime.UTC).replace(tzinfo=None), "us")
        stamps = {
            "sample_id": ids,
            "model_version": np.full(len(ids), self._checkpoint.model_version),
            "step": np.full(len(ids), self._checkpoint.step),
            "scored_at": pa.array(np.full(len(ids), now)).cast(pa.timestamp("us", tz="UTC")),
        }
        return pa.table({**stamps, **measured}, schema=SCORE_SCHEMA)

    def _answer(self, future: "Future[Lease | None] | Future[None]") -> Lease | None:
        """The future's value; None when the controller does not answer in time, which is logged and not fatal."""
        try:
            return future.result(timeout=REPLY_TIMEOUT_S)
        except (FutureTimeout, ServiceError) as error:
            logger.warning("%s: the controller does not answer (%s)", self.scorer_id, error or "timeout")
            self._stop.wait(self._poll_interval_s)
            return None
