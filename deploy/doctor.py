"""What on this machine would keep a run from working, before it does."""

import contextlib
import dataclasses
import importlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import psutil

from deploy.cluster import FOLDER_PREFIX, LONGEST_TEMPORARY_FOLDER, OBJECT_STORE_BYTES, run_folder_of
from deploy.packages import check_packages
from services.server import bind
from shared.catalogue import RunState, all_runs
from shared.config import DataConfig
from shared.datasets import DEBIAN_FASHION_MNIST, load_dataset
from shared.errors import SteppeError
from shared.storage import local_path

Status = Literal["ok", "warning", "problem"]

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
LIBRARIES = ("torch", "torchvision", "ray", "pyarrow")
INSTALL = "install again with ./deploy/local run, or pip install -c deploy/constraints.txt -e ."
GIB = 2**30
LEAST_MEMORY_BYTES = 2 * GIB
LEAST_FREE_BYTES = GIB
SHARED_MEMORY = Path("/dev/shm")
CGROUPS = Path("/sys/fs/cgroup")
FASHION_MNIST_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
RAY_PROCESSES = ("raylet", "gcs_server")
STARTUP_S = 60.0  # a younger folder may belong to a cluster whose processes are still to come
MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "problem": ("problem", "bold red"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` says what to do about a warning or a problem."""

    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs would go and where their REST service would listen."""

    root: str
    host: str
    port: int


Check = Callable[[Place], Finding | Iterable[Finding]]


def examine(root: str, host: str, port: int) -> list[Finding]:
    """What every check finds, in their order. A check that fails is a finding too."""
    place = Place(root, host, port)
    return [finding for name, check in CHECKS for finding in run_check(name, check, place)]


def run_check(name: str, check: Check, place: Place) -> list[Finding]:
    """The findings of one check; what it raises becomes a problem."""
    try:
        found = check(place)
        return [found] if isinstance(found, Finding) else list(found)
    except SteppeError as error:
        return [Finding(name, "problem", error.problem, error.fix)]
    except Exception as error:
        return [Finding(name, "problem", f"{type(error).__name__}: {error}")]


def print_findings(findings: Iterable[Finding]) -> None:
    """One line each on stdout, its fix below it."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for finding in findings:
        mark, style = MARKS[finding.status]
        line = Text.assemble((f"{mark:<9}", style), f"{finding.name}: {finding.detail}")
        console.print(line, highlight=False, soft_wrap=True)
        if finding.fix:
            console.print(Text(f"{'':<9}fix: {finding.fix}"), highlight=False, soft_wrap=True)


class Cgroup:
    """The control group of this process, of version 1 or 2: the tightest limits of it and of all that it is within."""

    def __init__(self, proc: Path = Path("/proc/self/cgroup"), mount: Path = CGROUPS) -> None:
        self._proc, self._mount = proc, mount

    def cpu_quota(self) -> float | None:
        """CPUs that may be used per time; None without a limit."""
        return min((quota for folder in self._folders("cpu") if (quota := _quota(folder))), default=None)

    def memory_left(self) -> int | None:
        """Bytes up to the limit, file caches counted as free; None without a limit."""
        left = []
        for folder in self._folders("memory"):
            limit = _content(folder / "memory.max") or _content(folder / "memory.limit_in_bytes")
            used = _content(folder / "memory.current") or _content(folder / "memory.usage_in_bytes")
            if limit.isdecimal() and used.isdecimal():
                counts = dict(line.split(" ", 1) for line in _content(folder / "memory.stat").splitlines())
                cached = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
                left.append(int(limit) - max(int(used) - cached, 0))
        return min(left, default=None)

    def _folders(self, controller: str) -> Iterator[Path]:
        for line in _content(self._proc).splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            hierarchy = self._mount / controller if controllers else self._mount
            group = hierarchy / path.strip("/")
            # In a container the path may be the host's, of which only the top is mounted here.
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(hierarchy))


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _quota(folder: Path) -> float | None:
    limit, _, of = _content(folder / "cpu.max").partition(" ")
    limit = limit or _content(folder / "cpu.cfs_quota_us")
    of = of or _content(folder / "cpu.cfs_period_us")
    return int(limit) / int(of) if limit.isdecimal() and of.isdecimal() else None  # without a limit "max" or -1


def ray_cpus(mount: Path = CGROUPS) -> int:
    """CPUs as a run's Ray counts them: those of the machine, or the whole ones of a container's quota.

    Ray looks at the top of the mounted cgroups alone, and not at the affinity.
    """
    quota = _quota(mount / "cpu") or _quota(mount)
    return int(quota) if quota else os.cpu_count() or 1


def why_unwritable(folder: Path) -> str | None:
    """Why files could not be made in `folder`, which need not exist; None when they could."""
    there = _nearest_existing(folder)
    if not there.is_dir():
        return f"{there} is not a folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable"


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _space(name: str, folder: Path, fix: str) -> Finding:
    free = shutil.disk_usage(_nearest_existing(folder)).free
    if free < LEAST_FREE_BYTES:
        return Finding(
            name, "warning", f"{folder}: {free / GIB:.1f} GiB free, less than {LEAST_FREE_BYTES / GIB:g}", fix
        )
    return Finding(name, "ok", f"{folder}: writable, {free / GIB:.0f} GiB free")


def _python(_: Place) -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return Finding("Python", "ok", f"{here} ({sys.executable})")
    wanted = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST_PYTHON, NEWEST_PYTHON))
    return Finding(
        "Python", "problem", f"{here}; steppe needs {wanted}", "PYTHON=/path/to/python3.x ./deploy/local run"
    )


def _packages(_: Place) -> Finding:
    return Finding("packages", "ok", f"steppe's own, in {check_packages()}")


def _libraries(_: Place) -> Iterator[Finding]:
    for name in LIBRARIES:
        try:
            version = importlib.import_module(name).__version__
        except Exception as error:  # builds that do not fit raise more than ImportError
            yield Finding(name, "problem", f"cannot be imported: {error}", INSTALL)
        else:
            yield Finding(name, "ok", str(version))


def _cpus(_: Place) -> Finding:
    allowed, quota = len(os.sched_getaffinity(0)), Cgroup().cpu_quota()
    detail = f"{allowed} of {os.cpu_count()}" + ("" if quota is None else f", cgroup quota {quota:g}")
    if min(allowed, quota or allowed) < 2:
        fix = "give the process two, or train without scorers: --set scoring.replicas=0"
        return Finding("CPUs", "warning", f"{detail}: scorers take time from the trainer", fix)
    return Finding("CPUs", "ok", detail)


def _memory(_: Place) -> Finding:
    free, left = psutil.virtual_memory().available, Cgroup().memory_left()
    if left is not None:
        free = min(free, left)
    detail = f"{free / GIB:.1f} GiB available"
    if free < LEAST_MEMORY_BYTES:
        wanted = f"{LEAST_MEMORY_BYTES / GIB:g} GiB"
        return Finding("memory", "warning", f"{detail}, less than {wanted}", f"end other programs, or allow {wanted}")
    return Finding("memory", "ok", detail)


def _gpus(_: Place) -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPUs", "ok", f"{len(names)}: {', '.join(names)}")
    if Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        fix = "compare the driver (nvidia-smi) with python -m torch.utils.collect_env, and CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", "warning", "NVIDIA's driver is here, but PyTorch finds no GPU", fix)
    return Finding("GPUs", "ok", "none: scorers run on CPU")


def _temporary_folder(_: Place) -> Finding:
    """Ray's sockets need a short path: the cluster takes /tmp where the wanted one is long."""
    name, wanted = "temporary folder", tempfile.gettempdir()
    is_long = len(wanted) >= LONGEST_TEMPORARY_FOLDER
    folder = Path("/tmp" if is_long else wanted)
    if reason := why_unwritable(folder):
        return Finding(name, "problem", reason, "set TMPDIR to a folder with a short path that you may write to")
    space = _space(name, folder, "free some, or set TMPDIR to another short path")
    if is_long and space.status == "ok":
        detail = f"{wanted} has {len(wanted)} characters, Ray's sockets allow {LONGEST_TEMPORARY_FOLDER - 1}"
        return Finding(name, "warning", f"{detail}: runs use {folder}", "set TMPDIR to a shorter path")
    return space


def _shared_memory(_: Place) -> Finding:
    name, wanted = f"shared memory ({SHARED_MEMORY})", f"{OBJECT_STORE_BYTES / GIB:g} GiB"
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else 0
    if free < OBJECT_STORE_BYTES:
        fix = "make it larger, in Docker by --shm-size=1g"
        return Finding(name, "warning", f"{free / GIB:.2f} GiB free; Ray's object store wants {wanted}", fix)
    return Finding(name, "ok", f"{free / GIB:.1f} GiB free, {wanted} needed")


def _run_root(place: Place) -> Finding:
    folder = local_path(place.root)
    if reason := why_unwritable(folder):
        return Finding("run root", "problem", reason, "name another: --root, or --set run.root=...")
    return _space("run root", folder, "free some, or name another: --root, or --set run.root=...")


def _port(place: Place) -> Finding:
    bind(place.host, place.port).close()
    what = f"{place.host}:{place.port} is free" if place.port else f"any free one of {place.host}"
    return Finding("REST port", "ok", what)


def _digits(_: Place) -> Finding:
    return Finding("digits", "ok", f"{len(load_dataset(DataConfig(name='digits')).train)} training images, shipped")


def _fashion_mnist(_: Place) -> Finding:
    """By the files' names: reading them takes a while, and a run checks them."""
    folders = (DEBIAN_FASHION_MNIST, Path("~/.cache/steppe/FashionMNIST/raw").expanduser())
    for folder in folders:
        if all((folder / name).exists() or (folder / f"{name}.gz").exists() for name in FASHION_MNIST_FILES):
            return Finding("Fashion-MNIST", "ok", f"in {folder}")
    fix = (
        "only if you want it: apt install dataset-fashion-mnist, or --set data.download=true, "
        "or --set data.root=FOLDER with its four IDX files"
    )
    return Finding("Fashion-MNIST", "warning", f"not in {' or '.join(map(str, folders))}", fix)


def _killed_runs(place: Place) -> Iterator[Finding]:
    runs = all_runs(place.root)
    killed = [run for run in runs if run.state() == RunState.KILLED]
    for run in killed:
        detail = f"{run.path} was killed; it may have left processes and files behind"
        yield Finding("killed runs", "warning", detail, f"steppe down {_quoted(run.path)}")
    if not killed:
        yield Finding("killed runs", "ok", f"none of {len(runs)} in {local_path(place.root)}")


def _ray_folders(place: Place) -> list[Finding]:
    """Those of ours and of this user that no process names in its command line, as Ray's do."""
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    owners = {str(runtime.get("ray_folder")): run.path for run in all_runs(place.root) if (runtime := run.runtime())}
    findings = [
        Finding(
            "Ray folders",
            "warning",
            f"{folder} is left of a run that was killed; no process uses it",
            f"steppe down {_quoted(owners[str(folder)])}" if str(folder) in owners else f"rm -r {_quoted(folder)}",
        )
        for folder in _own_ray_folders()
        if not any(str(folder) in command for command in commands)
    ]
    return findings or [Finding("Ray folders", "ok", "none left behind")]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _own_ray_folders() -> Iterator[Path]:
    for place in sorted({tempfile.gettempdir(), "/tmp"}):
        for folder in sorted(Path(place).glob(f"{FOLDER_PREFIX}*/")):
            with contextlib.suppress(OSError):  # gone meanwhile
                stat = folder.stat()
                is_rays = any(name.startswith("session_") for name in os.listdir(folder))
                if is_rays and stat.st_uid == os.geteuid() and time.time() - stat.st_mtime > STARTUP_S:
                    yield folder


def _other_clusters(_: Place) -> Finding:
    strangers = [process.pid for process in psutil.process_iter(["name"]) if _is_strange_ray(process)]
    if not strangers:
        return Finding("other Ray clusters", "ok", "none")
    pids = ", ".join(map(str, strangers))
    return Finding("other Ray clusters", "ok", f"pids {pids}; runs start their own cluster and do not join it")


def _is_strange_ray(process: psutil.Process) -> bool:
    if process.info["name"] not in RAY_PROCESSES:
        return False
    try:
        return run_folder_of(process) is None
    except psutil.AccessDenied:  # another user's
        return True
    except psutil.Error:
        return False


CHECKS: tuple[tuple[str, Check], ...] = (
    ("Python", _python),
    ("packages", _packages),
    ("libraries", _libraries),
    ("CPUs", _cpus),
    ("memory", _memory),
    ("GPUs", _gpus),
    ("temporary folder", _temporary_folder),
    ("shared memory", _shared_memory),
    ("run root", _run_root),
    ("REST port", _port),
    ("digits", _digits),
    ("Fashion-MNIST", _fashion_mnist),
    ("killed runs", _killed_runs),
    ("Ray folders", _ray_folders),
    ("other Ray clusters", _other_clusters),
)
