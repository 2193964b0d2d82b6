"""The checkpoint feed: weights that the trainer publishes and every scorer follows.

    <run>/checkpoints/v00000007/weights.safetensors   parameters and buffers, contiguous, on the host
                                meta.json             step, checksum, time, which tensors are tied
                                STABLE                last; readers wait for it and trust nothing without it

A version is reserved by creating its folder, which only one process can do, so that versions rise over restarts too.
Torch is imported by the functions that handle weights, so that a service can list checkpoints without it.
"""

import atexit
import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import operator
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.attempts import begin
from shared.errors import CheckpointCorrupt, CheckpointError, CheckpointGone, PerturbedWeights
from shared.events import Events
from shared.storage import Folder, local_path

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Uri = str | os.PathLike[str]

PERTURBED_FLAG = "_steppe_perturbed"  # set on each parameter by SAM's first step, removed by its second


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A stable checkpoint: `step` optimizer steps made these weights; `published_at` is in seconds since the epoch."""

    path: Path
    model_version: int
    step: int
    published_at: float
    sha256: str
    bytes: int
    tied: dict[str, str]


class CheckpointPublisher:
    """Publishes weights from a background thread; the caller is held up only for the copy to host memory.

    At most `max_pending` copies wait to be written; of more the oldest is skipped (its version stays unused) and
    counted in `skipped`, since scorers only want the newest. `published` counts stable ones, `newest_version` is the
    last that `publish` gave.

    Args:
        uri: the run folder.
        keep_last: stable versions to keep; older ones are removed.
        resumed_at: optimizer steps of the state that a training of the user's own goes on from, 0 for one from scratch
            in a run that was trained in before. What was published after it is abandoned: its scores are stale
            (`shared.attempts`).

    A version that cannot be written is counted in `failed` and does not stop the training.

    Raises: CheckpointError from `flush` and `close` when the last version could not be written.
    """

    def __init__(self, uri: Uri, *, keep_last: int = 4, max_pending: int = 4, resumed_at: int | None = None) -> None:
        for key, value in (("keep_last", keep_last), ("max_pending", max_pending)):
            if value < 1:
                raise CheckpointError(f"{key} is {value}", fix="set it to 1 or more", key=key)
        self._folder = Folder(local_path(uri) / "checkpoints").make()
        self._events = Events(uri)
        self._keep_last = keep_last
        self._next_version = _highest(self._folder) + 1
        self._copies: queue.Queue[tuple[int, int, dict[str, torch.Tensor], dict[str, str]] | None] = queue.Queue()
        self._max_pending = max_pending
        self._failure: BaseException | None = None
        self._closed = False
        self.published = 0
        self.skipped = 0
        self.failed = 0
        self.seconds = 0.0  # that callers spent in `publish`
        self.published_at: dict[int, float] = {}  # when `publish` was called, by version (time.monotonic)
        last = newest(uri)
        self.newest_version = last.model_version if last else 0
        if resumed_at is not None:
            begin(
                uri,
                fork_step=resumed_at,
                last_valid_version=_last_up_to(uri, resumed_at),
                first_version=self._next_version,
            )
        self._thread = threading.Thread(target=self._write_copies, name="publisher", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)  # what a script published last is written

    def publish(self, model: "torch.nn.Module", step: int) -> int:
        """Reserve the next model_version, copy the weights and return it; `flush` waits until they are stable.

        When none can be reserved, such as on a full disk, that counts in `failed`, and the last version is returned.

        Raises: PerturbedWeights between SAM's first and second step.
        """
        began = time.monotonic()
        step = operator.index(step)
        if self._closed:
            raise CheckpointError("this CheckpointPublisher is closed", fix="open a new one")
        if any(getattr(p, PERTURBED_FLAG, False) for p in model.parameters()):
            fix = "publish before first_step or after second_step"
            raise PerturbedWeights("the model holds w + e(w)", fix=fix, key="model")
        tensors, tied = _host_copy(model)
        try:
            version = self._reserve()
        except OSError as error:
            self._note_failure(self._next_version - 1, step, error)
            return self.newest_version
        while self._copies.qsize() >= self._max_pending:
            with contextlib.suppress(queue.Empty):
                self._copies.get_nowait()
                self._copies.task_done()
                self.skipped += 1
        self._copies.put((version, step, tensors, tied))
        self.newest_version = version
        self.published_at[version] = began
        self.seconds += time.monotonic() - began
        return version

    @property
    def next_version(self) -> int:
        """The lowest model_version that the next `publish` may give."""
        return self._next_version

    def flush(self) -> None:
        """Wait until everything published is stable."""
        self._copies.join()
        self._raise_failure()

    def close(self) -> None:
        """Flush and end. Twice is fine."""
        if not self._closed:
            self._closed = True
            self._copies.put(None)
            self._thread.join()
            atexit.unregister(self._close_at_exit)
        self._raise_failure()

    def _close_at_exit(self) -> None:
        with contextlib.suppress(CheckpointError):  # it is in the log and in the run's events
            self.close()

    def __enter__(self) -> "CheckpointPublisher":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise CheckpointError(
                f"publishing to {self._folder.path} failed: {self._failure}",
                fix="see that there is room and that you may write there, then publish again",
                key=str(self._folder.path),
            ) from self._failure

    def _note_failure(self, version: int, step: int, error: Exception) -> None:
        logger.warning("checkpoint %d could not be written: %s", version, error)
        self.failed += 1
        self._failure = error
        self._events.append("publish_failed", model_version=version, step=step, reason=str(error))

    def _reserve(self) -> int:
        while True:
            version = self._next_version
            self._next_version += 1
            try:
                (self._folder.path / _name(version)).mkdir()
            except FileExistsError:
                continue
            return version

    def _write_copies(self) -> None:
        while (copy := self._copies.get()) is not None:
            version, step, tensors, tied = copy
            try:
                _write(Folder(self._folder.path / _name(version)), step, tensors, tied)
                self.published += 1
                self._failure = None
                self._events.append("published", model_version=version, step=step)
                _remove_old(self._folder, self._keep_last)
            except Exception as error:  # such as a full disk: training goes on, the next version is tried
                self._note_failure(version, step, error)
            finally:
                self._copies.task_done()
        self._copies.task_done()


def newest(uri: Uri) -> Checkpoint | None:
    """The newest stable checkpoint of the run folder `uri`; None when there is none yet."""
    return next(stable(uri), None)


def stable(uri: Uri, on_damaged: Callable[[int, Exception], None] = lambda *_: None) -> Iterator[Checkpoint]:
    """Stable checkpoints of the run folder `uri`, newest first.

    One whose description is damaged is passed over, and `on_damaged` told its version and what is wrong.
    """
    folder = Folder(local_path(uri) / "checkpoints")
    for name in reversed(_versions(folder)):
        path = folder.path / name
        if not (path / "STABLE").exists():
            continue
        try:
            meta = json.loads((path / "meta.json").read_bytes())
            checkpoint = Checkpoint(path=path, model_version=int(name[1:]), **meta)
        except FileNotFoundError:
            continue  # removed meanwhile: a newer one is there
        except (OSError, ValueError, TypeError) as error:
            on_damaged(int(name[1:]), error)
            continue
        yield checkpoint


def _last_up_to(uri: Uri, step: int) -> int:
    """The newest version of at most `step` optimizer steps; of those removed it is not known, and taken to be.

    Of a training from scratch there is none.
    """
    if step < 1:
        return 0
    versions = {checkpoint.model_version: checkpoint.step for checkpoint in stable(uri)}
    return max((version for version, at in versions.items() if at <= step), default=min(versions, default=1) - 1)


def load(checkpoint: Checkpoint) -> "dict[str, torch.Tensor]":
    """The state dict, on the CPU. Raises CheckpointGone, or CheckpointCorrupt when the checksum does not match."""
    import safetensors.torch

    path = checkpoint.path / "weights.safetensors"
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if (checkpoint.path / "STABLE").exists():
            wrong = f"{path} is missing from a stable checkpoint"
            raise CheckpointCorrupt(wrong, fix="take a newer checkpoint", key=str(path)) from error
        raise CheckpointGone(f"{path} was removed", fix="take a newer checkpoint", key=str(path)) from error
    found = hashlib.sha256(data).hexdigest()
    if found != checkpoint.sha256:
        wrong = f"{path} ({len(data)} bytes) does not match its checksum"
        raise CheckpointCorrupt(wrong, fix="take a newer checkpoint", key=str(path))
    state: dict[str, torch.Tensor] = safetensors.torch.load(data)
    return state | {name: state[other] for name, other in checkpoint.tied.items()}


def _host_copy(model: "torch.nn.Module") -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Contiguous host copies by name, and which further names share a tensor with one of these."""
    import torch

    copies: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            wrong = f"{name} of the model's state is a {type(tensor).__name__}, and a checkpoint holds tensors only"
            raise CheckpointError(wrong, fix="make it a tensor, or leave it out of state_dict()", key=name)
        if (other := seen.setdefault(id(tensor), name)) != name:
            tied[name] = other
        else:
            source = tensor.detach().contiguous()
            copies[name] = source.clone() if source.device.type == "cpu" else source.cpu()
    return copies, tied


