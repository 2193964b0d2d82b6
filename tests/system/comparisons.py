"""Starting `steppe compare` as a user does, and looking after its processes."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil

from tests.system.runs import STEPPE
from tests.waiting import LIMIT_S, wait_for

CONFIG = """
name = "tiny"
candidate = "adm"
controls = ["sam", "sam_equal_compute"]
seeds = 2
search_seeds = 1

[base.train]
epochs = {epochs}
startup_wait_s = 200
[base.scoring]
nice = 0
[base.model]
width = 4

[data.digits]
validation = 300
set = {{ "data.subset" = 400 }}

[method.sam]
set = {{ "scoring.mode" = "{sam}" }}
search = {{ "train.sam.rho" = [0.02, 0.05] }}
[method.adm]
like = "sam"
set = {{ "scoring.mode" = "{mode}" }}
[method.sam_equal_compute]
like = "sam"
set = {{ "scoring.mode" = "off" }}
equal_compute = "adm"
"""
CELLS = 2 + 3 * 2  # searched, final


def write_config(folder: Path, epochs: int = 3, mode: str = "every_epoch", sam: str = "off") -> Path:
    path = folder / "compare.toml"
    path.write_text(CONFIG.format(epochs=epochs, mode=mode, sam=sam))
    return path


class RunningComparison:
    """`steppe compare` in a process group of its own."""

    def __init__(self, config: Path, folder: Path, *options: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [STEPPE, "compare", str(config), f"--folder={folder}", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._seen: set[psutil.Process] = set()

    def processes(self) -> list[psutil.Process]:
        """All that it started and that was seen by a call of this, as far as they still run."""
        if self.process.poll() is None:
            self._seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return [one for one in self._seen if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def results(self) -> dict[str, int]:
        """Finished cells: name and time of writing, in ns."""
        return {path.name: path.stat().st_mtime_ns for path in (self.folder / "cells").glob("*.json")}

    def training(self) -> list[Path]:
        """Folders of cells that are being trained."""
        return [path.parent for path in (self.folder / "cells").glob("*/run.json")]

    def finish(self, timeout_s: float = 4 * LIMIT_S) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def kill(self) -> None:
        """kill -9 of the command alone; its processes must follow by themselves."""
        self.processes()
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        wait_for(lambda: not self.processes(), "the end of all processes")

    def stop_for_good(self) -> None:
        """Whatever a failed test left of it is ended."""
        self.processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
        for process in self.processes():
            process.kill()


def outcomes(folder: Path) -> dict[tuple[str, str, int], Any]:
    """What the cells in results.json must be, however often the command was ended: all but seconds."""
    cells = json.loads((folder / "results.json").read_bytes())["cells"]
    facts = ("accuracy", "epochs", "forward_equivalents", "fidelity", "age_versions_p50", "age_versions_p95")
    return {(cell["data"], cell["method"], cell["seed"]): [cell[fact] for fact in facts] for cell in cells}
