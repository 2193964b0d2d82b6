"""From a comparison's configuration to its report: search, settings committed, final runs, what may be said.

step     consumes                            produces                                    may see
-------  ----------------------------------  ------------------------------------------  ----------------------------
search   grids, search seeds                 validation accuracies                       the training split
choose   validation accuracies               settings.json, created once                 the training split
final    settings.json, final seeds          test accuracies; epochs.json, from costs    the test split
report   what is finished                    results.json, report.json, report.md, plots all
"""

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deploy.compare.cells import Cell, CellStore, Settings, make_cell
from deploy.compare.config import CompareConfig, MethodSpec, stages
from deploy.compare.progress import Progress
from deploy.compare.report import report, to_markdown
from deploy.config import RunConfig
from deploy.interrupts import Interrupts, interrupts
from deploy.plan import check_batches
from shared.datasets import load_dataset
from shared.errors import ConfigError, RunError, SteppeError
from shared.storage import Folder

Train = Callable[[str, Sequence[Cell]], None]  # what it is called, and all cells of it
Chosen = dict[str, dict[str, Settings]]  # data set -> method -> the settings it ended up with


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting tried in the search, by one seed."""

    searched: Settings
    cell: Cell


def compare(
    config: CompareConfig, folder: Path, command: str, cores: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Do what is not done yet, and return the report; `folder` keeps everything. May be interrupted and called again.

    Raises: ConfigError when `folder` belongs to another comparison, or some training cannot work; RunError when another
    process works in it; CellFailed.
    """
    Folder(folder).make()
    with _locked(folder), interrupts() as interrupted:
        return _Comparison(config, folder, command).run(cores, say, interrupted)


def report_only(config: CompareConfig, folder: Path, command: str) -> dict[str, Any]:
    """The report of what is finished, also while `compare` goes on. Raises ConfigError when nothing is."""
    return _Comparison(config, folder, command).report()


