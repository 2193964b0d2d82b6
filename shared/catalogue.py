"""The catalogue: a run's folder, who it belongs to, and where its processes answer.

run.json        run id, data set fingerprint, N, resolved configuration, scoring_id; written once
samples.arrow   sample_id, key, label, clean_label where known, domain of every sample
runtime.json    REST address, driver pid, Ray's folder; there while the run is up, and after a kill
lock            held by the driver
token           the bearer token for changes, mode 0600
summary.json    what came of it
"""

import contextlib
import datetime
import enum
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from shared.errors import RunError
from shared.samples import Samples
from shared.schema import arrow_file
from shared.storage import Folder, local_path

Uri = str | os.PathLike[str]


CLOCK_STEP_S = 30.0  # the system's clock may be set while a run goes on, and start times move with it


_RESTORE = "bring it back from a copy, or start a new run"

_DESCRIBED = {"run_id", "created_at", "dataset_fingerprint", "num_samples", "scoring_id", "config"}


class RunState(enum.StrEnum):
    """What became of a run."""

    RUNNING = "running"
    SERVED = "served"  # not running; `steppe serve` answers for it
    KILLED = "killed"  # its driver is gone and left a runtime.json
    FINISHED = "finished"
    INTERRUPTED = "interrupted"


class Run:
    """One run folder. `Run.create` makes one, `Run(uri)` opens one; raises RunError when there is none."""

    def __init__(self, uri: Uri) -> None:
        self._folder = Folder(uri)
        self.path = self._folder.path
        description = self.read("run.json")
        if description is None:
            wrong = f"{self.path} is not a run folder: it has no run.json"
            raise RunError(wrong, fix="to see the runs: steppe runs", key=str(self.path))
        if missing := sorted(_DESCRIBED - description.keys()):
            wrong = f"{self.path / 'run.json'} is not of a run: it lacks {', '.join(missing)}"
            raise RunError(wrong, fix=_RESTORE, key=str(self.path / "run.json"))
        self.description: dict[str, Any] = description

    @classmethod
    def create(
        cls,
        uri: Uri,
        *,
        dataset_fingerprint: str,
        train: Samples,
        config: dict[str, Any],
        scoring_id: str,
        is_trained_here: bool = True,
    ) -> "Run":
        """Make the folder of a new run. Raises RunError when it already holds one.

        Args:
            is_trained_here: by steppe's own trainer; else by a loop of the user's, beside `steppe score`.
        """
        path = local_path(uri)
        try:
            folder = Folder(path).make()
            description = {
                "run_id": path.name,
                "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
                "dataset_fingerprint": dataset_fingerprint,
                "num_samples": len(train),
                "scoring_id": scoring_id,
                "config": config,
                "is_trained_here": is_trained_here,
            }
            fix = "choose another folder with --set run.folder=..."
            taken = RunError(f"{path} already holds a run", fix=fix, key=str(path))
            if "run.json" in folder.names():
                raise taken
            folder.put("samples.arrow", arrow_file(_samples_table(train)))
            if not folder.create("run.json", _json(description)):  # last: what has it is whole
                raise taken
        except OSError as error:
            raise RunError(
                f"cannot write the run folder {path}: {error.strerror}",
                fix="set run.folder, or run.root, to a folder that you may write to",
                key=str(path),
            ) from error
        return cls(path)

    @property
    def is_trained_here(self) -> bool:
        return bool(self.description.get("is_trained_here", True))

    @property
    def num_samples(self) -> int:
        return int(self.description["num_samples"])

    @property
    def num_classes(self) -> int:
        """K, by the samples' labels. Raises RunError when they cannot be read."""
        return int(self.samples().column("label").to_numpy().max()) + 1

    def state(self) -> RunState:
        """Running, served, killed, finished or interrupted, by its files and the process that they name."""
        finished = (self.path / "summary.json").exists()
        runtime = self.runtime()
        if runtime:
            if is_running(runtime):
                return RunState.SERVED if runtime.get("role") == "serve" else RunState.RUNNING
            if not finished:
                return RunState.KILLED
        return RunState.FINISHED if finished else RunState.INTERRUPTED

    def runtime(self) -> dict[str, Any] | None:
        """What runtime.json says; nothing when it is torn, None when there is none."""
        try:
            return self.read("runtime.json")
        except RunError:
            return {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held by the driver: one at a time writes this run. Raises RunError when another one does."""
        with open(self.path / "lock", "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"{self.path} is running, or being resumed",
                    fix=f"stop it first: steppe down {self.path}",
                    key=str(self.path),
                ) from None
            yield

    @property
    def scores_uri(self) -> Path:
        return self.path / "scores"

    def check_dataset(self, fingerprint: str) -> None:
        """Raises RunError when ids of this run mean other samples than those of `fingerprint`."""
        own = self.description["dataset_fingerprint"]
        if fingerprint != own:
            raise RunError(
                f"run {self.path} was made for the data set {own}, here is {fingerprint}",
                fix="bring the same files, or start a new run",
                key=str(self.path),
            )

    def samples(self) -> pa.Table:
        """sample_id, key, label, clean_label (null without label noise) and domain (null so far) of every sample.

        Raises RunError when the file cannot be read.
        """
        path = self.path / "samples.arrow"
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"cannot read {path}: {error}", fix=_RESTORE, key=str(path)) from error

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None when it is not there."""
        path = self.path / name
        fix = _RESTORE if name == "run.json" else "remove it"
        try:
            content: dict[str, Any] = json.loads(self._folder.read(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}", fix="make it readable", key=str(path)) from error
        except ValueError as error:
            raise RunError(f"{path} is not whole: {error}", fix=fix, key=str(path)) from error
        if not isinstance(content, dict):
            raise RunError(f"{path} is not of a run: it holds no JSON object", fix=fix, key=str(path))
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        self._folder.put(name, _json(content))

    def remove(self, name: str) -> None:
        self._folder.delete(name)

    def create_token(self) -> str:
        """A new bearer token, in a file that only this user can read."""
        token = secrets.token_urlsafe(24)
        path = self.path / "token"
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(token)
        return token

    def token(self) -> str | None:
        try:
            return (self.path / "token").read_text(encoding="ascii")
        except FileNotFoundError:
            return None


def all_runs(root: Uri) -> list[Run]:
    """The runs below `root`, the oldest first."""
    runs = []
    for path in local_path(root).glob("*/run.json"):
        with contextlib.suppress(RunError):  # a damaged one hides no other
            runs.append(Run(path.parent))
    return sorted(runs, key=lambda run: str(run.description["created_at"]))


def newest_run(root: Uri) -> Run:
    """Of the runs below `root` that are running or served, else killed, else of all, the one created last.

    Raises RunError when there is none.
    """
    runs = all_runs(root)
    if not runs:
        path, fix = local_path(root), "name a run folder, or start one with `steppe run CONFIG`"
        raise RunError(f"no run in {path}", fix=fix, key=str(path))
    rank = {RunState.RUNNING: 2, RunState.SERVED: 2, RunState.KILLED: 1}
    return max(reversed(runs), key=lambda run: rank.get(run.state(), 0))  # of equals the newest


def process_identity() -> dict[str, Any]:
    """What a runtime.json says of this process, so that a later one with the same pid is not taken for it."""
    return {"pid": os.getpid(), "pid_started": psutil.Process().create_time()}


def is_running(runtime: Mapping[str, Any]) -> bool:
    """Whether the process that wrote `runtime` (`process_identity`) still runs on this machine."""
    try:
        process = psutil.Process(int(runtime.get("pid", -1)))
        return (
            abs(process.create_time() - float(runtime.get("pid_started", 0))) < CLOCK_STEP_S
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except (psutil.NoSuchProcess, ValueError, TypeError):
        return False


def _samples_table(train: Samples) -> pa.Table:
    count = len(train)
    clean_label = pa.nulls(count, pa.int64()) if train.clean_label_N is None else train.clean_label_N
    return pa.table(
        {
            "sample_id": np.arange(count),
            "key": pa.array(train.key_N.tolist(), pa.string()),
            "label": train.label_N,
            "clean_label": clean_label,
            "domain": pa.nulls(count, pa.string()),
        }
    )


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()
