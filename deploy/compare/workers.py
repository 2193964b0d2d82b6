"""Processes that train cells, one cell after the other, and end with the command that started them.

Not concurrent.futures: its pool cannot say which cell a dead process had, and with `max_tasks_per_child` it hangs in
Python 3.11 and 3.12 (CPython issue 115634).
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from deploy.interrupts import EXIT_CODE, Interrupts
from shared.errors import CellFailed, SteppeError

CELLS_PER_PROCESS = 32  # a new process now and then gives back what libraries keep
LOOK_INTERVAL_S = 0.5
ORDERLY_END_S = 15.0  # the step that is going on, and a cluster of Ray beside it
END_AT_ONCE_S = 3.0


class Failure(NamedTuple):
    """Why a task is not done."""

    what: str  # the end of a sentence that begins with the task
    fix: str = ""
    key: str = ""  # as errors have it


class Task(Protocol):
    """What a worker is given; its text names it in messages."""

    @property
    def slots(self) -> int:
        """Cores that it uses."""


T = TypeVar("T", bound=Task)


class Workers:
    """Calls `work(task)` in processes of their own. Leaving the `with` ends them, also in the middle of a task.

    What tasks print goes to the file `log`. A second signal (`interrupted`) ends the processes at once. `sweep(task)`
    is called for each task that a process was ended in.
    """

    def __init__(
        self,
        work: Callable[[Any], None],
        log: Path,
        interrupted: Interrupts,
        sweep: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._work, self._log, self._interrupted, self._sweep = work, log, interrupted, sweep
        self._workers: list[_Worker] = []
        self._before = interrupted.at_once

    def __enter__(self) -> "Workers":
        self._log.touch()
        self._interrupted.at_once = self._end_at_once
        return self

    def __exit__(self, *exc: object) -> None:
        self._end(ORDERLY_END_S, END_AT_ONCE_S)
        self._interrupted.at_once = self._before

    def run(self, tasks: Sequence[T], cores: int, on_done: Callable[[T], None]) -> None:
        """All `tasks`, in order, side by side as far as their slots fit into `cores`; one that never fits runs alone.

        Raises CellFailed for a task that raised, or whose process died; KeyboardInterrupt.
        """
        waiting = list(tasks)
        while waiting or self._busy():
            while (task := self._next(waiting, cores)) is not None:
                waiting.remove(task)
                self._idle().begin(task)
            pipes = {worker.pipe: worker for worker in self._busy()}
            ready = multiprocessing.connection.wait(list(pipes), LOOK_INTERVAL_S)
            self._interrupted.check()  # first: a signal to all ends the processes too, which is no failure then
            for pipe in ready:
                worker = pipes[pipe]  # type: ignore[index]
                task = worker.task
                self._end_task(worker)
                on_done(task)

    def _next(self, waiting: Sequence[T], cores: int) -> T | None:
        used = sum(worker.task.slots for worker in self._busy())
        return next((task for task in waiting if not used or used + task.slots <= cores), None)

    def _busy(self) -> "list[_Worker]":
        return [worker for worker in self._workers if worker.task is not None]

    def _idle(self) -> "_Worker":
        for worker in self._workers:
            if worker.task is None:
                return worker
        with self._interrupted.deferred():  # half started, it would complain on the terminal
            self._workers.append(_Worker(self._work, self._log))
        return self._workers[-1]

    def _end_task(self, worker: "_Worker") -> None:
        if failure := worker.failure():
            last_words = f"see its last words in {self._log}; what is finished is kept"
            raise CellFailed(
                f"{worker.task} {failure.what}",
                fix=f"{failure.fix}; {last_words}" if failure.fix else last_words,
                key=failure.key or str(self._log),
            )
        worker.task = None
        if worker.begun >= CELLS_PER_PROCESS:
            worker.close()
            self._workers.remove(worker)

    def _end(self, *timeouts_s: float) -> None:
        """A signal to all that are there, time to end, then another signal; at last SIGKILL."""
        for timeout_s in timeouts_s:
            for worker in self._workers:
                worker.process.terminate()
            deadline = time.monotonic() + timeout_s
            for worker in self._workers:
                worker.process.join(max(deadline - time.monotonic(), 0))
            if not any(worker.process.is_alive() for worker in self._workers):
                break
        for worker in self._workers:
            worker.process.kill()
        for worker in self._busy():
            self._sweep(worker.task)
        self._workers.clear()

    def _end_at_once(self) -> None:
        self._end(END_AT_ONCE_S)


class _Worker:
    """A process, this end of the pipe to it, and what it does now."""

    def __init__(self, work: Callable[[Any], None], log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, str(log)), daemon=True)
        resource_tracker.ensure_running()  # `start` would do that too, and let SIGINT through again
        with _sigint_held():
            self.process.start()
        theirs.close()
        self.task: Any = None
        self.begun = 0

    def begin(self, task: Task) -> None:
        self.task = task
        self.begun += 1
        with contextlib.suppress(OSError):  # it died: `failure` says so
            self.pipe.send(task)

    def failure(self) -> Failure | None:
        """Tell what went wrong with the task that ended; None when nothing did."""
        try:
            answer: Failure | None = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(END_AT_ONCE_S)
            return _end_of(self.process.exitcode)
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.join(END_AT_ONCE_S)
        self.process.kill()


def _end_of(code: int | None) -> Failure:
    if code == -signal.SIGKILL:
        return Failure("was killed (SIGKILL), as the system does when memory runs out", "take fewer --cores")
    if code is not None and code < 0:
        return Failure(f"was ended by {signal.Signals(-code).name}")
    return Failure(f"ended without an answer, exit code {code}")


@contextlib.contextmanager
def _sigint_held() -> Iterator[None]:
    """A process that is started inside never hears of SIGINT: a terminal sends it to all, but it is ours to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: "multiprocessing.connection.Connection", work: Callable[[Any], None], log: str) -> None:
    """In the process: one task after the other, until nobody asks any more."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the other end is gone
        while True:
            pipe.send(_failure(work, pipe.recv()))


def _failure(work: Callable[[Any], None], task: Any) -> Failure | None:
    """Do the task, and tell what it raised; None when nothing."""
    try:
        work(task)
    except KeyboardInterrupt:  # how a run ends on SIGTERM
        os._exit(EXIT_CODE)
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, OSError) and error.strerror:
            return Failure(f"failed: {error.strerror}" + (f": {error.filename}" if error.filename else ""))
        if isinstance(error, SteppeError):
            return Failure(f"failed: {error.problem}", error.fix, error.key)
        return Failure(f"failed: {type(error).__name__}: {error}")
    return None


def _end_with_parent() -> None:
    """When the process that started this one is gone, however it ended: SIGTERM, again, and SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        for number, timeout_s in ((signal.SIGTERM, ORDERLY_END_S), (signal.SIGTERM, END_AT_ONCE_S)):
            os.kill(os.getpid(), number)
            time.sleep(timeout_s)
        os.kill(os.getpid(), signal.SIGKILL)
