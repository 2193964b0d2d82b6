"""Curves of a run for TensorBoard, below the run's folder; an extra."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import ConfigError

CURVES = {
    "loss": "train/loss",
    "accuracy": "test/accuracy",
    "fresh": "scores/fresh_share",
    "median_age": "scores/median_age_versions",
    "samples_per_second": "scorers/samples_per_second",
}


def check_tensorboard() -> None:
    """Raises ConfigError when the package is not there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("run.tensorboard is true; it needs pip install 'steppe[tensorboard]'; or set it to false")


class Board:
    """Writes what the display shows."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def show(self, state: Mapping[str, Any]) -> None:
        for name, curve in CURVES.items():
            if state.get(name) is not None:
                self._writer.add_scalar(curve, state[name], state["step"])

    def close(self) -> None:
        self._writer.close()
