"""Ctrl-C and SIGTERM: the first ends a run in order, the second at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 130
ONE_KEYSTROKE_S = 0.25
SHOW_CURSOR = b"\x1b[?25h\n"  # the progress line hides it


class Interrupts:
    """Remembers that a signal came: the exception is lost when it falls into a destructor or a library's callback.

    `at_once` is called on a second signal, before the process exits.
    """

    def __init__(self) -> None:
        self.at_once: Callable[[], None] = lambda: None
        self._came, self._came_at = False, 0.0
        self._raising = True

    def came(self) -> bool:
        return self._came

    def check(self) -> None:
        """Raises KeyboardInterrupt when a signal came."""
        if self._came:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal only shows in `came`: who works there stops where it can, such as between steps."""
        self.check()
        self._raising = False
        try:
            yield
        finally:
            self._raising = True

    def on_signal(self, _: int, __: FrameType | None) -> None:
        if self._came:
            if time.monotonic() - self._came_at < ONE_KEYSTROKE_S:
                return  # a wrapper passed on what the terminal sent us too
            try:
                self.at_once()
            finally:
                with contextlib.suppress(OSError):
                    if os.isatty(2):
                        os.write(2, SHOW_CURSOR)
                os._exit(EXIT_CODE)
        self._came, self._came_at = True, time.monotonic()
        with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
            os.write(2, b"steppe: stopping in order; once more stops at once\n")
        if self._raising:
            raise KeyboardInterrupt


def exit_at_once_on_signals() -> None:
    """For the whole process, outside of `interrupts`: nothing is there yet, or any more, that has to end in order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(EXIT_CODE))


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