class _Comparison:
    def __init__(self, config: CompareConfig, folder: Path, command: str) -> None:
        self._config, self._command = config, command
        self._folder = Folder(folder)
        self._store = CellStore(self._folder.path)
        self._loaded: dict[str, tuple[int, str]] = {}

    def run(self, cores: int, say: Callable[[str], None], interrupted: Interrupts) -> dict[str, Any]:
        """All that is not done yet, and the report."""
        fingerprints = self._check()
        finals: list[Cell] = []
        with self._store.workers(interrupted) as workers:

            def train(what: str, cells: Sequence[Cell]) -> None:
                progress = Progress(what, cells, self._store, cores, say)
                self._store.train(cells, workers, cores, progress.done)

            chosen, trials = self._committed(fingerprints) or self._search(fingerprints, train)
            for stage in stages(self._config):
                self._settle_epochs(stage, chosen, finals)
                cells = self._finals(stage, chosen)
                train(f"final runs of {', '.join(stage)}", cells)
                finals += cells
        return self._report(chosen, trials, finals)

    def report(self) -> dict[str, Any]:
        """Of what is finished."""
        if (committed := self._committed()) is None:
            raise ConfigError(
                f"nothing to report in {self._folder.path}: no settings are chosen yet",
                fix="train first, without --report",
                key="settings.json",
            )
        finals = [cell for stage in stages(self._config) for cell in self._finals(stage, committed[0])]
        if all(self._store.result(cell) is None for cell in finals):
            raise ConfigError(
                f"nothing to report in {self._folder.path}: no final run is finished",
                fix="train first, without --report",
                key="cells",
            )
        return self._report(*committed, finals)

    def _check(self) -> dict[str, str]:
        """Find out, before anything is trained, whether each cell could be. Returns the data sets' fingerprints."""
        fingerprints: dict[str, str] = {}
        for data in self._config.data:
            first: dict[str, Settings] = {}  # of each method: as if the first values of its search had won
            for method in itertools.chain(*stages(self._config)):
                try:
                    tried = [trial for trial in self._trials(data, method, {data: first}) if trial.cell.seed == 0]
                    inherited = self._inherited(data, self._config.method[method], {data: first})
                    first[method] = inherited | tried[0].searched
                    final = self._cell(data, method, self._config.first_seed, first[method])
                    for cell in (final, *(trial.cell for trial in tried if trial.searched)):
                        self._check_cell(cell)
                except SteppeError as error:
                    error.problem = f"method {method} on {data}: {error.problem}"
                    raise
                fingerprints.setdefault(data, self._load(final)[1])
        return fingerprints

    def _check_cell(self, cell: Cell) -> None:
        check_batches(cell.config, self._load(cell)[0])
        if self._config.method[cell.method].equal_compute and cell.config.scoring.mode in ("async", "shadow"):
            raise ConfigError(
                f"what scoring.mode {cell.config.scoring.mode!r} costs is not known beforehand, so that equal_compute "
                "cannot choose the epochs",
                fix='set "off" or "every_epoch"',
                key="scoring.mode",
            )

    def _load(self, cell: Cell) -> tuple[int, str]:
        """N, the training samples of the cell's data set, and their fingerprint."""
        key = cell.config.data.model_dump_json()
        if key not in self._loaded:
            dataset = load_dataset(cell.config.data)
            self._loaded[key] = len(dataset.train), dataset.fingerprint
        return self._loaded[key]

    def _committed(self, fingerprints: dict[str, str] | None = None) -> tuple[Chosen, list[dict[str, Any]]] | None:
        """The chosen settings and the search behind them; None when they are not there yet."""
        if (committed := self._read("settings.json")) is None:
            return None
        path = self._folder.path / "settings.json"
        try:
            of, chosen, search, images = (committed[key] for key in ("of", "chosen", "search", "fingerprints"))
        except KeyError as error:
            raise ConfigError(
                f"{path} is not of a comparison: it lacks {error}", fix="take another --folder", key=str(path)
            ) from error
        if changed := _differences(of, self._what()):
            raise ConfigError(
                f"{path} was chosen with {'; '.join(changed)}",
                fix="take another --folder, so that no test result decides a setting",
                key=str(path),
            )
        if fingerprints is not None and (others := [data for data in images if fingerprints.get(data) != images[data]]):
            raise ConfigError(
                f"{path} was chosen on other images of {', '.join(others)}",
                fix="bring the same files, or take another --folder",
                key=f"data.{others[0]}",
            )
        return chosen, search

    def _what(self) -> dict[str, Any]:
        """All that decides the chosen settings."""
        label = {"__all__": {"label"}}
        return self._config.model_dump(
            mode="json",
            include={"base", "data", "method", "search_seeds"},
            exclude={"data": label, "method": label},
        )

    def _claims(self) -> dict[str, Any]:
        """What is to be said of the final runs: committed with the settings, before any of them is made."""
        return self._config.model_dump(
            mode="json", include={"candidate", "controls", "equivalences", "first_seed", "seeds"}
        )

    def _changed(self) -> list[str]:
        """The claims that are not those that were committed."""
        committed = (self._read("settings.json") or {}).get("claims")
        if committed is None:  # of an older steppe
            return []
        return [
            f"{key} ({committed[key]}, now {now})"
            for key, now in self._claims().items()
            if now != committed.get(key, now)
        ]

    def _search(self, fingerprints: dict[str, str], train: Train) -> tuple[Chosen, list[dict[str, Any]]]:
        """Search, and commit to what is found."""
        chosen: Chosen = {data: {} for data in self._config.data}
        search: list[dict[str, Any]] = []
        for stage in stages(self._config):
            trials = [
                trial for data in self._config.data for method in stage for trial in self._trials(data, method, chosen)
            ]
            searched = [trial.cell for trial in trials if trial.searched]
            train(f"search for {', '.join(dict.fromkeys(cell.method for cell in searched))}", searched)
            for data, method in itertools.product(self._config.data, stage):
                own = [trial for trial in trials if (trial.cell.data, trial.cell.method) == (data, method)]
                best = self._best(own)
                chosen[data][method] = self._inherited(data, self._config.method[method], chosen) | best
                search += [self._told(trial) for trial in own if trial.searched]
        content = {
            "of": self._what(),
            "fingerprints": fingerprints,
            "claims": self._claims(),
            "chosen_at": _now(),
            "chosen": chosen,
            "search": search,
        }
        self._folder.create("settings.json", json.dumps(content, indent=1).encode())
        return chosen, search

    def _inherited(self, data: str, spec: MethodSpec, chosen: Chosen) -> Settings:
        return (chosen[data][spec.like] if spec.like else {}) | spec.settings

    def _trials(self, data: str, method: str, chosen: Chosen) -> list[Trial]:
        """Every combination of the method's grid with every search seed, on the validation split."""
        spec, source = self._config.method[method], self._config.data[data]
        held_out: Settings = {"data.validation": source.validation}
        inherited = self._inherited(data, spec, chosen)
        return [
            Trial(searched, self._cell(data, method, seed, inherited | searched | held_out))
            for values in itertools.product(*spec.search.values())
            for searched in [dict(zip(spec.search, values, strict=True))]
            for seed in range(self._config.search_seeds)
        ]

    def _best(self, trials: Sequence[Trial]) -> Settings:
        """The settings with the highest mean validation accuracy, of equals the first; a diverged run counts 0."""
        accuracies: dict[str, list[float]] = {}
        by_text = {json.dumps(trial.searched): trial.searched for trial in trials}
        for trial in trials:
            if trial.searched:
                accuracies.setdefault(json.dumps(trial.searched), []).append(self._store.accuracy(trial.cell) or 0.0)
        if not accuracies:
            return {}
        return by_text[max(accuracies, key=lambda text: statistics.fmean(accuracies[text]))]

    def _told(self, trial: Trial) -> dict[str, Any]:
        cell = trial.cell
        facts = {"data": cell.data, "method": cell.method, "settings": trial.searched, "seed": cell.seed}
        return facts | {"accuracy": self._store.accuracy(cell) or 0.0}

    def _cell(self, data: str, method: str, seed: int, settings: Settings) -> Cell:
        return make_cell(data, method, seed, self._config.base, self._config.data[data].settings | settings)

    def _finals(self, stage: Sequence[str], chosen: Chosen) -> list[Cell]:
        """The final cells of these methods, but for those whose epochs are not settled."""
        epochs: dict[str, dict[str, int]] = self._read("epochs.json") or {}
        cells = []
        for seed in self._config.final_seeds:
            for data, method in itertools.product(self._config.data, stage):
                settings = chosen[data][method]
                if self._config.method[method].equal_compute:
                    if method not in epochs.get(data, {}):
                        continue
                    settings = settings | {"train.epochs": epochs[data][method]}
                cells.append(self._cell(data, method, seed, settings))
        return cells

    def _settle_epochs(self, stage: Sequence[str], chosen: Chosen, before: Sequence[Cell]) -> None:
        """For equal compute, once: runs that more seeds add do not change it."""
        epochs: dict[str, dict[str, int]] = self._read("epochs.json") or {}
        for data, method in itertools.product(self._config.data, stage):
            model = self._config.method[method].equal_compute
            if model is None or method in epochs.setdefault(data, {}):
                continue
            costs = [self._cost(cell) for cell in before if (cell.data, cell.method) == (data, model)]
            known = [cost for cost in costs if cost is not None]
            if not known:
                raise ConfigError(
                    f"all runs of {model} on {data} diverged, so {method} has no cost to be equal to",
                    fix=f"lower the learning rate of {model}, or let {method} be equal to another method",
                    key=f"method.{method}.equal_compute",
                )
            cell = self._cell(data, method, self._config.first_seed, chosen[data][method])
            epochs[data][method] = epochs_for(statistics.fmean(known), cell.config, self._load(cell)[0])
            self._folder.put("epochs.json", json.dumps(epochs, indent=1).encode())

    def _cost(self, cell: Cell) -> float | None:
        return (self._store.result(cell) or {}).get("forward_equivalents")

    def _read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the comparison; None when it is not there. Raises ConfigError for a damaged one."""
        try:
            content: dict[str, Any] = json.loads(self._folder.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            path = self._folder.path / name
            raise ConfigError(f"{path} is not whole: {error}", fix="take another --folder", key=str(path)) from error
        return content

    def _report(self, chosen: Chosen, search: list[dict[str, Any]], finals: Sequence[Cell]) -> dict[str, Any]:
        config = self._config
        results = {
            "name": config.name,
            "created_at": _now(),
            "command": self._command,
            "candidate": config.candidate,
            "controls": config.controls,
            "equivalences": [pair.model_dump() for pair in config.equivalences],
            "methods": {name: {"label": spec.label or name} for name, spec in config.method.items()},
            "data": {name: {"label": spec.label or name} for name, spec in config.data.items()},
            "seeds": list(config.final_seeds),
            "chosen": chosen,
            "search": search,
            "cells": [facts for cell in finals if (facts := self._facts(cell))],
            "diverged": [
                {"data": cell.data, "method": cell.method, "seed": cell.seed, "reason": reason}
                for cell in finals
                if (reason := self._store.failure(cell))
            ],
            "changed": self._changed(),
            "config": config.model_dump(mode="json", by_alias=True),
        }
        found = report(results)
        self._folder.put("results.json", json.dumps(results, indent=1).encode())
        self._folder.put("report.json", json.dumps(found, indent=1).encode())
        self._folder.put("report.md", to_markdown(found).encode())
        self._plot(results, found)
        return found

    def _facts(self, cell: Cell) -> dict[str, Any] | None:
        found = self._store.result(cell)
        if found is None or found["accuracy"] is None:
            return None
        facts = {key: value for key, value in found.items() if key != "config"}
        return {"data": cell.data, "method": cell.method, "seed": cell.seed, "epochs": cell.config.train.epochs} | facts

    def _plot(self, results: dict[str, Any], found: dict[str, Any]) -> None:
        from deploy.compare.plots import plot_accuracy, plot_differences, plot_search

        folder = self._folder.path
        plot_differences(found, folder / "differences.svg")
        plot_accuracy(results, folder / "accuracy.svg")
        if results["search"]:
            plot_search(results, folder / "search.svg")


def epochs_for(cost: float, config: RunConfig, num_samples: int) -> int:
    """How long to train for so many forward equivalents: SAM 6 per draw, plain SGD 3; scoring before all but the first
    epoch."""
    drawn = num_samples * (6 if config.train.sam.rho else 3)
    scored = num_samples * config.scoring.attack.forward_equivalents if config.scoring.mode == "every_epoch" else 0
    return max(round((cost + scored) / (drawn + scored)), 1)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two configurations, by dotted names: `search_seeds = 3, not 2`."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{name} = {json.dumps(before)}, not {json.dumps(now)}"]
    keys = dict.fromkeys((*before, *now))
    prefix = f"{name}." if name else ""
    return [text for key in keys for text in _differences(before.get(key), now.get(key), f"{prefix}{key}")]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time trains. Raises RunError when another one does."""
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another steppe compare is at work in {folder}",
                fix="wait for it, or take another --folder; --report tells what is finished",
                key=str(folder),
            ) from None
        yield


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
