"""Scoring inside the training, at the beginning of each epoch: the trainer waits, draws follow from the seed alone."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from deploy.config import RunConfig
from scorer.worker import Worker, build_attack
from services.controller import Controller
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import Dataset
from shared.errors import SteppeError
from shared.leases import Lease
from shared.models import build_model
from shared.score_store import ScoreReader
from trainer.feed import ScoreView
from trainer.loop import pick_device

logger = logging.getLogger(__name__)

SCORER_ID = "trainer"


class EveryEpoch:
    """A scorer and a controller without processes of their own: `trainer.feed.Scores` and `trainer.loop.EpochScorer`.

    Scores reach the run's store as ever. When that fails, or publishing does, such as on a full disk, it is said and
    the last view stands.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        dataset: Dataset,
        publisher: CheckpointPublisher,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        scoring, device = config.scoring, pick_device(config.train.device)
        self._publisher, self._say, self._stopped = publisher, say, stopped
        self._controller = Controller(str(run.path), run.num_samples, scoring.scoring_id, config.controller, wanted=1)
        with torch.random.fork_rng(devices=[]):  # its weights come from checkpoints; the trainer's draws stay its own
            model = build_model(config.model, dataset)
        self._worker = Worker(
            SCORER_ID,
            str(run.path),
            _Leases(self._controller),
            dataset.train.batch,
            model,
            build_attack(scoring.attack),
            batch_size=scoring.batch_size,
            device=str(device),
        )
        self._reader = ScoreReader(run.scores_uri)
        self._view = ScoreView.empty(run.num_samples)
        self._newest = 0
        self.first_seen: dict[int, float] = {}

    def view(self) -> ScoreView:
        return self._view

    def newest_version(self) -> int:
        return self._newest

    def status(self) -> dict[str, Any]:
        return self._controller.status()

    def rescore(self, model: nn.Module, step: int) -> None:
        """Publish the weights of `model` and score all samples with them; afterwards `view` holds these scores."""
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # scoring_id says float32
        try:
            version = self._publisher.publish(model, step)
            self._publisher.flush()
            while not self._stopped() and self._worker.work():
                pass
            self._controller.flush()
            self._reader.refresh()
        except Exception as error:  # whatever it is, the training goes on
            logger.exception("the samples could not be scored")
            self._say(f"the samples could not be scored at step {step}, the last scores stand: {error}")
        else:
            if self._stopped():  # perhaps before all were scored; a resume scores them again
                return
            if (oldest := self._controller.status()["oldest_block_version"]) < version:
                self._say(f"not all samples could be scored at step {step}; some have scores of version {oldest}")
            self._view, self._newest = ScoreView.read(self._reader, "adm"), version
            self.first_seen[version] = time.monotonic()
        finally:
            self._worker.hand_back()  # a failed pass must not hold blocks of the next one
            torch.backends.cudnn.allow_tf32 = tf32

    def state_dict(self) -> dict[str, Any]:
        """The view that the coming draws follow; the store may hold later rows by the time of a resume."""
        view = self._view
        return {
            "store_version": view.store_version,
            "percentile": torch.tensor(view.percentile_N),
            "model_version": torch.tensor(view.model_version_N),
            "bound": view.bound,
            "abandoned": view.abandoned,
            "newest": self._newest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        abandoned = tuple((int(first), int(last)) for first, last in state["abandoned"])
        self._view = ScoreView(
            int(state["store_version"]),
            state["percentile"].numpy().copy(),
            state["model_version"].numpy().copy(),
            int(state["bound"]),
            abandoned,
        ).frozen()
        self._newest = int(state["newest"])

    def __enter__(self) -> "EveryEpoch":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._controller.close()
        except SteppeError as error:
            self._say(f"the last scores are missing: {error}")


class _Leases:
    """The controller's leases for a scorer in the same process: answers that are there at once."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def lease(self, scorer_id: str, model_version: int) -> "Future[Lease | None]":
        return _answered(self._controller.lease, scorer_id, model_version)

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table, failed: Mapping[int, str]) -> "Future[None]":
        return _answered(self._controller.submit, scorer_id, lease_id, rows, failed)

    def release(self, scorer_id: str) -> "Future[Any]":
        return _answered(self._controller.release, scorer_id)

    def report(self, scorer_id: str, event: str, detail: str) -> "Future[None]":
        return _answered(self._controller.report, scorer_id, event, detail)


def _answered(call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    answer: Future[Any] = Future()
    try:
        answer.set_result(call(*arguments))
    except Exception as error:
        answer.set_exception(error)
    return answer
