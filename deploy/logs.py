"""One log file per role of a run: `logs/driver.log`, `logs/controller.log`, `logs/rest.log`, `logs/scorer-1.log` ..."""

import contextlib
import faulthandler
import logging
import os
from collections.abc import Iterator
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to(run_folder: str | os.PathLike[str], role: str) -> logging.Handler:
    """Send this process's log, and the stacks of a crash in native code, to the role's file, until it ends."""
    try:
        folder = Path(run_folder) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = logging.FileHandler(folder / f"{role}.log")
        # The process's own for its whole life.
        faulthandler.enable(open(folder / f"{role}.log", "a"))  # noqa: SIM115
    except OSError:  # a full disk silences the log and nothing else
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    return handler


@contextlib.contextmanager
def logging_to(run_folder: str | os.PathLike[str], role: str) -> Iterator[None]:
    """As `log_to`, and as it was before on the way out."""
    level = logging.getLogger().level
    handler = log_to(run_folder, role)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
        handler.close()
