"""The worker with real checkpoints and the real controller, without Ray."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

import scorer.worker
from scorer.adm import score_batch
from scorer.attacks import Attack, Fgsm, Pgd
from scorer.config import AttackConfig
from scorer.worker import Worker, build_attack
from services.config import ControllerConfig
from services.controller import Controller
from shared.checkpoints import CheckpointPublisher, newest
from shared.errors import ServiceError, StateError
from shared.leases import Lease
from shared.schema import MEASURED_COLUMNS
from shared.score_store import ScoreReader
from tests.waiting import wait_for

SAMPLES = 40
X = torch.rand(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SAMPLES) % 3


def batches(ids: npt.ArrayLike) -> tuple[Tensor, Tensor]:
    index = torch.from_numpy(np.array(ids))
    return X[index], Y[index]


def net_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(5, 3)


class LocalLeases:
    """The controller in this process, whose answers come as futures; keeps a list of what was asked.

    `trouble` may answer instead: it gets the name of the call and gives a future or None.
    """

    def __init__(self, controller: Controller, trouble: Callable[[str], Future[Any] | None] | None = None) -> None:
        self.controller = controller
        self.trouble = trouble or (lambda _: None)
        self.asked: list[str] = []
        self.refused = 0

    def lease(self, scorer_id: str, model_version: int) -> "Future[Lease | None]":
        return self._call("lease", scorer_id, model_version)

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table) -> "Future[None]":
        return self._call("submit", scorer_id, lease_id, rows)

    def release(self, scorer_id: str) -> "Future[None]":
        return self._call("release", scorer_id)

    def _call(self, name: str, *args: Any) -> Future[Any]:
        self.asked.append(name)
        if (instead := self.trouble(name)) is not None:
            return instead
        answer: Future[Any] = Future()
        try:
            answer.set_result(getattr(self.controller, name)(*args))
        except ServiceError as error:
            answer.set_exception(error)
        else:
            self.refused += name == "lease" and answer.result() is None
        return answer


def open_controller(run: Path, **settings: Any) -> Controller:
    return Controller(str(run), SAMPLES, "id", ControllerConfig(block_size=8, commit_interval_s=0.01, **settings))


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    controller = open_controller(tmp_path)
    yield controller
    controller.close()


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[CheckpointPublisher]:
    with CheckpointPublisher(tmp_path) as publisher:
        yield publisher


def publish(publisher: CheckpointPublisher, seed: int, step: int) -> int:
    version = publisher.publish(net_of(seed), step)
    publisher.flush()
    return version


def make_worker(run: Path, leases: LocalLeases, kind: type[Worker] = Worker, **settings: Any) -> Worker:
    settings = {"batches": batches, "batch_size": 3, "poll_interval_s": 0.005} | settings
    return kind("a", str(run), leases, model=net_of(99), attack=Fgsm(0.1), **settings)


@contextmanager
def running(worker: Worker) -> Iterator[None]:
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield
    finally:
        worker.stop()
        thread.join(60)
    assert not thread.is_alive()


def wait_for_version(run: Path, version: int) -> None:
    reader = ScoreReader(run / "scores")

    def everything_scored() -> bool:
        reader.refresh()
        return bool((reader.dense("model_version") == version).all())

    wait_for(everything_scored, what=f"coverage 1.0 at version {version}")


def spoil(run: Path, how: str) -> None:
    """Damage the newest checkpoint's weights."""
    path = newest(run).path / "weights.safetensors"
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-4] if how == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))


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
    assert leases.asked == ["release"]
    assert worker.model_version == 0
    assert spoilt == worker.corrupt_checkpoints


def test_score_without_weights_is_refused(tmp_path, controller):
    with pytest.raises(StateError, match="before any checkpoint"):
        make_worker(tmp_path, LocalLeases(controller)).score(np.arange(3))


def test_everything_is_scored_once_at_the_newest_version_and_then_the_worker_idles(tmp_path, controller, publisher):
    publish(publisher, seed=1, step=10)
    leases = LocalLeases(controller)
    worker = make_worker(tmp_path, leases)
    with running(worker):
        wait_for_version(tmp_path, 1)
        refused = leases.refused
        wait_for(lambda: leases.refused > refused + 3, what="an idle worker")

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


def test_weights_at_hand_are_kept_when_a_newer_checkpoint_is_corrupt(tmp_path, controller, publisher):
    worker = make_worker(tmp_path, LocalLeases(controller))
    publish(publisher, seed=1, step=10)
    worker.follow_checkpoints()
    publish(publisher, seed=2, step=20)
    spoil(tmp_path, "altered")
    for _ in range(3):
        worker.follow_checkpoints()
    rows = worker.score(np.array([7, 2]))

    assert rows.column("sample_id").to_pylist() == [7, 2]
    assert rows.column("model_version").to_pylist() == [1, 1]
    assert rows.column("step").to_pylist() == [10, 10]
    assert worker.corrupt_checkpoints == 1
    expected = score_batch(net_of(1), X[[7, 2]], Y[[7, 2]], Fgsm(0.1))["margin"]
    np.testing.assert_allclose(rows.column("margin").to_numpy(), expected.numpy(), rtol=1e-5)


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


def test_a_controller_that_does_not_answer_at_the_end_does_not_hold_up_stop(
    tmp_path, controller, publisher, monkeypatch
):
    monkeypatch.setattr(scorer.worker, "REPLY_TIMEOUT_S", 0.02)
    publish(publisher, seed=1, step=10)
    leases = LocalLeases(controller, lambda _: Future())
    with running(make_worker(tmp_path, leases)):
        wait_for(lambda: "lease" in leases.asked, what="a request")

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
