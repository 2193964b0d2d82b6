"""Starting `steppe run` as a user does, and looking after its processes."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import psutil

from deploy.cluster import processes_of, remove_ray_folder
from tests.waiting import wait_for

STEPPE = str(Path(sys.executable).parent / "steppe")
QUICKSTART = Path(__file__).parents[2] / "deploy/configs/quickstart.toml"


class RunningRun:
    """`steppe run quickstart.toml` with settings, or other options with their dashes, in a process group of its own."""

    def __init__(self, folder: Path, *settings: str, cwd: Path | None = None) -> None:
        self.folder = folder
        self.settings = settings
        given = (f"run.folder={folder}", "rest.port=0", *settings)
        options = [one if one.startswith("--") else f"--set={one}" for one in given]
        self.process = subprocess.Popen(
            [STEPPE, "run", str(QUICKSTART), *options, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            start_new_session=True,
        )

    def runtime(self) -> dict[str, Any]:
        """runtime.json, once it is there."""

        def read() -> dict[str, Any] | None:
            assert self.process.poll() is None, f"the run ended early: {self.process.communicate()[1]}"
            path = self.folder / "runtime.json"
            content: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
            return content if "url" in content else None

        return wait_for(read, what="the address in runtime.json")

    def client(self) -> httpx2.Client:
        url = self.runtime()["url"]
        headers = {"Authorization": f"Bearer {(self.folder / 'token').read_text()}"}
        return httpx2.Client(base_url=url, headers=headers, trust_env=False, timeout=30)

    def finish(self, timeout_s: float = 240) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def processes(self) -> list[psutil.Process]:
        """The processes of the run's own cluster."""
        return processes_of(self.folder)

    def stop_for_good(self) -> None:
        """Whatever a failed test left of this run is ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
        for process in self.processes():
            process.kill()
        with contextlib.suppress(OSError, ValueError):
            remove_ray_folder(json.loads((self.folder / "runtime.json").read_bytes()).get("ray_folder"))
