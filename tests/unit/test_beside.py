"""Work beside the caller's: once, with its answer or its error, also where no thread can be started."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import pytest

from shared.beside import Beside


def test_answers_and_errors_come_with_the_result() -> None:
    def fail() -> NoReturn:
        raise OSError("no room")

    beside = Beside(2)
    answer, failure = beside(lambda: 7), beside(fail)

    assert answer() == 7
    with pytest.raises(OSError, match="no room"):
        failure()
    beside.close()


def test_the_caller_does_it_where_no_thread_can_be_started() -> None:
    beside = Beside(1)
    beside.close()

    assert beside(lambda: 7)() == 7


def test_what_is_queued_before_the_thread_cannot_be_started_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ThreadPoolExecutor.submit

    def queue_and_fail(self: ThreadPoolExecutor, *arguments: Any) -> Future[Any]:
        submit(self, *arguments)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", queue_and_fail)
    done: list[int] = []
    beside = Beside(1)
    for turn in range(20):
        beside(lambda turn=turn: done.append(turn))()
    beside.close()

    assert done == list(range(20))
