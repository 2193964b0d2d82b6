"""`steppe bench recovery`: how long scoring stands still when the only scorer is killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.client import client_of, scorers
from deploy.cluster import end_processes, run_folder_of
from services.client import Client
from shared.catalogue import Run
from shared.errors import ServiceError, SteppeError

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
POLL_INTERVAL_S = 0.05
LONGEST_RECOVERY_S = 120.0
MEASURE_AGAIN = "measure again on a quiet machine"


def measure(repeats: int) -> dict[str, Any]:
    """From kill -9 of the only scorer to rows from its successor, torch import included, in seconds."""
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        folder = Path(place) / "run"
        settings = {"run.folder": folder, "rest.port": 0, "train.epochs": 100_000, "model.width": 16}
        options = [f"--set={key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "deploy", "run", str(QUICKSTART), *options]
        with open(Path(place) / "out", "wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=Path(__file__).parents[2])
        try:
            seconds = [_one_recovery(_client(folder, process), folder) for _ in range(repeats)]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            end_processes(folder)
    return _quantiles(seconds) | {"what": "seconds from kill -9 of a scorer to rows of its successor"}


def _client(folder: Path, process: "subprocess.Popen[bytes]") -> Client:
    """A client of the run, once it answers."""
    while True:
        if process.poll() is not None:
            said = (folder.parent / "out").read_text()[-500:]
            raise ServiceError(f"the run ended early: {said}", fix="correct what it says", key=str(folder))
        try:
            return client_of(Run(folder))
        except (SteppeError, json.JSONDecodeError):
            time.sleep(POLL_INTERVAL_S)


def _one_recovery(client: Client, folder: Path) -> float:
    killed = _scorer_that_scored(client, other_than=-1)
    if run_folder_of(psutil.Process(killed)) != str(folder):
        raise ServiceError(f"process {killed} is not of {folder}: it is left alone", fix=MEASURE_AGAIN, key=str(killed))
    began = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    _scorer_that_scored(client, other_than=killed)
    seconds = time.monotonic() - began
    sys.stderr.write(f"scoring again after {seconds:.2f} s\n")
    return seconds


def _scorer_that_scored(client: Client, other_than: int) -> int:
    """The process id of a scorer that has scored, once there is one."""
    deadline = time.monotonic() + LONGEST_RECOVERY_S
    while time.monotonic() < deadline:
        for scorer in scorers(client)["scorers"]:
            if scorer["scored"] and scorer["pid"] not in (0, other_than):
                return int(scorer["pid"])
        time.sleep(POLL_INTERVAL_S)
    raise ServiceError(f"no scorer scored within {LONGEST_RECOVERY_S:.0f} s", fix=MEASURE_AGAIN)


def _quantiles(seconds: list[float]) -> dict[str, Any]:
    p50, p95 = np.quantile(seconds, (0.5, 0.95))
    return {"n": len(seconds), "p50": round(float(p50), 3), "p95": round(float(p95), 3), "max": round(max(seconds), 3)}
