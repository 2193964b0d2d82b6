"""The plain classes of scorer and services as Ray actors, and the controller as these see it from afar."""

import contextlib
import logging
import os
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import ray

from deploy.packages import check_packages
from services.config import ControllerConfig, RestConfig
from services.controller import Controller
from shared.catalogue import Run
from shared.errors import ServiceError, SteppeError
from shared.leases import Lease

if TYPE_CHECKING:
    from deploy.config import RunConfig

Handle = Any  # a Ray actor handle, whose methods are made at run time
T = TypeVar("T")
CONTROLLER_TIMEOUT_S = 2.0
LOWEST_PRIORITY = 19


class RemoteLeases:
    """The controller's leases for a scorer (`scorer.worker.LeaseSource`)."""

    def __init__(self, controller: Handle) -> None:
        self._controller = controller

    def lease(self, scorer_id: str, model_version: int) -> "Future[Lease | None]":
        return _future(self._controller.lease.remote(scorer_id, model_version, os.getpid()))

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table) -> "Future[None]":
        return _future(self._controller.submit.remote(scorer_id, lease_id, rows))

    def release(self, scorer_id: str) -> "Future[None]":
        return _future(self._controller.release.remote(scorer_id))


class RemoteFleet:
    """The controller's numbers for the REST service (`services.api.Fleet`) and the driver."""

    def __init__(self, controller: Handle) -> None:
        self._controller = controller

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = ask(self._controller.status.remote())
        return status

    def set_wanted(self, replicas: int) -> None:
        ask(self._controller.set_wanted.remote(replicas))


class ScorerActor:
    """A scorer in its own process. `run` scores until `drain`; a CPU scorer steps behind everything else."""

    def __init__(self, scorer_id: str, run_uri: str, config: "RunConfig", controller: Handle) -> None:
        check_packages()
        import torch

        from scorer.worker import Worker, build_attack
        from shared.datasets import load_dataset
        from shared.models import build_model

        scoring = config.scoring
        on_gpu = scoring.gpus > 0
        if not on_gpu:
            with contextlib.suppress(OSError):
                os.nice(LOWEST_PRIORITY)
            torch.set_num_threads(scoring.threads)
        torch.backends.cudnn.allow_tf32 = False  # scoring_id says float32
        dataset = load_dataset(config.data)
        Run(run_uri).check_dataset(dataset.fingerprint)
        self._worker = Worker(
            scorer_id,
            run_uri,
            RemoteLeases(controller),
            dataset.train.batch,
            build_model(config.model, dataset),
            build_attack(scoring.attack),
            batch_size=scoring.batch_size,
            poll_interval_s=scoring.poll_interval_s,
            device="cuda" if on_gpu else "cpu",
        )
        ask(controller.register.remote(scorer_id, os.getpid()), timeout_s=30.0)

    def ready(self) -> int:
        """The process id, once the scorer waits for weights."""
        return os.getpid()

    def run(self) -> int:
        return self._worker.run()

    def drain(self) -> None:
        self._worker.stop()


class ControllerActor(Controller):
    """The controller in its own process."""

    def __init__(
        self, run_uri: str, num_samples: int, scoring_id: str, config: ControllerConfig, *, wanted: int
    ) -> None:
        check_packages()
        logging.basicConfig(level=logging.INFO)
        super().__init__(run_uri, num_samples, scoring_id, config, wanted=wanted)


class RestActor:
    """The REST service in its own process."""

    def __init__(self, run_uri: str, config: RestConfig, controller: Handle) -> None:
        check_packages()
        from services.api import create_app, is_loopback
        from services.server import Server

        run = Run(run_uri)
        app = create_app(run, fleet=RemoteFleet(controller), token=run.token(), loopback=is_loopback(config.host))
        self._server = Server(app, config.host, config.port)

    def start(self) -> tuple[str, int]:
        """URL and process id, once requests are answered."""
        return self._server.start(), os.getpid()

    def stop(self) -> None:
        self._server.stop()


def ask(ref: "ray.ObjectRef[T]", timeout_s: float = CONTROLLER_TIMEOUT_S) -> T:
    """The answer of an actor. Raises ServiceError when it is gone or does not answer in time, else what it raised."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ServiceError(f"no answer within {timeout_s:g} s") from error
    except ray.exceptions.RayActorError as error:
        raise ServiceError(f"the process is gone: {error}") from error
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, SteppeError) else error) from None


def _future(ref: "ray.ObjectRef[T]") -> "Future[T]":
    """The ref as a future in which Ray's own errors are ServiceError."""
    answer: Future[T] = Future()

    def pass_on(inner: "Future[T]") -> None:
        error = inner.exception()
        if error is None:
            answer.set_result(inner.result())
        elif isinstance(error, ray.exceptions.RayActorError):
            answer.set_exception(ServiceError(f"the controller is gone: {error}"))
        else:
            answer.set_exception(error)

    ref.future().add_done_callback(pass_on)
    return answer
