"""A scorer: follows the newest checkpoint and scores leased blocks until it is told to stop."""

import contextlib
import datetime
import logging
import operator
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from scorer.adm import score_batch
from scorer.attacks import Attack, Fgsm, Pgd
from scorer.batches import BatchScorer, Ids, one_line
from scorer.config import AttackConfig
from shared.checkpoints import Checkpoint, load, stable
from shared.errors import CheckpointGone, DataError, ServiceError, StateError
from shared.leases import Lease
from shared.models import place
from shared.schema import SCORE_SCHEMA

logger = logging.getLogger(__name__)

Batches = Callable[[npt.ArrayLike], tuple[torch.Tensor, torch.Tensor]]
REPLY_TIMEOUT_S = 10.0
RELEASE_TIMEOUT_S = 1.0


class LeaseSource(Protocol):
    """What a scorer needs of the controller, whether it is an object or an actor. Answers come as futures."""

    def lease(self, scorer_id: str, model_version: int) -> "Future[Lease | None]":
        """A block not yet scored at `model_version`; None when there is none."""
        ...

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table, failed: Mapping[int, str]) -> "Future[None]":
        """Hand in the rows of a lease, all of them.

        `failed` says why some samples could not be scored; their rows hold NaN, predicted -1, not correct, not robust.
        """
        ...

    def release(self, scorer_id: str) -> "Future[None]":
        """Hand back all leases of a scorer."""
        ...

    def report(self, scorer_id: str, event: str, detail: str) -> "Future[None]":
        """Say what people should hear of: checkpoint_skipped or batch_halved. Nobody waits for the answer."""
        ...


def build_attack(config: AttackConfig) -> Attack:
    if config.name == "fgsm":
        return Fgsm(config.epsilon, config.norm, config.valid)
    step_size = config.step_size or 2.5 * config.epsilon / config.steps
    return Pgd(config.epsilon, config.steps, step_size, config.norm, config.valid)


