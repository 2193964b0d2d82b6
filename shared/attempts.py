"""Attempts: the lives of a run's trainer, and which checkpoints the later ones left behind.

    <run>/train/attempt-0002.json   {"attempt": 2, "fork_step": 460, "last_valid_version": 23, "first_version": 31, ...}

A resumed trainer goes on from the last state that was saved. What was published after that state belongs to a line that
did not go on: those versions are *abandoned*, and rows of theirs are stale. Versions never go back: the new attempt
begins above all of them. An attempt is reserved by creating its file, which only one process can do.
"""

import dataclasses
import datetime
import json
import os

from shared.errors import RunError
from shared.storage import Folder, local_path

Ranges = tuple[tuple[int, int], ...]  # of versions, first and last inclusive, ascending and apart

PREFIX, SUFFIX = "attempt-", ".json"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One life of the trainer: from `fork_step` on, after `last_valid_version`, publishing from `first_version` up."""

    attempt: int
    fork_step: int
    last_valid_version: int
    first_version: int
    started_at: str


def begin(uri: str | os.PathLike[str], *, fork_step: int, last_valid_version: int, first_version: int) -> Attempt:
    """Record the next attempt of the run folder `uri`. Raises RunError when another process does so at the same time.

    Args:
        fork_step: of the state that it goes on from; 0 for a fresh start.
        last_valid_version: the newest model_version published up to that state; 0 when there was none.
        first_version: the lowest that this attempt may publish.
    """
    folder = _folder(uri).make()
    number = max((one.attempt for one in attempts(uri)), default=0) + 1
    now = datetime.datetime.now(datetime.UTC).isoformat()
    attempt = Attempt(number, fork_step, last_valid_version, first_version, now)
    name = f"{PREFIX}{number:04d}{SUFFIX}"
    if not folder.create(name, json.dumps(dataclasses.asdict(attempt), indent=1).encode()):
        path = folder.path / name
        raise RunError(f"{path} is there already: another process resumes this run", fix="wait for it", key=str(path))
    return attempt


def attempts(uri: str | os.PathLike[str]) -> list[Attempt]:
    """All attempts of the run folder `uri`, in order. Raises RunError for a damaged file, naming it."""
    folder = _folder(uri)
    found = []
    for name in folder.names():
        if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
            continue
        try:
            found.append(Attempt(**json.loads(folder.read(name))))
        except (ValueError, TypeError) as error:
            path, fix = folder.path / name, "restore it, or start a new run"
            raise RunError(f"{path} is damaged: {error}", fix=fix, key=str(path)) from error
    return sorted(found, key=lambda one: one.attempt)


def count(uri: str | os.PathLike[str]) -> int:
    """How many attempts there are, without a look into them."""
    return sum(name.startswith(PREFIX) and name.endswith(SUFFIX) for name in _folder(uri).names())


def abandoned(uri: str | os.PathLike[str]) -> Ranges:
    """The versions of the run folder `uri` that no surviving attempt descends from."""
    ranges: list[tuple[int, int]] = []
    for one in attempts(uri):
        first, last = one.last_valid_version + 1, one.first_version - 1
        if first > last:
            continue
        while ranges and ranges[-1][1] >= first - 1:  # a later fork may go back behind an earlier one
            first = min(first, ranges.pop()[0])
        ranges.append((first, last))
    return tuple(ranges)


def _folder(uri: str | os.PathLike[str]) -> Folder:
    return Folder(local_path(uri) / "train")
