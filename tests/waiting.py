"""Waiting for a condition, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

LIMIT_S = 120.0  # what no machine is too slow for; the end of a test that would hang, and no judgement of speed

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str = "the condition", timeout_s: float = LIMIT_S) -> T:
    """Return the first true value of `condition`. Fail the test when there is none within `timeout_s`."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.005
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s:g} s"
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.1)  # looking takes the cores from what is waited for
    return value
