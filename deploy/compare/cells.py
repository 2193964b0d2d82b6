"""Cells: single trainings of a comparison, run side by side, each kept as a JSON file named after its settings."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from deploy.compare.workers import Workers
from deploy.config import RunConfig
from deploy.interrupts import Interrupts
from shared.catalogue import Run, RunState
from shared.config import make_config
from shared.errors import CellFailed, RunError, SteppeError, TrainingDiverged
from shared.storage import Folder

Settings = dict[str, Any]
Facts = dict[str, Any]

BESIDE = ("async", "shadow")  # modes with scorers in processes of their own
LEFTOVER_S = 60.0  # a worker whose command is gone ends within that
LEAST_COVERAGE = 0.95  # of a training with scorers beside it
TRY_AGAIN = "the same command tries again"
NEVER = 1_000_000_000
FORCED: Settings = {  # a cell leaves its result and nothing else
    "rest.port": 0,
    "run.tensorboard": False,
    "train.evaluate_every_epochs": NEVER,
    "train.save_interval_s": float(NEVER),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training. Two cells with the same settings are the same training, and run once."""

    data: str
    method: str
    seed: int
    config: RunConfig

    def __str__(self) -> str:
        return f"{self.data} {self.method} seed {self.seed}"

    @property
    def key(self) -> str:
        """Hash of what decides the training."""
        content = self.config.model_dump(mode="json", exclude={"run", "rest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def slots(self) -> int:
        """Cores that it uses: scorers beside the training take one of their own."""
        return (self.config.train.threads or 1) + (self.config.scoring.mode in BESIDE)


def make_cell(data: str, method: str, seed: int, base: dict[str, Any], settings: Settings) -> Cell:
    """`base` with `settings`, by their dotted names, on top. Raises ConfigError for settings that no run has."""
    seeds = {"train.seed": seed, "data.noise_seed": seed}
    all_settings = settings | seeds | FORCED
    written = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in all_settings.items()]
    config = make_config(RunConfig, base, written)
    if config.train.threads is None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"threads": 1})})
    if config.scoring.mode in ("off", "every_epoch"):  # nobody reads checkpoints beside the training
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"publish_every_steps": NEVER, "warmup_steps": NEVER})}
        )
    return Cell(data, method, seed, config)


class CellStore:
    """The results below `folder`/cells, one JSON file per finished cell."""

    def __init__(self, folder: Path) -> None:
        self._folder = Folder(folder / "cells")

    def result(self, cell: Cell) -> Facts | None:
        """A finished cell's facts; None for one that is not."""
        try:
            found: Facts = json.loads(self._folder.read(f"{cell.key}.json"))
        except (FileNotFoundError, ValueError):
            return None
        return found

    def accuracy(self, cell: Cell) -> float | None:
        """None when not finished, or diverged."""
        return (self.result(cell) or {}).get("accuracy")

    def failure(self, cell: Cell) -> str | None:
        """Why a finished cell has no accuracy."""
        return (self.result(cell) or {}).get("failed")

    def workers(self, interrupted: Interrupts) -> Workers:
        """Processes to train cells in; they say what they do in cells/log."""
        folder = self._folder.make().path
        train, sweep = (functools.partial(work, str(folder)) for work in (train_cell, sweep_cell))
        return Workers(train, folder / "log", interrupted, sweep)

    def train(
        self, cells: Iterable[Cell], workers: Workers, cores: int, on_done: Callable[[Cell, Facts], None]
    ) -> None:
        """Train those that are not finished, as many at a time as `cores` hold; `on_done` hears of each as it ends.

        Raises: CellFailed for what a cell raised that is not its settings' fault; KeyboardInterrupt. What is finished
        stays.
        """
        left: dict[str, Cell] = {}
        for cell in cells:
            if self.result(cell) is None:
                left.setdefault(cell.key, cell)
            else:  # what a kill left between result and removal
                shutil.rmtree(self._folder.path / cell.key, ignore_errors=True)
        workers.run(list(left.values()), cores, lambda cell: on_done(cell, self.result(cell) or {}))


def train_cell(cells: str, cell: Cell) -> None:
    """Train from the beginning, and leave `cells`/KEY.json. A diverged training has no accuracy.

    What a killed command left of the cell is not gone on with: scores would be counted twice, seconds in part.
    """
    place = Path(cells) / cell.key
    print(cell, flush=True)  # to the log
    _clear(place)
    if (place.parent / f"{cell.key}.json").exists():  # of a process that outlived its command, until now
        return
    config = cell.config.model_copy(update={"run": cell.config.run.model_copy(update={"folder": str(place)})})
    facts = _trained(config) | {"config": cell.config.model_dump(mode="json")}
    Folder(cells).put(f"{cell.key}.json", json.dumps(facts, indent=1).encode())
    shutil.rmtree(place)


def sweep_cell(cells: str, cell: Cell) -> None:
    """End what an ended process may have left of a cluster beside its training."""
    from deploy.resume import clear_leftovers

    if cell.config.scoring.mode in BESIDE:
        with contextlib.suppress(SteppeError):
            clear_leftovers(Run(Path(cells) / cell.key))


def _trained(config: RunConfig) -> Facts:
    import torch

    from deploy import driver

    try:
        summary = driver.run(config)
    except TrainingDiverged as error:
        return {"accuracy": None, "failed": str(error)}
    _check_scored(config, summary)
    seconds = summary["trainer_seconds_total"]
    return {
        "accuracy": summary["test_accuracy"],
        "seconds": seconds,
        "seconds_per_epoch": seconds / config.train.epochs,
        "forward_equivalents": summary["trainer_forward_equivalents"] + summary["scorer_forward_equivalents"],
        "fidelity": summary["fidelity_mean"],
        "age_versions_p50": summary["age_versions_p50"],
        "age_versions_p95": summary["age_versions_p95"],
        "draws_unscored": None if config.scoring.mode in ("off", "shadow") else summary["draws_unscored"],
        "coverage": summary["coverage"],
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _check_scored(config: RunConfig, summary: dict[str, Any]) -> None:
    """A training that went on without scores is no result of a method that has them. Raises CellFailed."""
    if config.scoring.mode == "every_epoch":
        due = (config.train.epochs - 1) * Run(summary["run_folder"]).num_samples
        if (rows := summary["scored_rows"] + summary["quarantined_rows"]) < due:
            raise CellFailed(f"{rows} of {due} rows were scored", fix=TRY_AGAIN, key="scoring.mode")
    if config.scoring.mode in BESIDE and (share := summary["coverage"]) < LEAST_COVERAGE:
        raise CellFailed(
            f"{share:.0%} of the samples were scored (at least {LEAST_COVERAGE:.0%}): no scorer came up in time",
            fix=TRY_AGAIN,
            key="scoring.mode",
        )


def _clear(place: Path) -> None:
    """Remove what a killed command left of a cell, once its processes are gone."""
    from deploy.resume import clear_leftovers

    run: Run | None = None
    with contextlib.suppress(RunError):  # there is none, or no whole one
        run = Run(place)
    if run is not None:
        deadline = time.monotonic() + LEFTOVER_S
        while run.state() == RunState.RUNNING and time.monotonic() < deadline:
            time.sleep(0.1)
        with run.locked():
            clear_leftovers(run)
    shutil.rmtree(place, ignore_errors=True)
