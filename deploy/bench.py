"""`steppe bench NAME`: measurements of the whole thing on this machine, as commands and not as timed tests."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.client import RestClient
from deploy.cluster import end_processes, run_folder_of
from deploy.progress import print_facts
from shared.catalogue import Run
from shared.errors import ConfigError, ServiceError, SteppeError

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.toml"
POLL_INTERVAL_S = 0.05
LONGEST_RECOVERY_S = 120.0
PICTURES = (".png", ".svg", ".pdf")


def recovery(repeats: int) -> dict[str, Any]:
    """From kill -9 of the only scorer to rows from its successor, torch import included, in seconds."""
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        folder = Path(place) / "run"
        settings = {"run.folder": folder, "rest.port": 0, "train.epochs": 100_000, "model.width": 16}
        options = [f"--set={key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "deploy", "run", str(QUICKSTART), *options]
        with open(Path(place) / "out", "wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=Path(__file__).parents[1])
        try:
            seconds = [_one_recovery(_client(folder, process), folder) for _ in range(repeats)]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            end_processes(folder)
    return _quantiles(seconds) | {"what": "seconds from kill -9 of a scorer to rows of its successor"}


def _print(found: Mapping[str, Any]) -> None:
    print_facts({key: str(value) for key, value in found.items()})


@dataclasses.dataclass(frozen=True)
class Bench:
    """One benchmark: `measure(repeats)` gives what `show` prints, as JSON can hold it.

    `repeats` is how often it measures unless told otherwise; `draw` is None where there is nothing to draw.
    """

    measure: Callable[[int], dict[str, Any]]
    repeats: int
    show: Callable[[Mapping[str, Any]], None] = _print
    draw: Callable[[Mapping[str, Any], Path], None] | None = None


def _recovery() -> Bench:
    return Bench(recovery, repeats=20)


def _flat() -> Bench:
    from deploy import flat

    return Bench(flat.measure, repeats=12, show=flat.show, draw=flat.draw)


BENCHES: dict[str, Callable[[], Bench]] = {"recovery": _recovery, "flat": _flat}  # called for the one that is asked for


def find_bench(name: str) -> Bench:
    """Raises ConfigError listing the known names."""
    if name not in BENCHES:
        raise ConfigError(f"no benchmark {name!r}; known: {', '.join(BENCHES)}")
    return BENCHES[name]()


def run_bench(name: str, repeats: int | None = None, plot: Path | None = None) -> dict[str, Any]:
    """What was measured, drawn to `plot` where given. Raises ConfigError for a name or a plot that cannot be."""
    bench = find_bench(name)
    if plot is not None:
        _check_plot(name, bench, plot)
    found = {"bench": name} | bench.measure(repeats or bench.repeats)
    if plot is not None and bench.draw is not None:
        bench.draw(found, plot)
    return found


def _check_plot(name: str, bench: Bench, plot: Path) -> None:
    """Before the measuring, which can be long."""
    if bench.draw is None:
        raise ConfigError(f"--plot {plot}: {name} has nothing to draw; leave --plot out")
    if plot.suffix not in PICTURES:
        raise ConfigError(f"--plot {plot}: the name ends in {plot.suffix!r}; it must end in {', '.join(PICTURES)}")
    if not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder {plot.parent}; make it first")


def _client(folder: Path, process: "subprocess.Popen[bytes]") -> RestClient:
    """A client of the run, once it answers."""
    while True:
        if process.poll() is not None:
            raise ServiceError(f"the run ended early: {(folder.parent / 'out').read_text()[-500:]}")
        try:
            return RestClient(Run(folder))
        except (SteppeError, json.JSONDecodeError):
            time.sleep(POLL_INTERVAL_S)


def _one_recovery(client: RestClient, folder: Path) -> float:
    killed = _scorer_that_scored(client, other_than=-1)
    if run_folder_of(psutil.Process(killed)) != str(folder):
        raise ServiceError(f"process {killed} is not of {folder}; it is left alone")
    began = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    _scorer_that_scored(client, other_than=killed)
    seconds = time.monotonic() - began
    sys.stderr.write(f"scoring again after {seconds:.2f} s\n")
    return seconds


def _scorer_that_scored(client: RestClient, other_than: int) -> int:
    """The process id of a scorer that has scored, once there is one."""
    deadline = time.monotonic() + LONGEST_RECOVERY_S
    while time.monotonic() < deadline:
        for scorer in client.scorers()["scorers"]:
            if scorer["scored"] and scorer["pid"] not in (0, other_than):
                return int(scorer["pid"])
        time.sleep(POLL_INTERVAL_S)
    raise ServiceError(f"no scorer scored within {LONGEST_RECOVERY_S:.0f} s")


def _quantiles(seconds: list[float]) -> dict[str, Any]:
    p50, p95 = np.quantile(seconds, (0.5, 0.95))
    return {"n": len(seconds), "p50": round(float(p50), 3), "p95": round(float(p95), 3), "max": round(max(seconds), 3)}