def _write(folder: Folder, step: int, tensors: "dict[str, torch.Tensor]", tied: dict[str, str]) -> None:
    import safetensors.torch

    data = safetensors.torch.save(tensors)
    folder.put("weights.safetensors", data)
    meta: dict[str, Any] = {
        "step": step,
        "published_at": datetime.datetime.now(datetime.UTC).timestamp(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "tied": tied,
    }
    folder.put("meta.json", json.dumps(meta).encode())
    folder.put("STABLE", b"")


def _remove_old(folder: Folder, keep_last: int) -> None:
    """Remove all versions below the `keep_last` newest stable ones. STABLE goes first, so that none is half there."""
    names = _versions(folder)
    kept = [name for name in names if (folder.path / name / "STABLE").exists()][-keep_last:]
    for name in names[: names.index(kept[0])] if kept else []:
        (folder.path / name / "STABLE").unlink(missing_ok=True)
        shutil.rmtree(folder.path / name, ignore_errors=True)


def _highest(folder: Folder) -> int:
    return max((int(name[1:]) for name in _versions(folder)), default=0)


def _versions(folder: Folder) -> list[str]:
    return [name for name in folder.names() if name[0] == "v" and name[1:].isdecimal()]


def _name(version: int) -> str:
    return f"v{version:08d}"
