"""A disk that fails when told, and that knows what a power cut would leave of a folder.

`Disk.watching` stands below everything that Python does to files below one folder: the calls go to the real disk, and
beside it the disk keeps what is durable. The model assumes as little as a journalling file system promises:

- a file's content is durable as it was when its fsync began; without one it may be anything after a power cut;
- a name (made, renamed or removed) is durable when an fsync of its folder began after; before, each such change may
  have reached the disk or not, whatever happened to those before and after it.
"""

import builtins
import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Call = tuple[str, str]  # such as ("fsync", "<folder>/manifests")


class Disk:
    """What of `root` is durable, and which of the calls below it fail.

    Args:
        before: told of each call before it is made; what it raises, the caller gets.
    """

    def __init__(self, root: Path, before: Callable[[Call], None] = lambda call: None) -> None:
        self.root, self._before = root, before
        self._lock = threading.RLock()
        self._synced_content: dict[int, bytes] = {}  # by inode
        self._synced_names: dict[str, dict[str, int]] = {}  # of each folder: name -> inode
        self._unsynced: dict[str, list[tuple[str, int | None]]] = {}  # changes of names, in order; None removes

    @contextlib.contextmanager
    def watching(self) -> Iterator["Disk"]:
        real = {name: getattr(os, name) for name in ("fsync", "link", "replace", "unlink", "mkdir", "listdir")}
        real_open = builtins.open

        def wrapped(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                path = self._path(args[0])
                if path is None:
                    return real[name](*args, **kwargs)
                with self._lock:
                    self._before((name, str(path.relative_to(self.root))))
                    return getattr(self, f"_{name}")(real[name], path, *args, **kwargs)

            return call

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            path = self._path(file) if isinstance(file, str | os.PathLike) else None
            if path is None or "x" not in mode:
                return real_open(file, mode, *args, **kwargs)
            with self._lock:
                self._before(("open", str(path.relative_to(self.root))))
                opened = real_open(file, mode, *args, **kwargs)
                self._changed(path, path.stat().st_ino)
            return _Written(opened, self, path)

        for name in real:
            setattr(os, name, wrapped(name))
        builtins.open = open_  # type: ignore[assignment]
        try:
            yield self
        finally:
            builtins.open = real_open
            for name, function in real.items():
                setattr(os, name, function)

    def after_power_cut(self, copy: Path, chance: random.Random | None = None) -> Path:
        """What the disk may hold after a power cut now, at `copy`.

        Args:
            chance: whether each unsynced change is there; None: none of them.
        """
        with self._lock:
            self._restore(self.root, copy, chance)
        return copy

    def wrote(self, path: Path) -> None:
        self._before(("write", str(path.relative_to(self.root))))

    def _restore(self, folder: Path, copy: Path, chance: random.Random | None) -> None:
        copy.mkdir()
        names = dict(self._synced_names.get(str(folder), {}))
        for name, inode in self._unsynced.get(str(folder), []):
            if chance is not None and chance.random() < 0.5:
                if inode is None:
                    names.pop(name, None)
                else:
                    names[name] = inode
        there = {path.stat().st_ino: path for path in self.root.rglob("*")}
        for name, inode in names.items():
            path = there.get(inode)
            if path is not None and path.is_dir():
                self._restore(path, copy / name, chance)
            else:
                (copy / name).write_bytes(self._content(inode, path, chance))

    def _content(self, inode: int, path: Path | None, chance: random.Random | None) -> bytes:
        if inode in self._synced_content:
            return self._synced_content[inode]
        now = path.read_bytes() if path is not None else b""
        return b"" if chance is None else chance.choice([b"", now[: len(now) // 2], bytes(len(now)), now])

    def _path(self, file: Any) -> Path | None:
        """The path below the root that a call is about; None for others."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file)
        except (OSError, TypeError):
            return None
        return path if path.is_relative_to(self.root) else None

    def _changed(self, path: Path, inode: int | None) -> None:
        self._unsynced.setdefault(str(path.parent), []).append((path.name, inode))

    def _fsync(self, real: Callable[..., Any], path: Path, descriptor: int) -> None:
        if path.is_dir():
            self._synced_names[str(path)] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
            self._unsynced[str(path)] = []
        else:
            self._synced_content[os.fstat(descriptor).st_ino] = path.read_bytes()

    def _link(self, real: Callable[..., Any], path: Path, source: Any, target: Any, **kwargs: Any) -> None:
        real(source, target, **kwargs)
        self._changed(Path(target), Path(target).stat().st_ino)

    def _replace(self, real: Callable[..., Any], path: Path, source: Any, target: Any) -> None:
        inode = path.stat().st_ino
        real(source, target)
        self._changed(path, None)
        self._changed(Path(target), inode)

    def _unlink(self, real: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        self._changed(path, None)

    def _mkdir(self, real: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        self._changed(path, path.stat().st_ino)

    def _listdir(self, real: Callable[..., Any], path: Path, *args: Any) -> Any:
        return real(*args)


class _Written:
    """A file opened for writing whose writes the disk is told of."""

    def __init__(self, file: Any, disk: Disk, path: Path) -> None:
        self._file, self._disk, self._path = file, disk, path

    def write(self, data: Any) -> Any:
        self._disk.wrote(self._path)
        return self._file.write(data)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
