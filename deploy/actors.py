"""The plain classes of scorer and services as Ray actors, and the controller as these see it from afar."""

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import ray

from deploy.logs import log_to
from deploy.packages import check_packages
from services.config import ControllerConfig, RestConfig
from services.controller import Controller, Decision
from shared.catalogue import Run
from shared.errors import ServiceError, SteppeError, StoreMismatch
from shared.events import Events
from shared.leases import Lease
from shared.schema import arrow_file

if TYPE_CHECKING:
    from deploy.config import RunConfig

Handle = Any  # a Ray actor handle, whose methods are made at run time
T = TypeVar("T")
CONTROLLER_TIMEOUT_S = 2.0
REOPEN_INTERVAL_S = 1.0
LOOK = "look into the logs of the run"

logger = logging.getLogger(__name__)


class RemoteLeases:
    """The controller's leases for a scorer (`scorer.worker.LeaseSource`)."""

    def __init__(self, controller: Handle) -> None:
        self._controller = controller

    def lease(self, scorer_id: str, model_version: int) -> "Future[Lease | None]":
        return _future(self._controller.lease.remote(scorer_id, model_version, os.getpid()))

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Table, failed: Mapping[int, str]) -> "Future[None]":
        # Ray would take a table apart and pickle each column: at 256 rows that is half of the call's time.
        return _future(self._controller.submit.remote(scorer_id, lease_id, arrow_file(rows), dict(failed)))

    def release(self, scorer_id: str) -> "Future[None]":
        return _future(self._controller.release.remote(scorer_id))

    def report(self, scorer_id: str, event: str, detail: str) -> "Future[None]":
        return _future(self._controller.report.remote(scorer_id, event, detail))


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
    """A scorer in its own process. `run` scores until `drain`, or SIGTERM; a CPU one steps behind everything else."""

    def __init__(self, scorer_id: str, run_uri: str, config: "RunConfig", controller: Handle) -> None:
        check_packages()
        log_to(run_uri, scorer_id)
        from deploy.worker import build_worker

        self._worker = build_worker(scorer_id, run_uri, config, RemoteLeases(controller))
        if threading.current_thread() is threading.main_thread():  # Ray's own handler would end it in the middle
            signal.signal(signal.SIGTERM, lambda *_: self._worker.stop())
        ask(controller.register.remote(scorer_id, os.getpid()), timeout_s=30.0)
        logger.info("%s waits for weights (pid %d)", scorer_id, os.getpid())

    def ready(self) -> tuple[int, str]:
        """Process id and node id, once the scorer waits for weights."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def run(self) -> int:
        try:
            return self._worker.run()
        except Exception:
            logger.exception("this scorer ends")
            raise

    def drain(self) -> None:
        self._worker.stop()


class ControllerActor:
    """The controller in its own process.

    Ray starts a killed one again, but not one whose constructor raises: so the controller is opened here by whoever
    asks first, and when that fails, such as on a full disk, by the next one after a moment.
    """

    def __init__(
        self,
        run_uri: str,
        num_samples: int,
        scoring_id: str,
        config: ControllerConfig,
        *,
        wanted: int,
        measure: str = "adm",
    ) -> None:
        check_packages()
        log_to(run_uri, "controller")
        self._open = functools.partial(
            Controller, run_uri, num_samples, scoring_id, config, wanted=wanted, measure=measure
        )
        self._run_uri, self._events = run_uri, Events(run_uri)
        self._opened: Controller | None = None
        self._trouble: SteppeError = ServiceError("")
        self._not_before = 0.0

    def register(self, scorer_id: str, pid: int) -> None:
        self._controller().register(scorer_id, pid)

    def lease(self, scorer_id: str, model_version: int, pid: int) -> Lease | None:
        return self._controller().lease(scorer_id, model_version, pid)

    def submit(self, scorer_id: str, lease_id: int, rows: pa.Buffer, failed: dict[int, str]) -> None:
        """Rows as an Arrow file."""
        self._controller().submit(scorer_id, lease_id, pa.ipc.open_file(rows).read_all(), failed)

    def report(self, scorer_id: str, event: str, detail: str) -> None:
        self._controller().report(scorer_id, event, detail)

    def release(self, scorer_id: str) -> int:
        return self._controller().release(scorer_id)

    def decide(self, alive: tuple[str, ...], waiting: str = "") -> list[Decision]:
        return self._controller().decide(alive, waiting)

    def set_wanted(self, replicas: int) -> None:
        self._controller().set_wanted(replicas)

    def status(self) -> dict[str, Any]:
        return self._controller().status()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def _controller(self) -> Controller:
        """Raises ServiceError while it cannot be opened, StoreMismatch for a store that it may not write."""
        if self._opened is not None and self._opened.is_lost:  # what was not committed is scored again
            self._opened, self._not_before = None, time.monotonic() + REOPEN_INTERVAL_S
        if self._opened is None:
            if time.monotonic() < self._not_before:
                raise self._trouble
            try:
                self._opened = self._open()
            except Exception as error:  # whatever it is: the training goes on, and the next one tries again
                logger.warning("the controller cannot open the score store: %s", error)
                self._not_before = time.monotonic() + REOPEN_INTERVAL_S
                cause = error if isinstance(error, SteppeError) else SteppeError(str(error))
                see_log = f"see {self._run_uri}/logs/controller.log; it is tried again by itself"
                trouble = ServiceError(
                    f"the controller cannot open the score store: {cause.problem}",
                    fix=f"{cause.fix}; {see_log}" if cause.fix else see_log,
                    key=cause.key or self._run_uri,
                )
                self._trouble = error if isinstance(error, StoreMismatch) else trouble
                raise self._trouble from error
            self._events.append("controller_up", pid=os.getpid())
        return self._opened


class RestActor:
    """The REST service in its own process."""

    def __init__(self, run_uri: str, config: RestConfig, controller: Handle) -> None:
        check_packages()
        log_to(run_uri, "rest")
        from deploy.serve import service

        self._server = service(Run(run_uri), config, RemoteFleet(controller))
        self._stopped = threading.Event()

    def start(self) -> tuple[str, int, int]:
        """URL, port and process id, once requests are answered."""
        url = self._server.start()
        logger.info("answering at %s (pid %d)", url, os.getpid())
        return url, self._server.port, os.getpid()

    def wait(self) -> None:
        """Returns after `stop`; a caller hears of the process's end by it."""
        self._stopped.wait()

    def stop(self) -> None:
        self._server.stop()
        self._stopped.set()


def ask(ref: "ray.ObjectRef[T]", timeout_s: float = CONTROLLER_TIMEOUT_S) -> T:
    """The answer of an actor. Raises ServiceError when it is gone or does not answer in time, else what it raised."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ServiceError(f"no answer within {timeout_s:g} s", fix=LOOK) from error
    except ray.exceptions.RayActorError as error:
        logger.debug("%s", error)
        raise ServiceError(f"the process is gone: {first_line(error)}", fix=LOOK) from error
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, SteppeError) else error) from None


def first_line(error: BaseException) -> str:
    """Of Ray's errors, whose other lines are for Ray's developers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _future(ref: "ray.ObjectRef[T]") -> "Future[T]":
    """The ref as a future in which Ray's own errors are ServiceError."""
    answer: Future[T] = Future()

    def pass_on(inner: "Future[T]") -> None:
        error = inner.exception()
        if error is None:
            answer.set_result(inner.result())
        elif isinstance(error, ray.exceptions.RayActorError):
            answer.set_exception(ServiceError(f"the controller is gone: {first_line(error)}", fix=LOOK))
        else:
            answer.set_exception(error)

    ref.future().add_done_callback(pass_on)
    return answer
