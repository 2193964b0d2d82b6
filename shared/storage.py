"""Durable files in one folder: the few operations that score store, checkpoint feed and catalogue are built on.

At their core are those that an object store also has: `put`, `create` (put if absent), `fill` (put under a new name),
`read`, `names` and `delete`. The others spare time where the folder is on a local or network disk, today's only kind.

Durable means: there after a power cut. A file's content is, once it is synced; its name is, once its folder is synced
after the name was made. Nothing is assumed of the order in which a disk keeps what was not synced.
"""

import errno
import os
import re
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING
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
        raise ConfigError(
            f"{text!r}: only local paths and file:// URIs can be used", fix="choose a folder on a disk", key=text
        )
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        fix = "write three slashes, as in file:///folder"
        raise ConfigError(f"{text!r} names the host {parts.netloc!r}", fix=fix, key=text)
    return Path(unquote(parts.path)).resolve()


MAPPABLE_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs", "hfs"}


def is_mappable(path: Path) -> bool:
    """Whether a file may be memory-mapped: on a local disk, where what is deleted stays readable for who has it open.

    On a network disk another host may delete it, and reading the mapping then ends the process (SIGBUS).
    """
    mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[str(parent)] for parent in (path, *path.parents) if str(parent) in mounts), "")
    return kind in MAPPABLE_DISKS


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what link says on FAT, and on object stores mounted as folders
DRAFT = re.compile(r"\.draft-[0-9a-f]{16}")
SPARES = 8


class Folder:
    """One folder. What is written is durable, and its name visible only with the whole content (but see `fill`)."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.path = local_path(uri)
        self._spares: list[str] = []
        self._preparing = threading.Lock()

    def make(self) -> "Folder":
        """Create the folder when it is not there, durably; also one that somebody created and could not make so."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        for path in reversed(missing or [self.path]):
            path.mkdir(exist_ok=True)
            try:
                _sync_folder(path.parent)
            except OSError:
                if missing:
                    path.rmdir()
                raise
        return self

    def put(self, name: str, data: "bytes | pa.Buffer") -> None:
        """Write `name`, replacing what was there."""
        draft = self.draft(data)
        try:
            os.replace(draft, self.path / name)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        self.sync()

    def create(self, name: str, data: "bytes | pa.Buffer") -> bool:
        """Write `name` unless it exists; False when it did. Of several at once, exactly one succeeds."""
        return self.publish(self.draft(data), name)

    def draft(self, data: "bytes | pa.Buffer") -> Path:
        """The first half of `create`: a durable file under a temporary name, to be published or removed."""
        path = self.path / f".draft-{secrets.token_hex(8)}"
        _write_out(path, data)
        return path

    def publish(self, draft: Path, name: str) -> bool:
        """The second half: give the draft its name unless that exists. The draft goes."""
        try:
            os.link(draft, self.path / name)
        except FileExistsError:
            if draft.stat().st_nlink == 1:  # 2 when NFS asked twice for the same link
                return False
        except OSError as error:
            if error.errno in NO_LINKS:
                raise ConfigError(
                    f"{self.path} is on a file system without hard links ({error.strerror}), by which steppe's files "
                    "appear whole and but once",
                    fix="use a folder on a local disk, or on NFS",
                    key=str(self.path),
                ) from error
            raise
        finally:
            draft.unlink(missing_ok=True)
        self.sync()
        return True

    def new_name(self, suffix: str) -> str:
        """A name of nobody else's, to `fill`; one of those that `prepare` made while there are any."""
        return self._spares.pop() if self._spares else f"{secrets.token_hex(12)}{suffix}"

    def fill(self, name: str, data: "bytes | pa.Buffer") -> None:
        """Write `name`, a new one. It is visible before its content is: only who is told of it then may read it."""
        is_durable_name = (self.path / name).exists()
        _write_out(self.path / name, data)
        if not is_durable_name:
            self.sync()

    def prepare(self, suffix: str) -> None:
        """Have names ready, durable and empty, for what comes: to make them is a good part of the time of `fill`."""
        with self._preparing:
            if not self._spares:
                names = [self.new_name(suffix) for _ in range(SPARES)]
                for name in names:
                    os.close(_open(self.path / name))
                self.sync()
                self._spares += names

    def tidy(self) -> None:
        """Remove what `prepare` made and nobody used."""
        while self._spares:
            self.delete(self._spares.pop())

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def names(self) -> list[str]:
        """Names in order, but of temporary and prepared files; a folder that is not there is empty."""
        with self._preparing:
            return [name for name in self._listing() if not name.startswith(".") and name not in self._spares]

    def temporary_names(self) -> list[str]:
        """What `put` and `create` are writing now, or died over."""
        return [name for name in self._listing() if DRAFT.fullmatch(name)]

    def sync(self) -> None:
        """Make every name that is there durable."""
        _sync_folder(self.path)

    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens when it is not there."""
        (self.path / name).unlink(missing_ok=True)

    def _listing(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []


def _write_out(path: Path, data: "bytes | pa.Buffer") -> None:
    """All that the file holds, durably; no file when that fails."""
    descriptor = _open(path)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
