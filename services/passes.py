"""How long a full scoring pass is, and so how old a score may become before it counts as stale."""

from collections.abc import Mapping
from typing import Any

from shared.freshness import DEFAULT_BOUND_PASSES, DEFAULT_BOUND_VERSIONS


class Passes:
    """How long a full scoring pass is, in versions, from the blocks as their scores come in.

    A pass ends when every block has been scored since it began; its length counts the versions from its first to its
    newest. The staleness bound is 4 versions or 2 passes, whichever is more. Notes go with each commit, so that all
    readers agree and a restarted controller goes on.
    """

    def __init__(self, num_blocks: int, notes: Mapping[str, Any]) -> None:
        self._num_blocks = num_blocks
        self._length = int(notes.get("pass_versions", 0))
        self._newest_before = self._newest = int(notes.get("newest_scored_version", 0))
        self._count_before = int(notes.get("model_versions_scored", 0))
        self._versions: set[int] = set()
        self._began_at: int | None = None
        self._done: set[int] = set()

    def scored(self, block: int, version: int) -> None:
        if version > self._newest_before:
            self._versions.add(version)
        self._newest = max(self._newest, version)
        self._began_at = version if self._began_at is None else self._began_at
        self._done.add(block)
        if len(self._done) == self._num_blocks:
            self._length = max(self._newest - self._began_at, 0) + 1
            self._done.clear()
            self._began_at = None

    def notes(self) -> dict[str, Any]:
        return {
            "pass_versions": self._length,
            "staleness_bound": max(DEFAULT_BOUND_VERSIONS, DEFAULT_BOUND_PASSES * self._length),
            "newest_scored_version": self._newest,
            "model_versions_scored": self._count_before + len(self._versions),
        }
