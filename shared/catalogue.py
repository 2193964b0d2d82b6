"""The catalogue: a run's folder, who it belongs to, and where its processes answer.

run.json        run id, data set fingerprint, N, resolved configuration, scoring_id; written once
samples.arrow   sample_id, key, label of every sample
runtime.json    REST address, driver pid, Ray's folder; there while the run is up
token           the bearer token for changes, mode 0600
summary.json    what came of it
"""

import contextlib
import datetime
import json
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared.datasets import Images
from shared.errors import RunError
from shared.schema import arrow_file
from shared.storage import Folder, local_path

Uri = str | os.PathLike[str]


class Run:
    """One run folder. `Run.create` makes one, `Run(uri)` opens one; raises RunError when there is none."""

    def __init__(self, uri: Uri) -> None:
        self._folder = Folder(uri)
        self.path = self._folder.path
        description = self.read("run.json")
        if description is None:
            raise RunError(f"{self.path} is not a run folder: it has no run.json")
        self.description: dict[str, Any] = description

    @classmethod
    def create(
        cls, uri: Uri, *, dataset_fingerprint: str, train: Images, config: dict[str, Any], scoring_id: str
    ) -> "Run":
        """Make the folder of a new run. Raises RunError when it already holds one."""
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
            }
            taken = RunError(f"{path} already holds a run; choose another folder with --set run.folder=...")
            if "run.json" in folder.names():
                raise taken
            ids = np.arange(len(train))
            samples = pa.table({"sample_id": ids, "key": [str(i) for i in ids], "label": train.label_N})
            folder.put("samples.arrow", arrow_file(samples))
            if not folder.create("run.json", _json(description)):  # last: what has it is whole
                raise taken
        except OSError as error:
            raise RunError(f"cannot write the run folder {path}: {error.strerror}; set run.folder") from error
        return cls(path)

    @property
    def num_samples(self) -> int:
        return int(self.description["num_samples"])

    @property
    def is_up(self) -> bool:
        """Whether its driver runs, or was killed and left its runtime.json."""
        return (self.path / "runtime.json").exists()

    @property
    def scores_uri(self) -> Path:
        return self.path / "scores"

    def check_dataset(self, fingerprint: str) -> None:
        """Raises RunError when ids of this run mean other samples than those of `fingerprint`."""
        own = self.description["dataset_fingerprint"]
        if fingerprint != own:
            raise RunError(
                f"run {self.path} was made for the data set {own}, here is {fingerprint}; "
                "bring the same files, or start a new run"
            )

    def samples(self) -> pa.Table:
        """sample_id, key and label of every sample."""
        return pa.ipc.open_file(pa.memory_map(str(self.path / "samples.arrow"))).read_all()

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None when it is not there."""
        try:
            content: dict[str, Any] = json.loads(self._folder.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(f"{self.path / name} is not whole: {error}") from error
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


def newest_run(root: Uri) -> Run:
    """Of the runs below `root` that are up, else of all, the one created last. Raises RunError when there is none."""
    folder = local_path(root)
    runs = []
    for path in folder.glob("*/run.json"):
        with contextlib.suppress(RunError):  # a damaged one hides no other
            runs.append(Run(path.parent))
    if not runs:
        raise RunError(f"no run in {folder}; name a run folder, or start one with `steppe run CONFIG`")
    return max(runs, key=lambda run: (run.is_up, str(run.description["created_at"])))


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()
