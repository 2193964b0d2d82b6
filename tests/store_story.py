"""What can happen to a score store, to be told on disks that fail (`tests.disk`)."""

import contextlib
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pytest

from shared import store_check, store_files
from shared.errors import Fenced, StoreCorrupt
from shared.score_store import Retention, ScoreReader, ScoreWriter
from tests.disk import Call, Disk
from tests.rows import make_rows

N = 6
KEPT = 2  # earlier versions
LONG_S = 3600.0  # longer than a story
Latest = dict[int, tuple[int, float]]
Answer = TypeVar("Answer")


def read(uri: Path, version: int | None = None) -> tuple[int, Latest]:
    reader = ScoreReader(uri)
    table = reader.table(version)
    rows = zip(*(table[name].to_pylist() for name in ("sample_id", "model_version", "margin")), strict=True)
    return reader.version, {sample_id: (version, margin) for sample_id, version, margin in rows}


def files(uri: Path) -> set[str]:
    return {path.name for path in uri.rglob("*") if path.is_file()}


class Story:
    """What happens to a store: commits, some again after an error, compactions, and two successors.

    The first writer finds out at once that it is fenced, and notes for others what it found unneeded; the second sleeps
    until its place is free again, wakes in its compaction, and then commits.
    """

    def __init__(self, uri: Path, patience: int = 0) -> None:
        self.uri = uri
        self.reported: list[Latest] = [{}]  # by store version
        self.coming: Latest = {}  # the latest rows after the commit that goes on
        self._failures = 0
        self._patience = patience  # how often what fails is tried again
        self.tell: Callable[[], None] = lambda: None  # called when a commit is reported that had failed before

    @mock.patch.object(store_files, "SUPERSEDED_MANIFESTS_KEPT", 2)
    def run(self) -> None:
        first = self._open(grace_s=LONG_S)
        for model_version in (1, 2, 3, 4):
            self._commit(first, model_version, [0, model_version])
            if model_version % 3:  # before the fourth nothing is unneeded
                self._again(first.compact)
        second = self._open()
        self._is_fenced(first)
        for model_version in (5, 6):
            self._commit(second, model_version, [1, 2])
        third = self._open()
        for model_version in range(7, 10 + store_files.SUPERSEDED_MANIFESTS_KEPT):
            self._commit(third, model_version, [1, 2])
        self._again(third.compact)
        self._commit(third, 20, [3])
        self._is_fenced(second)
        self._again(third.compact)
        self._again(third.close)

    def _open(self, grace_s: float = 0.0) -> ScoreWriter:
        return self._again(lambda: ScoreWriter(self.uri, N, retention=Retention(KEPT), grace_s=grace_s))

    def _commit(self, writer: ScoreWriter, model_version: int, ids: list[int]) -> None:
        self.coming = self.reported[-1] | {i: (model_version, float(model_version)) for i in ids}
        writer.append(make_rows(ids, model_version, margin=float(model_version)))
        failures = self._failures
        version = self._again(writer.commit)
        assert version == len(self.reported)
        self.reported.append(self.coming)
        if self._failures > failures:
            self.tell()

    def _is_fenced(self, writer: ScoreWriter) -> None:
        writer.append(make_rows([5], 99))
        for act in (writer.compact, writer.commit):
            with contextlib.suppress(Fenced):
                self._again(act)
                pytest.fail("the old writer was not fenced")

    def _again(self, act: Callable[[], Answer]) -> Answer:
        for _ in range(self._patience):
            with contextlib.suppress(OSError, StoreCorrupt):  # StoreCorrupt: a part that could not be read
                return act()
            self._failures += 1
        return act()

    def check(self, uri: Path) -> None:
        """Every reported row is there, nothing half; a successor goes on from it and finds what is left over."""
        version, latest = read(uri)
        assert version >= len(self.reported) - 1, "a reported commit is lost"
        history = [*self.reported, self.coming]
        assert latest == history[version]
        for earlier in range(max(version - KEPT, 0), version):
            assert read(uri, earlier) == (version, history[earlier])
        assert store_check.verify(uri) == []
        with ScoreWriter(uri, N, retention=Retention(0), grace_s=0.0) as writer:
            writer.append(make_rows([4], 99, margin=99.0))
            assert writer.commit() == version + 1
            writer.compact()
        assert read(uri) == (version + 1, latest | {4: (99, 99.0)})
        names = files(uri)
        assert len([name for name in names if name.endswith(".arrow")]) == 1
        assert not [name for name in names if name.startswith(".")]


def failing(kind: str, number: int, times: int) -> Callable[[Call], None]:
    """Let calls of a kind fail: the `number`-th, and as many after it as make up `times`."""
    count = 0

    def fail(call: Call) -> None:
        nonlocal count
        if call[0] == kind:
            count += 1
            if number <= count < number + times:
                raise OSError(errno.EIO, os.strerror(errno.EIO), call[1])

    return fail


def fail_in_turn(tmp_path: Path, kind: str, numbers: range) -> None:
    """Tell the story once for each of its calls of a kind, and let that and up to two more after it fail."""
    for number in numbers:
        root = tmp_path / str(number)
        root.mkdir()
        counted: list[Call] = []
        fail = failing(kind, number, times=1 + number % 3)

        def before(call: Call, counted: list[Call] = counted, fail: Callable[[Call], None] = fail) -> None:
            counted.append(call)
            fail(call)

        story, disk = Story(root / "scores", patience=4), Disk(root, before)

        def look(story: Story = story, disk: Disk = disk, number: int = number) -> None:
            left = disk.after_power_cut(tmp_path / f"{number}-{len(story.reported)}")
            assert read(left / "scores")[0] >= len(story.reported) - 1, "reported and not durable"

        story.tell = look
        with disk.watching():
            story.run()
        if sum(call[0] == kind for call in counted) < number:
            assert number > 1
            return
        for chance in (None, random.Random(number)):
            story.check(disk.after_power_cut(tmp_path / f"{number}-{chance is None}", chance) / "scores")
    pytest.fail("the story has more calls")
