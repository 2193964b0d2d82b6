"""Curves of a run for TensorBoard, below the run's folder; an extra."""

import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import ConfigError

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
CURVES = {
    "loss": "train/loss",
    "accuracy": "test/accuracy",
    "fresh": "scores/fresh_share",
    "median_age": "scores/median_age_versions",
    "fidelity": "scores/fidelity",
    "samples_per_second": "scorers/samples_per_second",
}


def check_tensorboard() -> None:
    """Raises ConfigError when the package is not there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "run.tensorboard is true, but TensorBoard is not installed",
            fix="pip install 'steppe[tensorboard]', or set it to false",
            key="run.tensorboard",
        )


class Board:
    """Writes `describe()` once a second from a thread of its own; when it cannot any more it says so and stops."""

    def __init__(
        self, folder: Path, describe: Callable[[], Mapping[str, Any] | None], say: Callable[[str], None]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))
        self._describe = describe
        self._say = say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tensorboard", daemon=True)

    def __enter__(self) -> "Board":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            while not self._stop.wait(INTERVAL_S):
                self._show()
            self._show()
            self._writer.close()
        except Exception as error:  # such as a full disk; its writer raises what its own thread met
            logger.exception("TensorBoard's curves end")
            self._say(f"TensorBoard's curves end here: {error}")

    def _show(self) -> None:
        state = self._describe() or {}
        for name, curve in CURVES.items():
            if state.get(name) is not None:
                self._writer.add_scalar(curve, state[name], state["step"])