class Worker:
    """Scores blocks: newest verified checkpoint, lease, score, submit, with the next lease already in flight.

    It takes no lease before it holds verified weights. A checkpoint that cannot be used is skipped, counted and
    reported; batches that do not fit into memory become smaller, which is reported; samples that cannot be scored are
    handed in with the reason (`scorer.batches` says when that ends the scorer instead). An answer that does not come is
    asked for again, which is logged.

    Args:
        scorer_id: its name with the controller.
        run_uri: the run folder with the checkpoint feed.
        batches: x_B... inside the attack's clamp range and y_B of sample ids; may raise for some of them.
        model: a network of the trainer's architecture; the worker's own.
        batch_size: samples per forward pass, as long as they fit into memory.
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
        self._model = place(model, torch.device(device)).eval()
        self._attack = attack
        self._scorer = BatchScorer(self._measure, batch_size, lambda how: self._report("batch_halved", how))
        self._poll_interval_s = poll_interval_s
        self._device = device
        self._stop = threading.Event()
        self._stopped: Future[None] = Future()  # done when _stop is set; can be waited for together with an answer
        self._coming: Future[Lease | None] | None = None  # the next lease, already in flight
        self._checkpoint: Checkpoint | None = None
        self._corrupt: set[int] = set()
        self._feed_trouble = ""
        self.scored = 0

    @property
    def model_version(self) -> int:
        """Of the weights it holds; 0 before the first."""
        return self._checkpoint.model_version if self._checkpoint else 0

    @property
    def corrupt_checkpoints(self) -> int:
        """Skipped because they were damaged or of another network."""
        return len(self._corrupt)

    @property
    def batch_size(self) -> int:
        """Samples per forward pass now."""
        return self._scorer.batch_size

    def stop(self) -> None:
        """Finish the batch at hand, hand back the leases and return from `run`. May be called from any thread."""
        self._stop.set()
        with contextlib.suppress(InvalidStateError):  # of a second call
            self._stopped.set_result(None)

    def run(self) -> int:
        """Score until `stop`; returns the number of samples scored."""
        while not self._stop.is_set():
            if not self.work():
                self._stop.wait(self._poll_interval_s)
        self.hand_back()
        return self.scored

    def hand_back(self) -> None:
        """Give the leases back, the one in flight too."""
        self._coming = None
        self._value(self._leases.release(self.scorer_id), RELEASE_TIMEOUT_S)

    def work(self) -> bool:
        """Score one block with the newest checkpoint; False when there is nothing to do now."""
        self.follow_checkpoints()
        if self._checkpoint is None:
            return False
        coming, self._coming = self._coming, None
        lease = self._answer(coming or self._leases.lease(self.scorer_id, self.model_version))
        if lease is None:
            return False
        self._coming = self._leases.lease(self.scorer_id, self.model_version)
        scored = self.score(lease.sample_ids)
        if scored is not None:
            self._answer(self._leases.submit(self.scorer_id, lease.lease_id, *scored))
        return True

    def follow_checkpoints(self) -> None:
        """Load the newest stable checkpoint that can be used, if it is newer than the one at hand."""
        try:
            for checkpoint in stable(self._run_uri, self._skip):
                if checkpoint.model_version <= self.model_version or self._take(checkpoint):
                    break
        except OSError as error:  # the folder cannot be read now: go on with the weights at hand
            trouble = one_line(error)
            if trouble != self._feed_trouble:
                self._report("checkpoint_skipped", f"the checkpoints cannot be listed: {trouble}")
            self._feed_trouble = trouble
        else:
            self._feed_trouble = ""

    def score(self, ids: Ids) -> tuple[pa.Table, dict[int, str]] | None:
        """Score rows of `ids` with the weights at hand, and why some could not be scored; None when stopped on the way.

        Raises: what scoring raises when it is not the samples' fault (`scorer.batches.BatchScorer`).
        """
        if self._checkpoint is None:
            raise StateError("score before any checkpoint was loaded", fix="call follow_checkpoints first")
        scored = self._scorer.score(ids, self._stop.is_set)
        if scored is None:
            return None
        measured, failed = scored
        self.scored += len(ids) - len(failed)
        now = np.datetime64(datetime.datetime.now(datetime.UTC).replace(tzinfo=None), "us")
        stamps = {
            "sample_id": ids,
            "model_version": np.full(len(ids), self._checkpoint.model_version),
            "step": np.full(len(ids), self._checkpoint.step),
            "scored_at": pa.array(np.full(len(ids), now)).cast(pa.timestamp("us", tz="UTC")),
        }
        return pa.table({**stamps, **measured}, schema=SCORE_SCHEMA), failed

    def _measure(self, ids: Ids) -> dict[str, torch.Tensor]:
        x_BCHW, y_B = self._batches(ids)
        if len(y_B) != len(ids):
            raise DataError(
                f"the data set gives {len(y_B)} samples for {len(ids)} ids",
                fix="let it give one for each",
                key="batches",
            )
        return score_batch(self._model, x_BCHW.to(self._device), y_B.to(self._device), self._attack)

    def _take(self, checkpoint: Checkpoint) -> bool:
        """Load it; False, the weights at hand untouched, when it cannot be used."""
        if checkpoint.model_version in self._corrupt:
            return False
        try:
            state = load(checkpoint)
            _check_fits(self._model, state)
            operator.index(checkpoint.step)
            self._model.load_state_dict(state)
        except CheckpointGone:
            return False
        except Exception as error:  # a damaged file can raise anything, and the next checkpoint may be good
            self._skip(checkpoint.model_version, error)
            return False
        self._checkpoint = checkpoint
        return True

    def _skip(self, version: int, error: Exception) -> None:
        """Count and report, once, a checkpoint that cannot be used."""
        if version not in self._corrupt:
            self._corrupt.add(version)
            self._report("checkpoint_skipped", f"version {version}: {one_line(error)}")

    def _report(self, event: str, detail: str) -> None:
        logger.warning("%s: %s: %s", self.scorer_id, event, detail)
        with contextlib.suppress(Exception):  # a report that gets lost must not stop the scoring
            self._leases.report(self.scorer_id, event, detail)

    def _answer(self, future: "Future[Lease | None] | Future[None]") -> Lease | None:
        """The future's value; None when the controller does not answer in time, or not before `stop`."""
        either: list[Future[Any]] = [future, self._stopped]
        wait(either, timeout=REPLY_TIMEOUT_S, return_when=FIRST_COMPLETED)
        if self._stop.is_set() and not future.done():
            return None
        return self._value(future, 0.0)

    def _value(self, future: "Future[Lease | None] | Future[None]", timeout_s: float) -> Lease | None:
        """The future's value; None when there is none within `timeout_s`, which is logged and not fatal."""
        try:
            return future.result(timeout_s)
        except (FutureTimeout, ServiceError) as error:
            logger.warning("%s: the controller does not answer (%s)", self.scorer_id, error or "timeout")
            self._stop.wait(self._poll_interval_s)
            return None


def _check_fits(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raises StateError for weights of another network. `load_state_dict` would notice only after copying some."""
    ours = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    theirs = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        name = wrong[0]
        raise StateError(
            f"weights of another network: {len(wrong)} tensors differ, such as {name}, which is "
            f"{theirs.get(name, 'missing')} in the checkpoint and {ours.get(name, 'unknown')} in the model",
            fix="give the scorer the trainer's network",
            key=name,
        )
