"""A disk that fails when told, and that knows what a power cut would leave of a folder.

`Disk.watching` stands below everything that the store does to files below one folder: the calls go to the real disk,
and beside it the disk keeps what is durable. The model assumes as little as a journalling file system promises:

- a file's content is durable as it was when its fsync began; without one it may be anything after a power cut;
- a name (made, renamed or removed) is durable when an fsync of its folder began after; before, each such change may
  have reached the disk or not, whatever happened to those before and after it.
"""

import contextlib
import io
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

CALLS = ("open", "write", "fsync", "link", "replace", "unlink", "mkdir", "listdir", "read")
Call = tuple[str, str]  # such as ("fsync", "<folder>/manifests")


class Disk:
    """What of `root` is durable, and which of the calls below it fail.

    Args:
        before: told of each call before it is made; what it raises, the caller gets.
    """

    def __init__(self, root: Path, before: Callable[[Call], None] = lambda call: None) -> None:
        self.root, self._before = root, before
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._files: dict[Path, int] = {}  # the file or folder that has this name now
        self._synced_content: dict[int, bytes] = {}
        self._synced_names: dict[int, dict[str, int]] = {}  # of each folder: name -> file
        self._unsynced: dict[int, list[tuple[str, int | None]]] = {}  # changes of names, in order; None removes

    @contextlib.contextmanager
    def watching(self) -> Iterator["Disk"]:
        watched = [(os, name, name) for name in CALLS if name != "read"]
        watched += [(io, "open", "read"), (pa, "memory_map", "read")]
        real = [getattr(module, name) for module, name, _ in watched]
        for (module, name, call), function in zip(watched, real, strict=True):
            setattr(module, name, self._watched(call, function))
        try:
            yield self
        finally:
            for (module, name, _), function in zip(watched, real, strict=True):
                setattr(module, name, function)

    def after_power_cut(self, copy: Path, chance: random.Random | None = None) -> Path:
        """What the disk may hold after a power cut now, at `copy`.

        Args:
            chance: whether each unsynced change is there; None: none of them.
        """
        with self._lock:
            self._restore(self._file(self.root), copy, chance)
        return copy

    def _watched(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            path = self._path(args[0])
            if path is None:
                return real(*args, **kwargs)
            with self._lock:
                self._before((call, str(path.relative_to(self.root))))
                return getattr(self, f"_{call}", self._other)(real, path, *args, **kwargs)

        return watched

    def _path(self, file: Any) -> Path | None:
        """The path below the root that a call is about; None for others."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file)
        except (OSError, TypeError):
            return None
        return path if path.is_relative_to(self.root) else None

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = next(self._ids)
        return self._files[path]

    def _changed(self, path: Path, file: int | None) -> None:
        if file is None:
            self._files.pop(path, None)
        else:
            self._files[path] = file
        self._unsynced.setdefault(self._file(path.parent), []).append((path.name, file))

    def _restore(self, folder: int, copy: Path, chance: random.Random | None) -> None:
        copy.mkdir()
        names = dict(self._synced_names.get(folder, {}))
        for name, file in self._unsynced.get(folder, []):
            if chance is not None and chance.random() < 0.5:
                if file is None:
                    names.pop(name, None)
                else:
                    names[name] = file
        path_of = {file: path for path, file in self._files.items()}
        for name, file in names.items():
            path = path_of.get(file)
            if path is not None and path.is_dir():
                self._restore(file, copy / name, chance)
            else:
                (copy / name).write_bytes(self._content(file, path, chance))

    def _content(self, file: int, path: Path | None, chance: random.Random | None) -> bytes:
        if file in self._synced_content:
            return self._synced_content[file]
        now = path.read_bytes() if path is not None else b""
        return b"" if chance is None else chance.choice([b"", now[: len(now) // 2], bytes(len(now)), now])

    def _open(self, real: Callable[..., Any], path: Path, *args: Any) -> Any:
        is_new = not path.exists()
        descriptor = real(*args)
        if is_new:
            self._changed(path, next(self._ids))
        return descriptor

    def _fsync(self, real: Callable[..., Any], path: Path, descriptor: int) -> None:
        if path.is_dir():
            self._synced_names[self._file(path)] = {each.name: self._file(each) for each in path.iterdir()}
            self._unsynced[self._file(path)] = []
        else:
            self._synced_content[self._file(path)] = path.read_bytes()

    def _link(self, real: Callable[..., Any], path: Path, source: Any, target: Any) -> None:
        real(source, target)
        self._changed(Path(target), self._file(path))

    def _replace(self, real: Callable[..., Any], path: Path, source: Any, target: Any) -> None:
        real(source, target)
        file = self._file(path)
        self._changed(path, None)
        self._changed(Path(target), file)

    def _unlink(self, real: Callable[..., Any], path: Path, *args: Any) -> None:
        real(*args)
        self._changed(path, None)

    def _mkdir(self, real: Callable[..., Any], path: Path, *args: Any) -> None:
        real(*args)
        self._changed(path, next(self._ids))

    def _other(self, real: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs)
