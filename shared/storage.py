"""Durable files in one folder: the few operations that score store, checkpoint feed and catalogue are built on.

The operations are those an object store also has (whole-object put, put if absent, list, delete), so that a second
implementation needs nothing else. Today's only one is a folder on a local or network disk.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

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


class Folder:
    """One folder. A name is visible only with its whole content; `put` and `create` are durable on return."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.path = local_path(uri)

    def make(self) -> "Folder":
        """Create the folder, durably, when it is not there."""
        missing = []
        path = self.path
        while not path.exists():
            missing.append(path)
            path = path.parent
        self.path.mkdir(parents=True, exist_ok=True)
        for path in reversed(missing):
            _sync_folder(path.parent)
        return self

    def put(self, name: str, data: "bytes | pa.Buffer") -> None:
        """Write `name`, replacing what was there."""
        with self._temporary(name, data) as temporary:
            os.replace(temporary, self.path / name)
            _sync_folder(self.path)

    def create(self, name: str, data: "bytes | pa.Buffer") -> bool:
        """Write `name` unless it exists; False when it did. Of several at once, exactly one succeeds."""
        with self._temporary(name, data) as temporary:
            try:
                os.link(temporary, self.path / name)
            except FileExistsError:
                return False
            _sync_folder(self.path)
            return True

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def names(self) -> list[str]:
        """Names in order; a folder that is not there is empty, temporary files are not names."""
        return [name for name in self._listing() if not name.startswith(".")]

    def temporary_names(self) -> list[str]:
        """What `put` and `create` are writing now, or died over."""
        return [name for name in self._listing() if name.startswith(".")]

    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens when it is not there."""
        (self.path / name).unlink(missing_ok=True)

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
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
