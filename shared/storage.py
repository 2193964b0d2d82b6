"""Durable files in one folder: the few operations that score store, checkpoint feed and catalogue are built on.

The operations are those an object store also has (whole-object put, put if absent, list, delete), so that a second
implementation needs nothing else. Today's only one is a folder on a local or network disk.

Durable means: there after a power cut. A file's content is, once it is synced; its name is, once its folder is synced
after the name was made. Nothing is assumed of the order in which a disk keeps what was not synced.
"""

import concurrent.futures
import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote, urlsplit

import psutil

from shared.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa


def local_path(uri: str | os.PathLike[str]) -> Path:
    """The absolute local path, without links and detours, of `uri`, a plain path or a file:// URI.

    Raises ConfigError for any other scheme.
    """
    text = os.fspath(uri)
    scheme, _, rest = text.partition("://")
    if not rest:
        return Path(text).resolve()
    if scheme != "file":
        raise ConfigError(f"{text!r}: only local paths and file:// URIs can be used; mount {scheme}:// as a folder")
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(f"{text!r} names the host {parts.netloc!r}; a local file has three slashes: file:///folder")
    return Path(unquote(parts.path)).resolve()


NETWORK_DISKS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "fuse", "lustre", "gpfs", "beegfs", "glusterfs", "pvfs")

_others = ThreadPoolExecutor(4, thread_name_prefix="storage")  # none of their tasks waits for another


def is_mappable(path: Path) -> bool:
    """Whether a file may be memory-mapped: on a local disk, where a file that is deleted stays readable for who has it.

    On a network disk another host may delete it, and reading the mapping then ends the process (SIGBUS).
    """
    mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[str(parent)] for parent in (path, *path.parents) if str(parent) in mounts), "")
    return not kind.startswith(NETWORK_DISKS)


class Folder:
    """One folder. A name is visible only with its whole content but for `add`; all that is written is durable."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.path = local_path(uri)

    def make(self) -> "Folder":
        """Create the folder when it is not there, durably; also one that somebody created and could not make so."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            try:
                _sync_folder(path.parent)
            except OSError:
                path.rmdir()
                raise
        _sync_folder(self.path.parent)
        return self

    def put(self, name: str, data: "bytes | pa.Buffer") -> None:
        """Write `name`, replacing what was there."""
        with self._temporary(name, data) as temporary:
            os.replace(temporary, self.path / name)
            _sync_folder(self.path)

    def create(self, name: str, data: "bytes | pa.Buffer", after: Callable[[], None] | None = None) -> bool:
        """Write `name` unless it exists; False when it did. Of several at once, exactly one succeeds.

        Args:
            after: waits for what must be durable before the name appears, such as what the file speaks of.
        """
        with self._temporary(name, data) as temporary:
            if after is not None:
                after()
            try:
                os.link(temporary, self.path / name)
            except FileExistsError:
                return False
            syncing = _others.submit(_sync_folder, self.path)  # while the temporary name goes
        syncing.result()
        return True

    def add(self, name: str, data: "bytes | pa.Buffer") -> Callable[[], None]:
        """Begin to write a new file that nobody looks for yet; call the answer to wait until it is durable.

        Content and name are synced side by side, without a temporary name: a crash can leave part of the content under
        `name`. So the name must be told to others only afterwards.
        """
        writing = _others.submit(self._add, name, data)

        def wait() -> None:
            try:
                naming = writing.result()
                naming.result()
            except OSError:
                self.delete(name)
                raise

        return wait

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def names(self) -> list[str]:
        """Names in order; a folder that is not there is empty, temporary files are not names."""
        return [name for name in self._listing() if not name.startswith(".")]

    def temporary_names(self) -> list[str]:
        """What `put` and `create` are writing now, or died over."""
        return [name for name in self._listing() if name.startswith(".")]

    def sync(self) -> None:
        """Make every name that is there durable."""
        _sync_folder(self.path)

    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens when it is not there."""
        (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def dropping(self, name: str) -> Iterator[None]:
        """Remove `name` beside what is done inside; when that fails, the file stays."""
        deletion = _others.submit(self.delete, name)
        try:
            yield
        finally:
            concurrent.futures.wait([deletion])

    def _add(self, name: str, data: "bytes | pa.Buffer") -> "Future[None]":
        with open(self.path / name, "xb") as file:
            naming = _others.submit(_sync_folder, self.path)
            _write_out(file, data)
        return naming

    def _listing(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _temporary(self, name: str, data: "bytes | pa.Buffer") -> Iterator[Path]:
        path = self.path / f".{name}.{secrets.token_hex(6)}"
        try:
            with open(path, "xb") as file:
                _write_out(file, data)
            yield path
        finally:
            path.unlink(missing_ok=True)


def _write_out(file: BinaryIO, data: "bytes | pa.Buffer") -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
