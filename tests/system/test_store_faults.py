"""The score store on a disk that fails: power cuts at any call, calls that fail in turn, a full or read-only disk."""

import contextlib
import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.errors import Fenced
from shared.score_store import Retention, ScoreReader, ScoreWriter
from tests.disk import Call, Disk
from tests.rows import make_rows

N = 6
Latest = dict[int, tuple[int, float]]


def read(uri: Path) -> tuple[int, Latest]:
    reader = ScoreReader(uri)
    table = reader.table()
    rows = zip(*(table[name].to_pylist() for name in ("sample_id", "model_version", "margin")), strict=True)
    return reader.version, {sample_id: (version, margin) for sample_id, version, margin in rows}


class Story:
    """What happens to a store: commits, some again after an error, a compaction, a successor, another compaction."""

    def __init__(self, uri: Path) -> None:
        self.uri = uri
        self.reported: list[Latest] = [{}]  # by store version
        self.coming: Latest = {}  # the latest rows after the commit that goes on

    def run(self, patience: int = 0) -> None:
        """Tell it all; what fails is tried again up to `patience` times."""
        self._patience = patience
        writer = self._again(lambda: ScoreWriter(self.uri, N, retention=Retention(2), grace_s=0.0))
        for model_version in (1, 2, 3):
            self._commit(writer, model_version, [0, model_version])
        self._again(writer.compact)
        self._commit(writer, 4, [0, 4])
        old, writer = writer, self._again(lambda: ScoreWriter(self.uri, N, retention=Retention(2), grace_s=0.0))
        old.append(make_rows([5], 9))
        with contextlib.suppress(Fenced):
            self._again(old.commit)
            pytest.fail("the old writer was not fenced")
        for model_version in (5, 6):
            self._commit(writer, model_version, [1, 2])
        self._again(writer.compact)
        self._again(writer.compact)
        self._commit(writer, 7, [3])

    def _commit(self, writer: ScoreWriter, model_version: int, ids: list[int]) -> None:
        self.coming = self.reported[-1] | {i: (model_version, float(model_version)) for i in ids}
        writer.append(make_rows(ids, model_version, margin=float(model_version)))
        version = self._again(writer.commit)
        assert version == len(self.reported)
        self.reported.append(self.coming)

    def _again(self, act: Callable[[], object]) -> object:
        for _ in range(self._patience):
            with contextlib.suppress(OSError):
                return act()
        return act()

    def check(self, uri: Path) -> None:
        """Every reported row is there, nothing half; and a successor goes on from it."""
        version, latest = read(uri)
        assert version >= len(self.reported) - 1, "a reported commit is lost"
        assert latest == ([*self.reported, self.coming])[version]
        with ScoreWriter(uri, N) as writer:
            writer.append(make_rows([4], 99, margin=99.0))
            assert writer.commit() == version + 1
        assert read(uri) == (version + 1, latest | {4: (99, 99.0)})


def made(uri: Path) -> bool:
    return (uri / "store.json").exists()


@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_at_any_call_loses_no_reported_row(tmp_path: Path, seed: int) -> None:
    """At each call the disk is looked at as a power cut would leave it: nothing unsynced is left, or some of it."""
    chance = None if seed == 0 else random.Random(seed)
    cuts = []

    def cut(call: Call) -> None:
        if story.uri.exists():
            cuts.append(call)
            left = disk.after_power_cut(tmp_path / f"cut-{len(cuts)}", chance)
            if len(story.reported) > 1 or made(left / "scores"):
                whole = [list(story.reported), dict(story.coming)]
                checks.append((left / "scores", whole))

    checks: list[tuple[Path, list]] = []
    root = tmp_path / "disk"
    root.mkdir()
    story, disk = Story(root / "scores"), Disk(root, cut)
    with disk.watching():
        story.run()

    assert len(checks) > 100
    for uri, (reported, coming) in checks:
        then = Story(uri)
        then.reported, then.coming = reported, coming
        then.check(uri)


def failing(kind: str, number: int, code: int, once: bool) -> Callable[[Call], None]:
    """Let the `number`-th call of a kind fail; or that and all after it."""
    count = 0

    def fail(call: Call) -> None:
        nonlocal count
        if call[0] == kind:
            count += 1
            if count == number or (count > number and not once):
                raise OSError(code, os.strerror(code), call[1])

    return fail


@pytest.mark.parametrize("kind", ["open", "write", "fsync", "link", "unlink", "listdir", "mkdir"])
def test_each_call_fails_once_and_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    for number in range(1, 200):
        root = tmp_path / str(number)
        root.mkdir()
        counted: list[Call] = []
        fail = failing(kind, number, errno.EIO, once=True)

        def before(call: Call, counted: list[Call] = counted, fail: Callable[[Call], None] = fail) -> None:
            counted.append(call)
            fail(call)

        story, disk = Story(root / "scores"), Disk(root, before)
        with disk.watching():
            story.run(patience=3)
        for chance in (None, random.Random(number)):
            story.check(disk.after_power_cut(tmp_path / f"{number}-{chance is None}", chance) / "scores")
        if sum(call[0] == kind for call in counted) < number:
            return
    pytest.fail("the story has too many calls")


@contextlib.contextmanager
def broken(root: Path, code: int) -> Iterator[None]:
    """A disk on which nothing can be written any more."""

    def fail(call: Call) -> None:
        if call[0] in ("open", "write", "link", "mkdir", "replace"):
            raise OSError(code, os.strerror(code), call[1])

    with Disk(root, fail).watching():
        yield


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_disk_that_takes_nothing_more_keeps_what_it_has(tmp_path: Path, code: int) -> None:
    uri = tmp_path / "scores"
    writer = ScoreWriter(uri, N)
    writer.append(make_rows([0], 1, margin=1.0))
    writer.commit()
    writer.append(make_rows([1], 2, margin=2.0))
    with broken(tmp_path, code):
        for act in (writer.commit, writer.compact, lambda: ScoreWriter(uri, N)):
            with pytest.raises(OSError, match=os.strerror(code)):
                act()
        assert read(uri) == (1, {0: (1, 1.0)})

    assert writer.commit() == 2
    assert read(uri) == (2, {0: (1, 1.0), 1: (2, 2.0)})
