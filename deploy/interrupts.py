"""Ctrl-C and SIGTERM as KeyboardInterrupt that does not get lost."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupts:
    """Remembers that a signal came: the exception is lost when it falls into a destructor or a library's callback."""

    def __init__(self) -> None:
        self._came = False

    def came(self) -> bool:
        return self._came

    def check(self) -> None:
        """Raises KeyboardInterrupt when a signal came."""
        if self._came:
            raise KeyboardInterrupt

    def on_signal(self, _: int, __: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle SIGINT and SIGTERM inside; in a thread other than the main one they stay as they are."""
    watch = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    before = {number: signal.signal(number, watch.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
