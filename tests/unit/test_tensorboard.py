"""Curves for TensorBoard, read back by TensorBoard itself."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deploy.tensorboard import Board


def test_curves_are_what_was_described(tmp_path: Path) -> None:
    said: list[str] = []
    state = {"step": 7, "loss": 0.5, "accuracy": None, "fresh": 1.0}
    with Board(tmp_path, lambda: state, said.append):
        pass
    curves = EventAccumulator(str(tmp_path)).Reload()

    assert curves.Tags()["scalars"] == ["train/loss", "scores/fresh_share"]
    assert [(event.step, event.value) for event in curves.Scalars("train/loss")] == [(7, 0.5)]
    assert said == []


def test_what_goes_wrong_is_said_and_raised_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    with Board(tmp_path, lambda: {"step": 1, "loss": 0.5}, said.append) as board:
        monkeypatch.setattr(board._writer, "add_scalar", full)

    assert said == ["TensorBoard's curves end here: [Errno 28] No space left on device"]
