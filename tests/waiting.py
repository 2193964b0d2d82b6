"""Waiting for a condition, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout_s: float = 60.0, what: str = "the condition") -> T:
    """The first true value of `condition`. Fails the test when there is none within `timeout_s`."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.005
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s:g} s"
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.1)  # looking takes the cores from what is waited for
    return value
