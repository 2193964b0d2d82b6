"""Starting `steppe run` as a user does, and looking after its processes."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil

from deploy.cluster import processes_of, remove_ray_folder
from shared.events import read_events
from shared.score_store import ScoreReader
from tests.waiting import LIMIT_S, wait_for

STEPPE = str(Path(sys.executable).parent / "steppe")
EXAMPLES = Path(__file__).parents[2] / "deploy/examples"
QUICKSTART = Path(__file__).parents[2] / "deploy/configs/quickstart.toml"


class RunningRun:
    """`steppe run quickstart.toml` with settings, or other options with their dashes, in a process group of its own."""

    def __init__(self, folder: Path, *settings: str, cwd: Path | None = None) -> None:
        self.folder = folder
        self.settings = settings
        given = (f"run.folder={folder}", "rest.port=0", "train.startup_wait_s=200", "scoring.nice=0", *settings)
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
        return httpx2.Client(base_url=url, headers=headers, trust_env=False, timeout=LIMIT_S)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[httpx2.Client]:
        """Yield the client once there are scores of all samples; the trainer is stopped until the block ends."""
        with standing_still(self.folder, self.process):
            yield self.client()

    def scored(self) -> httpx2.Client:
        """Return the client once there are scores of all samples."""
        with self.standing_still() as client:
            return client

    def finish(self, timeout_s: float = 4 * LIMIT_S) -> tuple[int, str, str]:
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


@contextlib.contextmanager
def standing_still(folder: Path, process: "subprocess.Popen[str]") -> Iterator[None]:
    """Stop the trainer (SIGSTOP) of a run soon after its first checkpoint, and enter once all samples have scores.

    Whatever the block does, the training cannot end before it.

    Args:
        process: of the run, or of a job that follows it; it may not end either.
    """

    def driver() -> psutil.Process | None:
        assert process.poll() is None, f"the run ended early: {process.communicate()}"
        happened = {event["event"] for event in read_events(folder)}
        if {"scorer_up", "published"} <= happened:
            return psutil.Process(json.loads((folder / "runtime.json").read_bytes())["pid"])
        return None

    def is_scored() -> bool:
        return bool((ScoreReader(folder / "scores").dense("model_version") >= 0).all())

    paused = wait_for(driver, "a trainer that has published, and a scorer")
    paused.suspend()
    try:
        wait_for(is_scored, what="scores of all samples")
        yield
    finally:
        paused.resume()


def wait_until_scored(folder: Path, process: "subprocess.Popen[str]") -> None:
    """Return once there are scores of all samples; the trainer stands still until then."""
    with standing_still(folder, process):
        pass
