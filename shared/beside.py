"""Work done in threads beside the caller's."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Answer = TypeVar("Answer")


class Beside:
    """Up to `threads` at once. When none can be started (Python ends, or the system is full) the caller does it."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="beside")

    def __call__(self, act: Callable[[], Answer]) -> Callable[[], Answer]:
        """Begin `act`; the result waits for its answer, and raises what it raised."""
        future: Future[Answer] = Future()
        begun = threading.Lock()  # an executor that cannot start a thread has put the work in its queue all the same

        def once() -> None:
            if begun.acquire(blocking=False):
                try:
                    future.set_result(act())
                except BaseException as error:
                    future.set_exception(error)

        try:
            self._threads.submit(once)
        except RuntimeError:
            once()
        return future.result

    def close(self) -> None:
        """Wait for what has begun."""
        self._threads.shutdown()
