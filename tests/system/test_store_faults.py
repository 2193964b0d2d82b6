"""The score store on a disk that fails: power cuts at any call, calls that fail in turn, a full or read-only disk."""

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.score_store import ScoreWriter
from tests.disk import CALLS, Call, Disk
from tests.rows import make_rows
from tests.store_model import AgainstADict, settings_of
from tests.store_story import Latest, N, Story, fail_in_turn, read

SHARE_OF_CALLS = 0.25  # at which a power cut that leaves something is tried


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 1)) for seed in range(8)])
def test_a_power_cut_at_any_call_loses_no_reported_row(tmp_path: Path, seed: int) -> None:
    """At each call the disk is looked at as a power cut would leave it: nothing unsynced is left, or some of it."""
    chance = None if seed == 0 else random.Random(seed)
    left: list[tuple[Path, list[Latest], Latest]] = []
    calls = 0

    def cut(call: Call) -> None:
        nonlocal calls
        calls += 1
        if call[0] not in ("read", "listdir", "write") and (chance is None or chance.random() < SHARE_OF_CALLS):
            copy = disk.after_power_cut(tmp_path / f"cut-{calls}", chance) / "scores"
            if len(story.reported) > 1 or (copy / "store.json").exists():
                left.append((copy, list(story.reported), story.coming))

    root = tmp_path / "disk"
    root.mkdir()
    story, disk = Story(root / "scores"), Disk(root, cut)
    with disk.watching():
        story.run()

    assert len(left) > 50
    for uri, reported, coming in left:
        then = Story(uri)
        then.reported, then.coming = reported, coming
        then.check(uri)


@pytest.mark.parametrize("kind", [kind for kind in CALLS if kind != "mkdir"])
def test_each_call_fails_up_to_three_times_and_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    """Every eleventh in turn here; all of them are `test_every_call_fails` in the slow tier."""
    fail_in_turn(tmp_path, kind, range(1, 1000, 11))


def test_a_folder_that_cannot_be_made_at_first(tmp_path: Path) -> None:
    fail_in_turn(tmp_path, "mkdir", range(1, 1000))


@contextlib.contextmanager
def broken(root: Path, code: int) -> Iterator[None]:
    """A disk on which nothing can be written any more."""

    def fail(call: Call) -> None:
        if call[0] in ("open", "write", "link", "mkdir"):
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


class TestAgainstADict(AgainstADict.TestCase):  # type: ignore[misc]
    settings = settings_of(15, 15)
