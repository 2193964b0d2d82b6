"""A run's runtime.json: where its processes answer, while they do."""

import threading
from typing import Any

from shared.catalogue import Run, process_identity


class RuntimeFile:
    """Says in the run's folder that this process runs it, or serves it; `remove` when it does not any more.

    What a killed driver left is not lost: a service puts it back for `steppe down`.

    Args:
        role: "run" of a driver, "serve" of a service alone.
    """

    def __init__(self, run: Run, role: str) -> None:
        self._run = run
        self._content: dict[str, Any] = {"role": role, **process_identity()}
        self._before = run.runtime() if role == "serve" else None
        if self._before:
            self._content["ray_folder"] = self._before.get("ray_folder")
        self._lock = threading.Lock()  # services that come back are written by their keepers' threads
        self._removed = False

    def update(self, **facts: Any) -> None:
        """Write, with `facts` such as url, pids and ray_folder added or changed."""
        with self._lock:
            self._content |= facts
            if not self._removed:
                self._run.write("runtime.json", self._content)

    def remove(self) -> None:
        with self._lock:
            self._removed = True
            now = self._run.read("runtime.json") or {}
            if any(now.get(key) != self._content[key] for key in ("role", "pid")):
                return  # another process took the run over
            if self._before is not None:
                self._run.write("runtime.json", self._before)
            else:
                self._run.remove("runtime.json")
