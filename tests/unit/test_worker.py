"""The worker with real checkpoints and the real controller, without Ray."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torch import Tensor

import scorer.worker
from scorer.adm import score_batch
from scorer.attacks import Attack, Fgsm, Pgd
from scorer.config import AttackConfig
from scorer.worker import Worker, build_attack
from shared.errors import ServiceError, StateError
from shared.schema import MEASURED_COLUMNS
from shared.score_store import ScoreReader
from tests.raising import refuses
from tests.scorers import (
    SAMPLES,
    LocalLeases,
    X,
    Y,
    batches,
    make_worker,
    net_of,
    open_controller,
    publish,
    running,
    spoil,
    wait_for_version,
)
from tests.waiting import wait_for


class ThreeLooks(Worker):
    """Stops after it looked three times for a checkpoint."""

    looks = 0

    def follow_checkpoints(self) -> None:
        super().follow_checkpoints()
        self.looks += 1
        if self.looks == 3:
            self.stop()


@pytest.mark.parametrize("spoilt", [False, True], ids=["no checkpoint", "only a corrupt one"])
def test_no_lease_is_taken_before_verified_weights(tmp_path, controller, publisher, spoilt):
    if spoilt:
        publish(publisher, seed=1, step=10)
        spoil(tmp_path, "altered")
    leases = LocalLeases(controller)
    worker = make_worker(tmp_path, leases, ThreeLooks)

    assert worker.run() == 0
    assert leases.asked == ["report"] * spoilt + ["release"]
    assert worker.model_version == 0
    assert spoilt == worker.corrupt_checkpoints


def test_score_without_weights_is_refused(tmp_path, controller):
    with refuses(StateError):
        make_worker(tmp_path, LocalLeases(controller)).score(np.arange(3))


def test_everything_is_scored_once_at_the_newest_version_and_then_the_worker_idles(tmp_path, controller, publisher):
    publish(publisher, seed=1, step=10)
    leases = LocalLeases(controller)
    worker = make_worker(tmp_path, leases)
    with running(worker):
        wait_for_version(tmp_path, 1)
        refused = leases.refused
        wait_for(lambda: leases.refused > refused + 3, what="an idle worker")
        wait_for(lambda: controller.status()["leased"] == 0, what="the commit of all leases")

    assert worker.scored == SAMPLES
    assert controller.status()["leased"] == 0
    assert controller.status()["oldest_block_version"] == 1


def test_the_worker_follows_the_newest_checkpoint(tmp_path, controller, publisher):
    """And the rows are those of its weights, with its version and step."""
    worker = make_worker(tmp_path, LocalLeases(controller))
    with running(worker):
        for seed, step in ((1, 10), (2, 25)):
            version = publish(publisher, seed, step)
            wait_for_version(tmp_path, version)
    rows = ScoreReader(tmp_path / "scores").table()
    expected = score_batch(net_of(2), X, Y, Fgsm(0.1))

    assert worker.model_version == 2
    assert rows.column("step").to_pylist() == [25] * SAMPLES
    for name in MEASURED_COLUMNS:
        np.testing.assert_allclose(rows.column(name).to_numpy(), expected[name].numpy(), rtol=1e-4, atol=1e-5)


def test_a_worker_that_starts_late_jumps_to_the_newest_checkpoint(tmp_path, controller, publisher):
    for seed in (1, 2, 3):
        publish(publisher, seed, step=10 * seed)
    with running(make_worker(tmp_path, LocalLeases(controller))):
        wait_for_version(tmp_path, 3)

    assert ScoreReader(tmp_path / "scores").rows == SAMPLES


@pytest.mark.parametrize("how", ["altered", "truncated", "gone"])
def test_a_corrupt_newest_checkpoint_is_skipped_and_counted(tmp_path, controller, publisher, how):
    publish(publisher, seed=1, step=10)
    publish(publisher, seed=2, step=20)
    spoil(tmp_path, how)
    worker = make_worker(tmp_path, LocalLeases(controller))
    with running(worker):
        wait_for_version(tmp_path, 1)

        assert (worker.model_version, worker.corrupt_checkpoints) == (1, 1)
        publish(publisher, seed=3, step=30)
        wait_for_version(tmp_path, 3)
    margin = ScoreReader(tmp_path / "scores").dense("margin")

    np.testing.assert_allclose(margin, score_batch(net_of(3), X, Y, Fgsm(0.1))["margin"].numpy(), rtol=1e-4, atol=1e-5)
    assert (worker.model_version, worker.corrupt_checkpoints) == (3, 1)


def test_stop_ends_the_block_at_hand_and_hands_back_all_leases(tmp_path, controller, publisher):
    """Both the block at hand and the one asked for ahead."""
    publish(publisher, seed=1, step=10)
    leases = LocalLeases(controller)
    held = []

    def stopping(ids: npt.ArrayLike) -> tuple[Tensor, Tensor]:
        held.append(controller.status()["leased"])
        worker.stop()
        return batches(ids)

    worker = make_worker(tmp_path, leases, batches=stopping)
    scored = worker.run()

    assert held == [2]
    assert scored == 0
    assert controller.status()["leased"] == 0
    assert "submit" not in leases.asked


def failing(errors: int, error: Exception | None) -> Callable[[str], Future[Any] | None]:
    """Of every kind of call the first `errors` fail with `error`, or get no answer ever."""
    seen: dict[str, int] = {}

    def trouble(name: str) -> Future[Any] | None:
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > errors or name == "release":
            return None
        future: Future[Any] = Future()
        if error is not None:
            future.set_exception(error)
        return future

    return trouble


@pytest.mark.parametrize("error", [ServiceError("the controller is gone"), None], ids=["gone", "no answer"])
def test_the_worker_outlives_a_controller_that_fails(tmp_path, publisher, monkeypatch, error):
    """Rows that were lost on the way are scored again once their lease has expired."""
    monkeypatch.setattr(scorer.worker, "REPLY_TIMEOUT_S", 0.02)
    publish(publisher, seed=1, step=10)
    controller = open_controller(tmp_path, lease_timeout_s=0.3)
    worker = make_worker(tmp_path, LocalLeases(controller, failing(3, error)))
    with running(worker):
        wait_for_version(tmp_path, 1)
    controller.close()

    assert worker.scored > SAMPLES
    assert controller.status()["leases_expired"] > 0


@pytest.mark.parametrize("silent", [("lease",), ("submit",), ("lease", "submit", "release")], ids=" ".join)
def test_a_controller_that_does_not_answer_does_not_hold_up_stop(tmp_path, controller, publisher, silent, monkeypatch):
    """The time for an answer is an hour here: a worker that waited for one would end this test's time."""
    monkeypatch.setattr(scorer.worker, "REPLY_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(scorer.worker, "RELEASE_TIMEOUT_S", 0.05)
    publish(publisher, seed=1, step=10)
    leases = LocalLeases(controller, lambda name: Future() if name in silent else None)
    with running(make_worker(tmp_path, leases)):
        wait_for(lambda: silent[0] in leases.asked, what="a request")

    assert leases.asked[-1] == "release"


@pytest.mark.parametrize(
    ("config", "attack"),
    [
        (AttackConfig(), Fgsm(8 / 255)),
        (AttackConfig(epsilon=0.5, norm="l2"), Fgsm(0.5, "l2")),
        (AttackConfig(name="pgd", epsilon=0.1, steps=5), Pgd(0.1, 5, 0.05)),
        (AttackConfig(name="pgd", epsilon=0.1, steps=5, step_size=0.01, norm="l2"), Pgd(0.1, 5, 0.01, "l2")),
    ],
    ids=str,
)
def test_build_attack(config: AttackConfig, attack: Attack):
    assert attack == build_attack(config)


def test_pgd_with_epsilon_zero_can_be_built():
    """AttackConfig takes epsilon = 0, so every scorer must be able to start with it."""
    row = score_batch(net_of(1), X, Y, build_attack(AttackConfig(name="pgd", epsilon=0.0)))

    assert row["log_ratio"].tolist() == [0.0] * SAMPLES
