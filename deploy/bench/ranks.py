"""`steppe bench ranks`: the training in two workers of Ray Train beside that in one, at the same global batch."""

import datetime
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rich
from rich.table import Table

from deploy.cluster import end_processes
from shared.errors import ServiceError
from shared.events import read_events

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
EPOCHS = 12
SETTINGS = ("train.threads=1", "trainer.cpus=0.5", "scoring.mode=off", "rest.port=0")
ARMS = {
    "one": ("trainer.num_workers=1",),
    "two_common": ("trainer.num_workers=2", "train.sam.sync_first=true"),
    "two_own": ("trainer.num_workers=2",),
}
TITLES = {"one": "one worker", "two_common": "two, one e(w)", "two_own": "two, each its own"}

Floats = npt.NDArray[np.float64]


def measure(repeats: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """So many seeds each: the mean loss of each epoch, its spread over the seeds, and seconds per epoch.

    Two workers ascend by one common gradient, which is what one worker does, or each by its own part of the batch.
    """
    losses: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(repeats):
        for arm, settings in ARMS.items():  # side by side in time
            ended = _train((*settings, f"train.epochs={epochs}"), seed)
            losses[arm].append([event["loss"] for event in ended])
            seconds[arm] += _between(ended)
            sys.stderr.write(f"seed {seed}, {TITLES[arm]}: last loss {ended[-1]['loss']:.4f}\n")
    curves = {arm: np.asarray(each) for arm, each in losses.items()}
    per_epoch = {arm: float(np.median(each)) for arm, each in seconds.items()}
    two = ("two_common", "two_own")
    return {
        "what": f"quickstart without scores, {epochs} epochs, batch of all workers together the same, one thread each",
        "seeds": repeats,
        "loss": {arm: _rounded(curve.mean(0)) for arm, curve in curves.items()},
        "loss_spread_over_seeds": _rounded(curves["one"].std(0, ddof=1)) if repeats > 1 else None,
        "difference_in_standard_errors": {arm: _rounded(_differences(curves["one"], curves[arm])) for arm in two}
        if repeats > 1
        else None,
        "seconds_per_epoch": {arm: round(each, 3) for arm, each in per_epoch.items()},
        "speed_up": {arm: round(per_epoch["one"] / per_epoch[arm], 2) for arm in two},
    }


def show(found: Mapping[str, Any]) -> None:
    """The loss curves beside each other, and what an epoch takes."""
    rich.print(f"{found['what']}; means of {found['seeds']} seeds; in brackets the difference in standard errors")
    table = Table("epoch", box=None)
    differences = found["difference_in_standard_errors"] or {}
    for title in TITLES.values():
        table.add_column(title, justify="right")
    for epoch in range(len(found["loss"]["one"])):
        cells = [f"{found['loss'][arm][epoch]:.4f}" for arm in ARMS]
        cells[1:] = [
            f"{cell} ({differences[arm][epoch]:+.1f})" if arm in differences else cell
            for cell, arm in zip(cells[1:], list(ARMS)[1:], strict=True)
        ]
        table.add_row(str(epoch + 1), *cells)
    table.add_row("s per epoch", *(f"{found['seconds_per_epoch'][arm]:.3f}" for arm in ARMS))
    rich.print(table)


def _train(settings: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """The epochs of one training, as its diary tells them."""
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        folder = Path(place) / "run"
        given = (*SETTINGS, *settings, f"run.folder={folder}", f"train.seed={seed}")
        command = [sys.executable, "-m", "deploy", "run", str(QUICKSTART), *(f"--set={one}" for one in given)]
        try:
            done = subprocess.run(command, capture_output=True, check=False, text=True, cwd=Path(__file__).parents[2])
        finally:
            end_processes(folder)
        if done.returncode:
            raise ServiceError(f"the training failed: {done.stderr[-500:]}", fix="correct what it says")
        return [event for event in read_events(folder) if event["event"] == "epoch"]


def _between(epochs: list[dict[str, Any]]) -> list[float]:
    """Seconds from the end of one epoch to that of the next, its evaluation included."""
    at = [datetime.datetime.fromisoformat(event["time"]).timestamp() for event in epochs]
    return [later - earlier for earlier, later in itertools.pairwise(at)]


def _differences(one: Floats, two: Floats) -> Floats:
    """Of the means over the seeds, paired, in units of their standard error; 0 where there is no spread."""
    each = two - one
    error = each.std(0, ddof=1) / np.sqrt(len(each))
    quotient: Floats = np.divide(each.mean(0), error, out=np.zeros_like(error), where=error > 0)
    return quotient


def _rounded(values: Floats) -> list[float]:
    return [round(float(value), 5) for value in values]
