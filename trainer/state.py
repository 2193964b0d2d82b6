"""The trainer's saved state: everything that decides how a training goes on, so that a resumed one does the same.

    <run>/train/state-0001-000000460.pt     the state (torch.save), of attempt 1 at step 460
                state-0001-000000460.json   step, model_version, checksum; last; a state without it does not count

It is copied to the host at once and written by a background thread; the last two are kept, so that a damaged one leaves
another to go on from.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from shared.errors import StateError
from shared.events import Events
from shared.storage import Folder, local_path

logger = logging.getLogger(__name__)

KEEP = 2
PREFIX = "state-"


@dataclasses.dataclass(frozen=True)
class SavedState:
    """`content` of the training after `step` optimizer steps; `model_version` was the newest given out by then."""

    step: int
    model_version: int
    content: dict[str, Any]


class StateSaver:
    """Writes states of one attempt; `failed` counts those that could not be written, which stops nobody.

    While one is being written the next is skipped, since a later one follows.
    """

    def __init__(self, uri: str | os.PathLike[str], attempt: int) -> None:
        self._folder = Folder(local_path(uri) / "train").make()
        with contextlib.suppress(OSError):  # what cannot be tidied up stays
            for name in self._folder.temporary_names():  # of a killed attempt; there is one at a time
                self._folder.delete(name)
        self._attempt = attempt
        self._events = Events(uri)
        self._thread = ThreadPoolExecutor(1, "state saver")
        self._writing: Future[None] | None = None
        self.failed = 0

    def save(self, state: SavedState) -> bool:
        """Copy `state` and write it in the background; False when the one before is still being written.

        One whose weights hold NaN is refused, counted.
        """
        if self._writing is not None and not self._writing.done():
            return False
        self._writing = self._thread.submit(self._write, dataclasses.replace(state, content=_host_copy(state.content)))
        return True

    def close(self, last: SavedState | None = None) -> None:
        """Wait until what was given is written; `last`, the state at the end, too."""
        if self._writing is not None:
            self._writing.result()
        if last is not None:
            self._write(last)
        self._thread.shutdown()

    def _write(self, state: SavedState) -> None:
        name = f"{PREFIX}{self._attempt:04d}-{state.step:09d}"
        try:
            if f"{name}.json" in self._folder.names():
                return  # at the end of an epoch, and then of all
            data = _encode(state)
            digest = hashlib.sha256(data).hexdigest()
            marker = {"step": state.step, "model_version": state.model_version, "sha256": digest}
            self._folder.put(f"{name}.pt", data)
            self._folder.put(f"{name}.json", json.dumps(marker).encode())
            self._remove_old()
        except Exception as error:  # such as a full disk: the training goes on, a later one is tried
            self.failed += 1
            logger.warning("the state at step %d could not be saved: %s", state.step, error)
            self._events.append("state_failed", step=state.step, reason=str(error))
        else:
            self._events.append("state_saved", step=state.step)

    def _remove_old(self) -> None:
        names = _stems(self._folder)
        for old in names[:-KEEP]:
            self._folder.delete(f"{old}.json")
        kept = set(names[-KEEP:])
        for name in self._folder.names():
            if name.startswith(PREFIX) and name.endswith(".pt") and name.removesuffix(".pt") not in kept:
                self._folder.delete(name)


def load_newest_state(uri: str | os.PathLike[str]) -> SavedState | None:
    """The newest whole state of the run folder `uri`, on the host; None when none was saved.

    A damaged one is passed over, logged and, once a whole one is found, counts no more.

    Raises: StateError, naming what is wrong, when there are states and none can be read.
    """
    folder = Folder(local_path(uri) / "train")
    damaged: dict[str, Exception] = {}
    for stem in reversed(_stems(folder)):
        try:
            state = _read(folder, stem)
        except Exception as error:  # whatever is wrong with it, the one before may do
            logger.warning("%s cannot be resumed from: %s", folder.path / stem, error)
            Events(uri).append("state_skipped", name=stem, reason=str(error))
            damaged[stem] = error
            continue
        for other, reason in damaged.items():
            if not isinstance(reason, OSError):  # it must not take a whole one's place among those that are kept
                folder.delete(f"{other}.json")
        return state
    if damaged:
        reasons = "; ".join(f"{stem}: {getattr(reason, 'problem', reason)}" for stem, reason in damaged.items())
        raise StateError(
            f"no saved state in {folder.path} can be read ({reasons})",
            fix="restore one, or start a new run",
            key=str(folder.path),
        )
    return None


def _encode(state: SavedState) -> bytes:
    """Raises StateError for weights that hold NaN: nobody wants to go on from them."""
    if any(bool(t.isnan().any()) for t in state.content["model"].values() if t.is_floating_point()):
        # Infinities may be a buffer's own.
        raise StateError("the weights hold NaN", fix="lower train.learning_rate or train.sam.rho", key="model")
    data = io.BytesIO()
    torch.save(state.content, data)
    return data.getvalue()


def _read(folder: Folder, stem: str) -> SavedState:
    marker = json.loads(folder.read(f"{stem}.json"))
    data = folder.read(f"{stem}.pt")
    if hashlib.sha256(data).hexdigest() != marker["sha256"]:
        path = folder.path / f"{stem}.pt"
        raise StateError("it does not match its checksum", fix="restore it from a copy", key=str(path))
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return SavedState(int(marker["step"]), int(marker["model_version"]), content)


def _stems(folder: Folder) -> list[str]:
    """Names of the states that have their marker; attempts in order, within one the steps in order."""
    return [name.removesuffix(".json") for name in folder.names() if name.startswith(PREFIX) and name.endswith(".json")]


def _host_copy(value: Any) -> Any:
    """A copy that later steps do not touch, tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, dict):
        return {key: _host_copy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_host_copy(inner) for inner in value)
    return value
