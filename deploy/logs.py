"""One log file per role of a run: `logs/driver.log`, `logs/controller.log`, `logs/rest.log`, `logs/scorer-1.log` ..."""

import contextlib
import faulthandler
import logging
import os
from collections.abc import Iterator
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _LogFile(logging.FileHandler):
    """A disk that cannot take the log fails nobody, and does not fill the terminal with it."""

    def handleError(self, record: logging.LogRecord) -> None: ...

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def log_to(run_folder: str | os.PathLike[str], role: str) -> None:
    """Send this process's log, and the stacks of a crash in native code, to the role's file, until it ends."""
    handler = _open(run_folder, role)
    if isinstance(handler, _LogFile) and handler.stream is not None:
        faulthandler.enable(handler.stream)


@contextlib.contextmanager
def logging_to(run_folder: str | os.PathLike[str], role: str) -> Iterator[None]:
    """Send this process's log to the role's file; as it was before on the way out."""
    level = logging.getLogger().level
    handler = _open(run_folder, role)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
        handler.close()


def _open(run_folder: str | os.PathLike[str], role: str) -> logging.Handler:
    try:
        folder = Path(run_folder) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = _LogFile(folder / f"{role}.log")
    except OSError:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    return handler
