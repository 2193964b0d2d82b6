"""The Ray cluster that a run works on: one of its own on this machine, all of whose processes are ended again, or
somebody's, which is left as it was found."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from deploy.packages import stage
from shared.catalogue import Run
from shared.errors import ConfigError, RunError, SteppeError
from shared.own import CODE_VARIABLE

LOCAL = "local"  # in place of an address: a cluster of the run's own
RUN_VARIABLE = "STEPPE_RUN_FOLDER"  # inherited by every process of a run's cluster, by which `down` finds them
FOLDER_PREFIX = "steppe-"
NEVER_S = 10**8
OBJECT_STORE_BYTES = 256 * 2**20
END_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 60.0
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in a submitted job, whose packages its workers get
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
    os.environ[CODE_VARIABLE] = os.getcwd()
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
                _system_config={
                    # Training goes on without its cluster: Ray would end this process when the GCS stays away.
                    "gcs_rpc_server_reconnect_timeout_s": NEVER_S,
                    # Ray starts all workers at nice 15: on a busy machine controller and REST would hardly run.
                    "worker_niceness": 0,
                },
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
        del os.environ[RUN_VARIABLE], os.environ[CODE_VARIABLE]
        end_processes(run_folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def joined_cluster(address: str, run: Run, code: Path | None = None) -> Iterator[None]:
    """Join the Ray cluster at `address`; on the way out this run's actors end, and nothing else does.

    Every host gets our packages, and the files of `code`, where the user's own modules are: with the job when this is
    one, else from here.

    Raises: ConfigError when there is no cluster, when its Ray or Python is another, when its token is not ours, or when
        one of its hosts cannot reach the run's folder.
    """
    import ray

    if address.startswith("ray://"):
        raise ConfigError(
            f"--address is {address}, a Ray client's",
            fix="start the run on the cluster: steppe submit CONFIG --address http://HEAD:8265",
            key="--address",
        )
    on_sigterm, is_joined = signal.getsignal(signal.SIGTERM), False
    try:
        with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder:
            if IN_JOB not in os.environ:
                stage(Path(folder), code)
            ray.init(
                address=address,
                namespace=run.description["run_id"],
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=None if IN_JOB in os.environ else {"working_dir": folder},
            )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        is_joined = True
        check_reachable(run)
        yield
    except (RuntimeError, ConnectionError, ValueError) as error:
        if is_joined or isinstance(error, SteppeError):
            raise
        raise ConfigError(
            f"--address {address} cannot be joined: {error}",
            fix="name a Ray cluster that is up, of the same Ray and Python as here",
            key="--address",
        ) from error
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        if is_joined:
            ray.shutdown()


def check_reachable(run: Run) -> None:
    """Raises ConfigError, naming them, when hosts of the cluster cannot read and write the run's folder."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote
    probe = remote(num_cpus=0, max_retries=0)(why_unreachable)
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    asked = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            str(run.path), run.description["run_id"]
        )
        for node in nodes
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=PROBE_TIMEOUT_S)
    reasons = []
    for node, ref in zip(nodes, asked, strict=True):
        try:
            reason = ray.get(ref) if ref in answered else f"it did not answer within {PROBE_TIMEOUT_S:g} s"
        except ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or ["it failed"])[0]
        reasons += [f"{node['NodeManagerAddress']}: {reason}"] if reason else []
    if reasons:
        raise ConfigError(
            f"the run's folder {run.path} cannot be used from all hosts of the cluster ({'; '.join(reasons)})",
            fix="set run.root, or run.folder, to a folder that all of them share, such as a network disk",
            key="run.folder",
        )


def why_unreachable(folder: str, run_id: str) -> str | None:
    """Why this host cannot work on the run folder of another; None when it can."""
    try:
        found = Run(folder)
    except RunError:
        return "it does not see the run there"
    except OSError as error:
        return error.strerror or str(error)
    if found.description["run_id"] != run_id or not os.access(folder, os.W_OK):
        return f"{folder} is another folder here" if os.access(folder, os.W_OK) else f"{folder} is read-only"
    return None


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
