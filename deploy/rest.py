"""Keeps a run's REST service up: one that ends by itself is started again on the same port."""

import logging
import threading
import time
from collections.abc import Callable

import ray

from deploy.actors import Handle, ask
from shared.events import Events

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
TICK_S = 0.25
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0


class RestKeeper:
    """Starts the service, and again whenever its process ends. `url` and `pid` are those of the last one.

    Args:
        start: makes the actor that will listen on a port.
        port: of the first; 0 takes any free one, which the later ones keep.
        say: told what went wrong, in words for people.
        on_change: called when another process serves.

    Raises: ServiceError or ConfigError when the first one does not come up.
    """

    def __init__(self, start: Callable[[int], Handle], port: int, say: Callable[[str], None], events: Events) -> None:
        self._start = start
        self._say = say
        self._events = events
        self.on_change: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._launch(port)
        self._thread = threading.Thread(target=self._keep, name="rest keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Raises ServiceError when the service does not end in time."""
        self._stop.set()
        self._thread.join()
        ask(self._handle.stop.remote(), STOP_TIMEOUT_S)

    def _launch(self, port: int) -> None:
        self._handle = self._start(port)
        self._ended = self._handle.wait.remote()
        started = self._handle.start.remote()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ray.wait([started], timeout=TICK_S)[0]:
            if self._stop.is_set() or time.monotonic() > deadline:
                break
        self.url, self.port, self.pid = ask(started, TICK_S)
        self._events.append("rest_up", url=self.url, pid=self.pid)

    def _keep(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        is_up = True
        while not self._stop.wait(TICK_S if is_up else backoff_s):
            try:
                if is_up and ray.wait([self._ended], timeout=0)[0]:
                    is_up = False
                    self._say("the REST service ended and is started again")
                    self._events.append("rest_down", url=self.url, pid=self.pid)
                elif not is_up:
                    self._launch(self.port)
                    is_up, backoff_s = True, FIRST_BACKOFF_S
                    self.on_change()
            except Exception as error:  # whatever it is, the run goes on, and so does this loop
                logger.warning("the REST service does not come up: %s", error)
                if not is_up:
                    ray.kill(self._handle)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
