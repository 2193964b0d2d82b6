"""Scoring inside the training, at the beginning of each epoch: the trainer waits, draws follow from the seed alone."""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from deploy.config import RunConfig
from scorer.worker import Worker, build_attack
from services.controller import Controller
from shared.attempts import Ranges, abandoned
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import Dataset
from shared.errors import SteppeError
from shared.leases import Lease
from shared.models import build_model
from shared.ranking import rank_correlation
from shared.score_store import ScoreReader
from shared.tracking import Tracker
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
        unaudited = config.controller.model_copy(update={"audit_share": 0.0})  # no score is stale here
        self._controller = Controller(str(run.path), run.num_samples, scoring.scoring_id, unaudited, wanted=1)
        with torch.random.fork_rng(devices=[]):  # its weights come from checkpoints; the trainer's draws stay its own
            model = build_model(config.model, dataset)
        self._worker = Worker(
            SCORER_ID,
            str(run.path),
            LocalLeases(self._controller),
            dataset.train.batch,
            model,
            build_attack(scoring.attack),
            batch_size=scoring.batch_size,
            device=str(device),
        )
        self._run_path = run.path
        self._reader = ScoreReader(run.scores_uri)
        curriculum = config.train.curriculum
        self._tracker = Tracker(curriculum.measure, curriculum.memory)
        self._delay = scoring.delay_versions
        self._views = collections.deque([ScoreView.empty(run.num_samples)], maxlen=scoring.delay_versions + 1)
        self._newest = 0
        self._fidelity: list[float] = []
        self.first_seen: dict[int, float] = {}

    def view(self) -> ScoreView:
        """The newest view; with `delay_versions` one so much older, and until there is one, no scores.

        What is delayed on purpose is not stale for it: the bound moves along.
        """
        return self._views[0]

    def newest_version(self) -> int:
        return self._newest

    def status(self) -> dict[str, Any]:
        """The controller's, with a fidelity of its own: rank correlation of the view in use with the new scores.

        These replace it, so that even fresh scores have been used for an epoch by then.
        """
        fidelity = fidelity_notes(self._fidelity)
        return self._controller.status() | {"fidelity": fidelity and fidelity | {"measure": self._tracker.measure}}

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
            if not self._stopped():  # perhaps before all were scored; a resume scores them again
                self._look(version, step)
        except Exception as error:  # whatever it is, the training goes on
            logger.exception("the samples could not be scored")
            self._say(f"the samples could not be scored at step {step}, the last scores stand: {error}")
        finally:
            self._worker.hand_back()  # a failed pass must not hold blocks of the next one
            torch.backends.cudnn.allow_tf32 = tf32

    def _look(self, version: int, step: int) -> None:
        """Take over what the store holds now."""
        self._reader.refresh()
        new = ScoreView.read(self._reader, self._tracker)
        if (oldest := self._controller.status()["oldest_block_version"]) < version:
            self._say(f"not all samples could be scored at step {step}; some have scores of version {oldest}")
        used = rank_correlation(self.view().percentile_N, new.percentile_N)
        self._fidelity += [used] if used is not None else []
        self._views.append(dataclasses.replace(new, bound=new.bound + self._delay))
        self._newest = version
        self.first_seen[version] = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The views that the coming draws follow; the store may hold later rows by the time of a resume."""
        return {
            "views": [_tensors(vars(view)) for view in self._views],
            "tracker": _tensors(self._tracker.state_dict()),
            "newest": self._newest,
            "fidelity": self._fidelity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        left_behind = abandoned(self._run_path)  # since the views were read: such versions count in no age
        self._views.clear()
        self._views.extend(_view(view, left_behind) for view in state["views"])
        self._tracker.load_state_dict(_arrays(state["tracker"]))
        self._newest = int(state["newest"])
        self._fidelity = list(state["fidelity"])

    def __enter__(self) -> "EveryEpoch":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._controller.close()
        except SteppeError as error:
            self._say(f"the last scores are missing: {error}")


def fidelity_notes(values: Sequence[float]) -> dict[str, Any] | None:
    """As the controller's audits tell it."""
    if not values:
        return None
    return {"latest": values[-1], "mean": sum(values) / len(values), "min": min(values), "count": len(values)}


def _tensors(state: Any) -> Any:
    """`state` with tensors in place of arrays, as `torch.load` takes it."""
    if isinstance(state, np.ndarray):
        return torch.tensor(state)
    if isinstance(state, dict):
        return {key: _tensors(value) for key, value in state.items()}
    return state


def _arrays(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.numpy().copy()
    if isinstance(state, dict):
        return {key: _arrays(value) for key, value in state.items()}
    return state


def _view(state: dict[str, Any], left_behind: Ranges) -> ScoreView:
    return ScoreView(**_arrays(state) | {"abandoned": left_behind}).frozen()


class LocalLeases:
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
