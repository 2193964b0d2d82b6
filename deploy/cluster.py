"""A Ray cluster of the run's own on this machine, and everything that it started ended again."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

RUN_VARIABLE = "STEPPE_RUN_FOLDER"  # inherited by every process of a run's cluster, by which `down` finds them
FOLDER_PREFIX = "steppe-"
NEVER_S = 10**8
OBJECT_STORE_BYTES = 256 * 2**20
END_TIMEOUT_S = 5.0
LONGEST_TEMPORARY_FOLDER = 40  # Ray puts sockets below it, whose paths are limited to 107 characters


def new_ray_folder() -> Path:
    """A temporary folder for a cluster, with a path short enough."""
    place = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place if len(place) < LONGEST_TEMPORARY_FOLDER else "/tmp"))


@contextlib.contextmanager
def local_cluster(folder: Path, run_folder: Path, run_id: str) -> Iterator[None]:
    """Start a local Ray cluster for a run, with its files in `folder`. Ends all of its processes on the way out."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ[RUN_VARIABLE] = str(run_folder)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # Workers look for packages in the folder that ray.init is called in, before the installed ones.
        with contextlib.chdir(folder):
            ray.init(
                address="local",
                namespace=run_id,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                # Training goes on without its cluster: Ray would end this process when the GCS stays away.
                _system_config={"gcs_rpc_server_reconnect_timeout_s": NEVER_S},
            )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init replaced it by handlers that end without clean-up
        yield
    except SystemExit as error:  # how ray.init's own handler ends on SIGTERM
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        ray.shutdown()
        del os.environ[RUN_VARIABLE]
        end_processes(run_folder)
        shutil.rmtree(folder, ignore_errors=True)


def end_processes(run_folder: Path, timeout_s: float = END_TIMEOUT_S) -> int:
    """End what is left of a run's cluster: processes that carry its folder in their environment. Returns how many.

    They have `timeout_s` to end by themselves, as they do once their cluster is gone.
    """
    left = processes_of(run_folder)
    _, stubborn = psutil.wait_procs(left, timeout=timeout_s) if left else ([], [])
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=END_TIMEOUT_S)
    return len(left)


def processes_of(run_folder: Path) -> list[psutil.Process]:
    """The processes of a run's cluster, this one not among them."""
    others = (process for process in psutil.process_iter() if process.pid != os.getpid())
    return [process for process in others if run_folder_of(process) == str(run_folder)]


def run_folder_of(process: psutil.Process) -> str | None:
    """The run whose cluster `process` belongs to, by its environment; None when to none, or when it may not be read."""
    try:
        # Not psutil's environ(): it stops at the first gap, which Ray's workers have since they changed their title.
        entries = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        try:
            return process.environ().get(RUN_VARIABLE)
        except psutil.Error:
            return None
    prefix = f"{RUN_VARIABLE}=".encode()
    return next((os.fsdecode(entry.removeprefix(prefix)) for entry in entries if entry.startswith(prefix)), None)


def remove_ray_folder(folder: str | None) -> None:
    """Remove a cluster's temporary folder that its driver could not remove itself."""
    if folder and Path(folder).name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
