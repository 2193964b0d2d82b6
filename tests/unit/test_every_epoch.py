"""Scoring inside the training: real scorer, real controller and real files in one process."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy.config import RunConfig
from deploy.every_epoch import EveryEpoch
from shared.attempts import begin
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import load_dataset
from shared.models import build_model
from shared.ranking import rank_correlation
from shared.score_store import ScoreReader
from trainer.comm import ALONE
from trainer.loop import TrainResult, train
from trainer.state import StateSaver, load_newest_state

CONFIG = RunConfig.model_validate(
    {
        "data": {"name": "digits", "subset": 200},
        "model": {"width": 4},
        "scoring": {"mode": "every_epoch"},
        "controller": {"block_size": 50},
        "train": {"device": "cpu"},
    }
)


DELAYED = RunConfig.model_validate(
    CONFIG.model_dump()
    | {"scoring": {"mode": "every_epoch", "delay_versions": 2}}
    | {
        "train": {
            "device": "cpu",
            "threads": 1,
            "epochs": 5,
            "batch_size": 50,
            "save_interval_s": 1e9,
            "save_every_steps": 8,
            "curriculum": {"memory": 0.5, "strength": 2.0, "fade_until": 1.0, "guard": "aside", "guard_floor": 0.0},
        }
    }
)


def delayed(config: RunConfig, versions: int) -> RunConfig:
    return config.model_copy(update={"scoring": config.scoring.model_copy(update={"delay_versions": versions})})


class Parts:
    """A run's folder with an EveryEpoch in it."""

    def __init__(self, path: Path, config: RunConfig = CONFIG) -> None:
        self.dataset = dataset = load_dataset(config.data)
        is_there = (path / "run" / "run.json").exists()
        self.run = (
            Run(path / "run")
            if is_there
            else Run.create(
                path / "run",
                dataset_fingerprint=dataset.fingerprint,
                train=dataset.train,
                config=config.model_dump(mode="json"),
                scoring_id=config.scoring.scoring_id,
            )
        )
        torch.manual_seed(0)
        self.model = build_model(config.model, dataset)
        self.said: list[str] = []
        self.stopped = False
        self.publisher = CheckpointPublisher(self.run.path)
        self.scorer = EveryEpoch(config, self.run, dataset, self.publisher, self.said.append, lambda: self.stopped)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def shaken(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Other weights, so that scores differ from version to version."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model


def test_delayed_views_are_so_many_versions_old_and_not_stale_for_it(tmp_path: Path) -> None:
    """In epoch e the scores of version e - 2; none in the first three epochs."""
    parts = Parts(tmp_path, DELAYED)
    used, ages, newest = [], [], []
    with parts.publisher, parts.scorer as scorer:
        for epoch in range(5):
            if epoch:
                scorer.rescore(shaken(parts.model, epoch), 10 * epoch)
            view = scorer.view()
            used.append(set(view.model_version_N.tolist()))
            newest.append(scorer.newest_version())
            ages.append((set(view.ages(scorer.newest_version()).tolist()), view.bound))

    assert used == [{-1}, {-1}, {-1}, {1}, {2}]
    assert newest == [0, 1, 2, 3, 4]
    assert ages[3:] == [({2}, 4 + 2)] * 2


@pytest.mark.parametrize("delay", [0, 2])
def test_fidelity_compares_the_scores_in_use_with_the_new_ones(tmp_path: Path, delay: int) -> None:
    parts = Parts(tmp_path, delayed(CONFIG, delay))
    expected = []
    with parts.publisher, parts.scorer as scorer:
        assert scorer.status()["fidelity"] is None

        for version in range(1, 5):
            in_use = scorer.view()
            scorer.rescore(shaken(parts.model, version), version)
            new_N = ScoreReader(parts.run.scores_uri).dense("log_ratio").astype(np.float64)
            expected.append(rank_correlation(in_use.percentile_N, new_N))
        found = scorer.status()["fidelity"]
    known = [value for value in expected if value is not None]

    assert len(known) == 3 - delay
    assert (found["count"], found["latest"]) == (len(known), pytest.approx(known[-1], rel=1e-9))
    assert (found["mean"], found["min"]) == (pytest.approx(np.mean(known)), pytest.approx(min(known)))
    assert found["min"] < 0.99


def test_state_carries_delayed_views_and_what_the_tracker_remembers(tmp_path: Path) -> None:
    """Through torch.load's safe form, into a scorer that was somewhere else: the coming views are the same."""
    one, other = (Parts(tmp_path / name, DELAYED) for name in ("one", "other"))
    with one.publisher, one.scorer, other.publisher, other.scorer:
        one.scorer.rescore(shaken(one.model, 1), 1)
        for version in (1, 2):
            other.scorer.rescore(shaken(other.model, version + 5), version)
        file = io.BytesIO()
        torch.save(one.scorer.state_dict(), file)
        file.seek(0)
        other.scorer.load_state_dict(torch.load(file, weights_only=True))
        other.model.load_state_dict(one.model.state_dict())

        assert other.scorer.view().newest_scored() == -1
        assert other.scorer.newest_version() == 1
        for version in (2, 3, 4):
            for parts in (one, other):
                parts.scorer.rescore(shaken(parts.model, version), version)
            here, there = one.scorer.view(), other.scorer.view()

            np.testing.assert_array_equal(here.percentile_N, there.percentile_N)
            np.testing.assert_array_equal(here.margin_N, there.margin_N)
            assert here.bound == there.bound
        assert one.scorer.status()["fidelity"] == other.scorer.status()["fidelity"]


class Killed(BaseException):
    """What `kill -9` is to a training."""


def life(path: Path, attempt: int, killed_at: int | None = None) -> tuple[TrainResult | None, dict[str, Any]]:
    """One life of a training of 20 steps, 4 an epoch, with delayed scores."""
    parts = Parts(path, DELAYED)
    state, saver = load_newest_state(parts.run.path), StateSaver(parts.run.path, attempt)
    begin(
        parts.run.path,
        fork_step=state.step if state else 0,
        last_valid_version=state.model_version if state else 0,
        first_version=parts.publisher.next_version,
    )
    batches = len(parts.dataset.train) // 50 * 5 - (state.step if state else 0)
    steps: list[bool] = []
    parts.model.register_forward_pre_hook(lambda model, _: steps.append(True) if model.training else None)

    def stopped() -> bool:
        if killed_at is not None and len(steps) == 2 * killed_at:
            raise Killed
        return False

    result = None
    with parts.publisher, parts.scorer as scorer:
        try:
            result = train(
                DELAYED.train,
                ALONE,
                parts.model,
                parts.dataset,
                parts.publisher,
                scorer,
                lambda _: None,
                stopped,
                epoch_scorer=scorer,
                saver=saver,
                resumed=state,
            )
        except Killed:
            saver.close()
    assert killed_at is not None or len(steps) == 2 * batches
    return result, parts.model.state_dict()


def test_killed_training_with_delayed_scores_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Saved at step 8, killed at 15: versions 2 and 3 are left behind, and count in no age."""
    whole, expected = life(tmp_path / "whole", 1)
    life(tmp_path / "killed", 1, killed_at=15)
    resumed, found = life(tmp_path / "killed", 2)

    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert whole.test_accuracy == resumed.test_accuracy
    assert dataclasses.asdict(whole.draws) | {"age_counts": 0} == (
        dataclasses.asdict(resumed.draws) | {"age_counts": 0}
    )
    assert whole.draws.age_counts.tolist() == resumed.draws.age_counts.tolist() == [0, 0, 400]
