"""Scoring inside the training: real scorer, real controller and real files in one process."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.config import RunConfig
from deploy.every_epoch import EveryEpoch
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import load_dataset
from shared.models import build_model
from shared.score_store import ScoreReader

CONFIG = RunConfig.model_validate(
    {
        "data": {"name": "digits", "subset": 200},
        "model": {"width": 4},
        "scoring": {"mode": "every_epoch"},
        "controller": {"block_size": 50},
        "train": {"device": "cpu"},
    }
)


class Parts:
    """A run's folder with an EveryEpoch in it."""

    def __init__(self, path: Path) -> None:
        dataset = load_dataset(CONFIG.data)
        self.run = Run.create(
            path / "run",
            dataset_fingerprint=dataset.fingerprint,
            train=dataset.train,
            config=CONFIG.model_dump(mode="json"),
            scoring_id=CONFIG.scoring.scoring_id,
        )
        torch.manual_seed(0)
        self.model = build_model(CONFIG.model, dataset)
        self.said: list[str] = []
        self.stopped = False
        self.publisher = CheckpointPublisher(self.run.path)
        self.scorer = EveryEpoch(CONFIG, self.run, dataset, self.publisher, self.said.append, lambda: self.stopped)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path)
    with made.publisher, made.scorer:
        yield made


def test_every_sample_is_scored_with_the_weights_of_now(parts: Parts) -> None:
    """And the training's own random numbers and model are as they were."""
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    rng = torch.get_rng_state()
    parts.scorer.rescore(parts.model, 10)
    parts.scorer.rescore(parts.model, 20)

    assert np.array_equal(np.full(200, 2), parts.scorer.view().model_version_N)
    assert np.array_equal(np.full(200, 20), ScoreReader(parts.run.scores_uri).dense("step"))
    assert parts.scorer.newest_version() == 2
    assert sorted(parts.scorer.first_seen) == [1, 2]
    assert parts.said == []
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in parts.model.state_dict().items())
    assert parts.model.training


def test_a_pass_that_fails_is_said_and_the_next_one_is_whole(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.scorer.rescore(parts.model, 10)
    with monkeypatch.context() as patch:
        patch.setattr("scorer.worker.score_batch", lambda *_: 1 / 0)
        parts.scorer.rescore(parts.model, 20)
    stood = parts.scorer.view().model_version_N.copy()
    parts.scorer.rescore(parts.model, 30)

    assert np.array_equal(np.full(200, 1), stood)
    assert parts.said == ["the samples could not be scored at step 20, the last scores stand: division by zero"]
    assert np.array_equal(np.full(200, 3), parts.scorer.view().model_version_N)


def test_a_pass_that_is_stopped_changes_no_view(parts: Parts) -> None:
    parts.scorer.rescore(parts.model, 10)
    parts.stopped = True
    parts.scorer.rescore(parts.model, 20)

    assert np.array_equal(np.full(200, 1), parts.scorer.view().model_version_N)
    assert parts.said == []


def test_state_carries_the_view(parts: Parts, tmp_path: Path) -> None:
    parts.scorer.rescore(parts.model, 10)
    state = parts.scorer.state_dict()
    other = Parts(tmp_path / "other")
    with other.publisher, other.scorer:
        other.scorer.load_state_dict(state)
        there, here = other.scorer.view(), parts.scorer.view()

        assert np.array_equal(there.percentile_N, here.percentile_N)
        assert np.array_equal(there.model_version_N, here.model_version_N)
        assert (there.bound, there.abandoned, other.scorer.newest_version()) == (here.bound, here.abandoned, 1)
