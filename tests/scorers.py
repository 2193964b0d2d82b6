"""A scorer's surroundings in one process: samples, a network, checkpoints and the real controller, without Ray."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from scorer.attacks import Fgsm
from scorer.worker import Worker
from services.config import ControllerConfig
from services.controller import Controller
from shared.checkpoints import CheckpointPublisher, newest
from shared.errors import ServiceError
from shared.leases import Lease
from shared.score_store import ScoreReader
from tests.waiting import LIMIT_S, wait_for

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
        self.reports: list[tuple[str, str, str]] = []
        self.failed: dict[int, str] = {}
        self.refused = 0

    def lease(self, scorer_id: str, model_version: int) -> "Future[Lease | None]":
        return self._call("lease", scorer_id, model_version)

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table, failed: Mapping[int, str]) -> "Future[None]":
        self.failed |= failed
        return self._call("submit", scorer_id, lease_id, rows, failed)

    def release(self, scorer_id: str) -> "Future[None]":
        return self._call("release", scorer_id)

    def report(self, scorer_id: str, event: str, detail: str) -> "Future[None]":
        self.reports.append((scorer_id, event, detail))
        return self._call("report", scorer_id, event, detail)

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


def publish(publisher: CheckpointPublisher, seed: int, step: int) -> int:
    version = publisher.publish(net_of(seed), step)
    publisher.flush()
    return version


def make_worker(run: Path, leases: LocalLeases, kind: type[Worker] = Worker, **settings: Any) -> Worker:
    defaults = {"batches": batches, "model": net_of(99), "attack": Fgsm(0.1), "batch_size": 3, "poll_interval_s": 0.005}
    return kind("a", str(run), leases, **(defaults | settings))


@contextmanager
def running(worker: Worker) -> Iterator[None]:
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield
    finally:
        worker.stop()
        thread.join(LIMIT_S)
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
