"""Damaged files, failing disks, and what is removed when."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest

from shared import score_store, storage, store_check, store_files
from shared.errors import ConfigError, Fenced, NoSuchVersion, StoreCorrupt, StoreError
from shared.score_store import Retention, ScoreReader, ScoreWriter
from shared.storage import Folder
from shared.store_files import StoreFiles
from tests.disk import Call, Disk
from tests.raising import refuses
from tests.rows import make_rows
from tests.stores import N, an_hour_passes, commit, latest, named, names, read
from tests.waiting import LIMIT_S, wait_for

STRAY = f"{7:024x}.arrow"  # nobody's

# Damage


def keep_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"version":2', b'"version":3'))


def zero_footer(path: Path) -> None:
    """Same length: an Arrow file ends in its footer, the footer's length (4 bytes) and a magic word (6)."""
    data = path.read_bytes()
    length = int.from_bytes(data[-10:-6], "little")
    path.write_bytes(data[: -10 - length] + bytes(length) + data[-10:])


def fill_body(path: Path) -> None:
    """All between the magic words and the footer."""
    data = path.read_bytes()
    end = len(data) - 10 - int.from_bytes(data[-10:-6], "little")
    path.write_bytes(data[:8] + b"\xff" * (end - 8) + data[end:])


@pytest.mark.parametrize(
    ("folder", "damage"),
    [
        ("manifests", keep_half),
        ("manifests", other_version),
        ("manifests", lambda path: path.write_bytes(b"")),
        ("manifests", lambda path: path.write_bytes(b"[]")),
        ("manifests", lambda path: path.write_bytes(b"\xff\xfe")),
        ("fragments", keep_half),
        ("fragments", zero_footer),
        ("fragments", fill_body),
        ("fragments", lambda path: path.write_bytes(bytes(path.stat().st_size))),
        ("fragments", lambda path: path.unlink()),
    ],
    ids=[
        *("torn manifest", "altered manifest", "empty manifest", "list as manifest", "binary manifest"),
        *("truncated fragment", "zeroed footer", "filled body", "zeroed fragment", "missing fragment"),
    ],
)
def test_reader_names_the_damaged_file_and_goes_on_with_what_it_has(
    tmp_path: Path, folder: str, damage: Callable[[Path], object]
) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0], 1)
    reader = ScoreReader(tmp_path)
    commit(writer, [0, 1], 2)
    path = named(tmp_path, folder)[-1]
    whole = path.read_bytes()
    damage(path)

    for call in (reader.refresh, reader.refresh, lambda: ScoreReader(tmp_path), lambda: ScoreWriter(tmp_path, N)):
        with refuses(StoreCorrupt, str(path)):
            call()
    assert reader.version == 1
    assert latest(reader.table()) == {0: (1, -1.0)}
    assert reader.lookup([0, 1])["model_version"].to_pylist() == [1, None]
    path.write_bytes(whole)
    assert reader.refresh() == 2
    assert latest(reader.table()) == {0: (2, -1.0), 1: (2, -1.0)}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": 2}', b'{"format": 2, "num_samples": 10}'])
def test_damaged_description(tmp_path: Path, content: bytes) -> None:
    ScoreWriter(tmp_path, N)
    (tmp_path / "store.json").write_bytes(content)

    for opening in (lambda: ScoreReader(tmp_path), lambda: ScoreWriter(tmp_path, N)):
        with refuses(StoreCorrupt, str(tmp_path / "store.json")):
            opening()


@pytest.mark.parametrize("folder", ["fragments", "snapshots"])
def test_a_flipped_byte_anywhere_is_an_error_that_names_the_file_or_is_found_by_verify(
    tmp_path: Path, folder: str
) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0, 4], 1)
    if folder == "snapshots":
        writer.compact()
    writer.close()
    (path,) = named(tmp_path, folder)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            reader = ScoreReader(tmp_path)
            if folder == "fragments":  # a snapshot's ids are not looked through when it is opened
                reader.dense("margin")
        except StoreCorrupt as error:
            assert error.key == str(path)  # noqa: PT017  any other error is a failure, none is right too
        assert [problem.file for problem in store_check.verify(tmp_path)] == [str(path)]


def test_a_fold_does_not_pass_a_flipped_bit_on_under_a_new_checksum(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0], 1, margin=1.0)
    (path,) = named(tmp_path, "fragments")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(np.float32(1.0).tobytes(), np.float32(-1.0).tobytes()))

    with refuses(StoreCorrupt, str(path), "checksum"):
        writer.compact()
    assert commit(writer, [1], 1) == 2  # it goes on
    path.write_bytes(whole)
    writer.compact()
    assert read(tmp_path) == {0: (1, 1.0), 1: (1, -1.0)}
    assert store_check.verify(tmp_path) == []


@pytest.mark.parametrize("missing", ["manifests", "store.json"])
def test_a_half_copied_store_is_not_taken_for_a_new_one(tmp_path: Path, missing: str) -> None:
    with ScoreWriter(tmp_path, N) as writer:
        commit(writer, [0])
    if missing == "manifests":
        shutil.rmtree(tmp_path / missing)
    else:
        (tmp_path / missing).unlink()
    there = sorted(tmp_path.rglob("*"))

    for opening in (lambda: ScoreReader(tmp_path), lambda: ScoreWriter(tmp_path, N)):
        with refuses(StoreCorrupt, str(tmp_path / missing)):
            opening()
    assert [path for path in sorted(tmp_path.rglob("*.*")) if path not in there] == []


def test_a_store_that_is_removed_under_its_reader(tmp_path: Path) -> None:
    uri = tmp_path / "scores"
    with ScoreWriter(uri, N) as writer:
        commit(writer, [0])
    reader = ScoreReader(uri)
    shutil.rmtree(uri)

    with refuses(StoreCorrupt, str(uri / "manifests")):
        reader.refresh()
    assert latest(reader.table()) == {0: (1, -1.0)}


def test_an_earlier_version_of_which_a_file_is_missing(tmp_path: Path) -> None:
    """That it is named, so kept, and yet missing tells damage from what was collected."""
    writer = ScoreWriter(tmp_path, N)
    for version in (1, 2, 3):
        commit(writer, [0], version)
        writer.compact()
    reader = ScoreReader(tmp_path)
    first = named(tmp_path, "fragments")[0]
    first.rename(tmp_path / "aside")

    for call in (lambda: reader.table(1), lambda: reader.history(0)):
        with refuses(StoreCorrupt, str(first)):
            call()
    (tmp_path / "aside").rename(first)
    assert reader.history(0)["model_version"].to_pylist() == [1, 2, 3]
    manifest = next(path for path in (tmp_path / "manifests").iterdir() if first.name in path.read_text())
    manifest.unlink()
    writer.compact()  # knows what it named
    for call in (lambda: reader.table(1), lambda: reader.history(0), ScoreWriter(tmp_path, N).compact):
        with refuses(StoreCorrupt, str(manifest)):
            call()


def test_history_of_a_reader_whose_files_were_collected(tmp_path: Path) -> None:
    """What its own version holds is in its memory."""
    writer = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0)
    for version in (1, 2):
        commit(writer, [0, version], version)
    reader = ScoreReader(tmp_path)
    writer.compact()
    commit(writer, [0], 3)
    writer.compact()
    assert len(names(tmp_path, "fragments")) <= 1

    assert reader.history(0)["model_version"].to_pylist() == [1, 2]
    assert latest(reader.table(1)).keys() == {0, 1}
    assert ScoreReader(tmp_path).history(0)["model_version"].to_pylist() == [3]


def test_a_version_that_was_let_go_after_the_reader_opened_is_no_damage(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path, N) as writer:
        for version in (1, 2, 3):
            commit(writer, [0], version)
            writer.compact()
    reader = ScoreReader(tmp_path)
    with ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0) as writer:
        writer.compact()

    with refuses(NoSuchVersion, "version", 1):
        reader.table(1)
    assert reader.history(0)["model_version"].to_pylist() == [3]


def test_files_of_other_names_are_no_manifests(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path, N) as writer:
        commit(writer, [0])
    for name in ("999.json", "9999999999999.json", "copy of 000000000009.json", "00000000009\u0663.json"):
        (tmp_path / "manifests" / name).write_bytes(b"{}")

    assert read(tmp_path).keys() == {0}
    with ScoreWriter(tmp_path, N) as writer:
        assert commit(writer, [1]) == 2


# Failing disks


@contextlib.contextmanager
def no_space(
    monkeypatch: pytest.MonkeyPatch, function: str, where: str = ".*", *, after: bool = False
) -> Iterator[None]:
    """Calls of os.`function` for a path that ends in `where` raise ENOSPC, before or after having done their work."""
    real = getattr(os, function)

    def fail(file: Any, *args: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
        failing = re.fullmatch(f".*/{where}", path)
        result = None if failing and not after else real(file, *args)
        if failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        yield


FAILURES = [
    pytest.param("fsync", r"(fragments|snapshots)/\w+\.arrow", False, id="sync of the part"),
    pytest.param("fsync", r"manifests/\..*", False, id="sync of the manifest"),
    pytest.param("fsync", "manifests", False, id="sync after the link"),
    pytest.param("link", ".*", False, id="before the link"),
    pytest.param("link", ".*", True, id="after the link"),
]
NO_NAME = pytest.param("fsync", "(fragments|snapshots)", False, id="sync of the part's name")


@pytest.mark.parametrize(("function", "where", "after"), FAILURES)
def test_failed_commit_is_brought_by_the_next_one_exactly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, where: str, after: bool
) -> None:
    writer, reader = ScoreWriter(tmp_path, N), ScoreReader(tmp_path)
    commit(writer, [0, 1], 1)
    writer.append(make_rows([1, 2], 2))
    for _ in range(2):
        with no_space(monkeypatch, function, where, after=after), contextlib.suppress(OSError):
            writer.commit()
        reader.refresh()
        assert latest(reader.table()).keys() in ({0, 1}, {0, 1, 2})  # whole: the old version or the new one
    writer.append(make_rows([3], 2))
    took_effect = after or where == "manifests"

    assert writer.commit() == (3 if took_effect else 2)
    assert writer.commit() == writer.version == reader.refresh()
    assert {i: version for i, (version, _) in latest(reader.table()).items()} == {0: 1, 1: 2, 2: 2, 3: 2}
    assert (reader.rows, writer.rows) == (5, 5)


def test_failed_commit_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([0]))

    for model_version, failure in enumerate([NO_NAME, *FAILURES], start=2):  # the first has no name prepared
        function, where, after = failure.values
        writer.append(make_rows([0], model_version=model_version))
        with no_space(monkeypatch, function, where, after=after), pytest.raises(OSError, match="No space"):
            writer.commit()


def test_late_rows_of_a_commit_that_took_effect_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not the latest rows of their samples, and yet they are in the store."""
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0], 5)
    writer.append(make_rows([0], 3))
    writer.append(make_rows([1], 3, margin=1.0))
    writer.append(make_rows([1], 3, margin=2.0))
    with no_space(monkeypatch, "link", after=True), pytest.raises(OSError, match="No space"):
        writer.commit()

    assert writer.commit() == 2
    assert writer.rows == 4
    assert read(tmp_path) == {0: (5, -1.0), 1: (3, 2.0)}


@pytest.mark.parametrize(("function", "where", "after"), [*FAILURES, NO_NAME])
def test_failed_compaction_changes_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, where: str, after: bool
) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0, 1], 1)
    with no_space(monkeypatch, function, where, after=after), pytest.raises(OSError, match="No space"):
        writer.compact()

    assert read(tmp_path) == {0: (1, -1.0), 1: (1, -1.0)}
    writer.compact()
    assert commit(writer, [1], 2) == 2
    assert read(tmp_path) == {0: (1, -1.0), 1: (2, -1.0)}


def test_successor_of_a_writer_with_a_half_failed_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ScoreWriter(tmp_path, N)
    first.append(make_rows([0]))
    with no_space(monkeypatch, "link", after=True), pytest.raises(OSError, match="No space"):
        first.commit()
    second = ScoreWriter(tmp_path, N)
    first.append(make_rows([1]))

    with pytest.raises(Fenced):
        first.commit()
    assert commit(second, [2]) == 2
    assert read(tmp_path).keys() == {0, 2}


def test_what_fails_while_a_commit_is_settled_is_settled_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that took effect is reported only when it would survive a power cut."""
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([0]))
    with no_space(monkeypatch, "link", after=True), pytest.raises(OSError, match="No space"):
        writer.commit()
    for function in ("listdir", "fsync"):
        with no_space(monkeypatch, function), pytest.raises(OSError, match="No space"):
            writer.commit()

    assert (writer.commit(), writer.rows) == (1, 1)
    assert commit(writer, [0]) == 1


def test_a_description_that_could_not_be_made_durable_is_by_the_next_writer(tmp_path: Path) -> None:
    linked = []

    def fail_after_the_link(call: Call) -> None:
        if call[0] == "link":
            linked.append(call)
        if call == ("fsync", "scores") and len(linked) == 1:
            linked.append(call)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root, fail_after_the_link)
    with disk.watching():
        with pytest.raises(OSError, match="Input/output"):
            ScoreWriter(root / "scores", N)
        commit(ScoreWriter(root / "scores", N), [0])

        assert read(disk.after_power_cut(tmp_path / "left") / "scores").keys() == {0}


def test_a_failed_commit_leaves_no_fragment_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([0]))
    for _ in range(3):
        with no_space(monkeypatch, "link"), pytest.raises(OSError, match="No space"):
            writer.commit()
    writer.commit()

    assert len(names(tmp_path, "fragments")) == 1


@pytest.mark.parametrize("fails", [False, True], ids=["it is there", "it may be there"])
def test_writer_that_slept_through_ten_commits_wakes_with_its_manifest_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """And yet a successor's is the newest."""
    first = ScoreWriter(tmp_path, N)
    first.append(make_rows([0], 9))
    link = os.link

    def link_late(*paths: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        second = ScoreWriter(tmp_path, N)
        for version in range(1, store_files.SUPERSEDED_MANIFESTS_KEPT + 4):
            commit(second, [1], version)
        wait_for(lambda: "000000000002.json" not in names(tmp_path, "manifests"), what="the place to be free")
        link(*paths)
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", link_late)
    if fails:
        with pytest.raises(OSError, match="Input/output"):
            first.commit()
    with pytest.raises(Fenced):
        first.commit()
    assert read(tmp_path).keys() == {1}
    assert store_check.verify(tmp_path) == []


@pytest.mark.parametrize("compacted", [False, True], ids=["fragments to fold", "nothing to fold"])
def test_a_fenced_writer_that_does_not_know_it_removes_nothing(tmp_path: Path, compacted: bool) -> None:
    first = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0)
    commit(first, [0], 1)
    if compacted:
        first.compact()
    second = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0)
    commit(second, [1], 2)

    with pytest.raises(Fenced):
        first.compact()
    assert store_check.verify(tmp_path) == []
    assert read(tmp_path).keys() == {0, 1}


def test_a_writer_that_is_fenced_between_its_snapshot_and_its_collection_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0)
    commit(first, [0], 1)
    collect = StoreFiles.collect

    def sleep_first(*args: Any, **kwargs: Any) -> bool:
        monkeypatch.setattr(StoreFiles, "collect", collect)
        commit(ScoreWriter(tmp_path, N), [1], 2)
        return collect(*args, **kwargs)

    monkeypatch.setattr(StoreFiles, "collect", sleep_first)
    with pytest.raises(Fenced):
        first.compact()
    assert store_check.verify(tmp_path) == []
    assert read(tmp_path).keys() == {0, 1}


def test_what_a_successor_commits_while_the_old_writer_lists_files_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0)
    commit(first, [0], 1)
    first.compact()
    listed = Folder.names

    def take_over_first(folder: Folder) -> list[str]:
        if folder.path.name == "fragments":
            monkeypatch.setattr(Folder, "names", listed)
            commit(ScoreWriter(tmp_path, N), [1], 2)
        return listed(folder)

    monkeypatch.setattr(Folder, "names", take_over_first)
    with pytest.raises(Fenced):
        first.compact()
    assert store_check.verify(tmp_path) == []
    assert read(tmp_path).keys() == {0, 1}


def test_a_successor_that_cannot_read_the_store_leaves_its_writer_alone(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0])
    keep_half(named(tmp_path, "fragments")[0])
    generations = names(tmp_path, "manifests")
    with pytest.raises(StoreCorrupt):
        ScoreWriter(tmp_path, N)

    assert names(tmp_path, "manifests") == generations
    assert commit(writer, [1]) == 2


def test_close_of_a_fenced_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    old = ScoreWriter(tmp_path, N)
    commit(old, [0])
    with ScoreWriter(tmp_path, N):
        old.append(make_rows([1]))
        with pytest.raises(Fenced):
            old.close()
        old.close()
    assert len(os.listdir(tmp_path / "fragments")) == 1


def test_close_that_fails_leaves_the_writer_open(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([0]))
    for error in (OSError("no"), MemoryError()):
        with mock.patch.object(StoreFiles, "write_manifest", side_effect=error), pytest.raises(type(error)):
            writer.close()
    writer.append(make_rows([1]))
    writer.close()

    assert read(tmp_path).keys() == {0, 1}


def test_writer_of_another_process_is_refused(tmp_path: Path) -> None:
    """After a fork its threads are not there, also those that hold its locks, and both would be the one writer."""
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([0]))
    with writer._turn(), writer._pending_lock, writer._compaction_lock:
        child = os.fork()
        if child == 0:
            for act in (writer.commit, writer.compact, writer.close, lambda: writer.append(make_rows([1]))):
                with contextlib.suppress(StoreError):
                    act()
                    os._exit(1)
            os._exit(7)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert writer.commit() == 1


LATE_WRITER = """
import atexit, sys, threading
from shared.score_store import ScoreWriter
from tests.rows import make_rows

writer = ScoreWriter(sys.argv[1], 10)
writer.append(make_rows([3]))
atexit.register(writer.close)
atexit.register(writer.compact)
atexit.register(writer.commit)
"""


def test_a_commit_and_a_compaction_while_python_ends(tmp_path: Path) -> None:
    """When no thread can be started any more."""
    done = subprocess.run(
        [sys.executable, "-c", LATE_WRITER, tmp_path], check=True, timeout=LIMIT_S, capture_output=True, text=True
    )

    assert done.stderr == ""
    assert read(tmp_path).keys() == {3}
    assert names(tmp_path, "snapshots")


def test_commits_go_on_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a compaction then; each is written once."""
    monkeypatch.setattr(score_store, "COMPACT_AFTER_ROWS", 1)
    monkeypatch.setattr(score_store, "COMPACT_AFTER_SCORINGS", 0)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    filled, fill = [], Folder.fill
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(Folder, "fill", lambda folder, name, data: (filled.append(name), fill(folder, name, data)))
    writer = ScoreWriter(tmp_path, N)
    with no_space(monkeypatch, "fsync", "fragments"), pytest.raises(OSError, match="No space"):
        commit(writer, [0])
    assert [commit(writer, [0], version) for version in (1, 2, 3)] == [1, 2, 3]
    monkeypatch.undo()
    writer.close()

    assert len(filled) == len(set(filled))
    assert read(tmp_path) == {0: (3, -1.0)}


def test_a_commit_whose_preparations_fail_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N)
    monkeypatch.setattr(Folder, "prepare", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space")))

    assert [commit(writer, [0], version) for version in (1, 1, 2)] == [1, 1, 2]


# Impossible stores


def test_a_newest_manifest_that_leads_nowhere(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path, N) as writer:
        commit(writer, [0])
    newest = named(tmp_path, "manifests")[-1]
    newest.unlink()
    newest.symlink_to("nowhere")

    for opening in (lambda: ScoreReader(tmp_path), lambda: ScoreWriter(tmp_path, N)):
        with refuses(StoreCorrupt, str(newest)):
            opening()


def test_a_manifest_under_the_name_of_another(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path, N) as writer:
        commit(writer, [0])
    newest = named(tmp_path, "manifests")[-1]
    shutil.copy(newest, newest.with_name("000000000009.json"))

    for opening in (lambda: ScoreReader(tmp_path), lambda: ScoreWriter(tmp_path, N)):
        with refuses(StoreCorrupt, str(newest.with_name("000000000009.json")), "generation 2"):
            opening()


def test_an_older_copy_put_in_place_under_reader_and_writer(tmp_path: Path) -> None:
    store, older = tmp_path / "store", tmp_path / "older"
    writer = ScoreWriter(store, N)
    commit(writer, [0])
    shutil.copytree(store, older)
    commit(writer, [1])
    reader = ScoreReader(store)
    shutil.rmtree(store)
    older.rename(store)

    writer.append(make_rows([2]))
    for act in (reader.refresh, writer.commit):
        with refuses(StoreCorrupt, str(store / "manifests"), 3):
            act()
    assert read(store).keys() == {0}


def test_fragments_alone_are_no_new_store(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "whole", N) as writer:
        commit(writer, [0])
    shutil.copytree(tmp_path / "whole" / "fragments", tmp_path / "half" / "fragments")

    for opening in (lambda: ScoreReader(tmp_path / "half"), lambda: ScoreWriter(tmp_path / "half", 99)):
        with refuses(StoreCorrupt, str(tmp_path / "half" / "store.json")):
            opening()
    assert os.listdir(tmp_path / "half") == ["fragments"]


def test_an_altered_number_of_samples(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path, N) as writer:
        commit(writer, [0])
    description = tmp_path / "store.json"
    description.write_bytes(description.read_bytes().replace(b'"num_samples":10', b'"num_samples":90'))

    for opening in (lambda: ScoreReader(tmp_path), lambda: ScoreWriter(tmp_path, 90)):
        with refuses(StoreCorrupt, str(description), "checksum"):
            opening()


def test_what_the_system_refuses_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScoreWriter(tmp_path, N) as writer:
        commit(writer, [0])

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(pa, "memory_map", refuse)
    monkeypatch.setattr(pa, "OSFile", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        ScoreReader(tmp_path)


# Collection


def test_what_no_kept_version_needs_is_removed_when_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(1))
    for version in (1, 2, 3):
        commit(writer, [0, version], version)
    writer.compact()
    followed = ScoreReader(tmp_path)
    for version in (4, 5, 6):
        commit(writer, [0, version], version)
    fragments = names(tmp_path, "fragments")
    stray = tmp_path / "fragments" / STRAY
    stray.write_bytes(b"never committed")
    writer.compact()
    assert names(tmp_path, "fragments") == fragments | {stray.name}  # a reader may still be opening them

    commit(writer, [7], 7)
    an_hour_passes(monkeypatch)
    before = ScoreReader(tmp_path)
    writer.compact()

    assert not stray.exists()
    assert names(tmp_path, "fragments") & fragments < fragments
    for reader, version in ((followed, 3), (before, 7)):  # of the files that they opened some are gone
        assert reader.version == version
        assert latest(reader.table()).keys() == set(range(version + 1))
        assert reader.lookup([0])["model_version"].to_pylist() == [min(version, 6)]
        assert reader.refresh() == 7
    reader = ScoreReader(tmp_path)
    assert latest(reader.table(6)).keys() == set(range(7))
    for gone in (1, 2):
        with refuses(NoSuchVersion, "version", gone):
            reader.table(gone)


def test_time_travel_reaches_as_far_as_retention_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(4))
    for version in range(1, 13):
        commit(writer, [0], version)
        an_hour_passes(monkeypatch)
        if version % 2 == 0:
            writer.compact()
    reader = ScoreReader(tmp_path)

    assert [latest(reader.table(v))[0][0] for v in range(8, 13)] == [8, 9, 10, 11, 12]
    with refuses(NoSuchVersion, "version", 2):
        reader.table(2)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(keep_last=0), {12}),
        (Retention(keep_last=3), {9, 10, 11, 12}),
        (Retention(keep_last=0, keep_every=5), {5, 10, 12}),
        (Retention(keep_all=True), set(range(13))),
    ],
    ids=["newest", "last three", "every fifth", "all"],
)
def test_retention_keeps_what_it_says(tmp_path: Path, retention: Retention, kept: set[int]) -> None:
    """Compacted after every second commit; neighbours in the same snapshot's reach may stay too."""
    writer = ScoreWriter(tmp_path, N, retention=retention, grace_s=0.0)
    for version in range(1, 13):
        commit(writer, [0], version)
        if version % 2 == 0:
            writer.compact()
    reader = ScoreReader(tmp_path)

    readable = set()
    for version in range(13):
        with contextlib.suppress(NoSuchVersion):
            assert latest(reader.table(version)) == ({0: (version, -1.0)} if version else {})
            readable.add(version)
    assert kept <= readable
    assert len(readable) <= 2 * len(kept) + 1
    history = reader.history(0)["model_version"].to_pylist()
    assert history == sorted(set(history))
    assert set(history) >= kept - {0}


def test_retention_that_cannot_be_is_refused() -> None:
    for key in ("keep_last", "keep_every"):
        with refuses(ConfigError, key, -1):
            Retention(**{key: -1})


def test_files_that_nothing_names_stay_for_the_grace_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=600)
    commit(writer, [0])
    writer.compact()
    assert len(names(tmp_path, "fragments")) == 1
    an_hour_passes(monkeypatch)
    writer.compact()

    assert names(tmp_path, "fragments") == set()


def test_manifests_do_not_pile_up(tmp_path: Path) -> None:
    """Not those of commits, and not those of notes alone."""
    writer = ScoreWriter(tmp_path, N)
    for note in range(30):
        writer.commit({"note": note})
        commit(writer, [note % N], note + 1)
    writer.close()

    assert len(names(tmp_path, "manifests")) == store_files.SUPERSEDED_MANIFESTS_KEPT + 1
    assert ScoreReader(tmp_path).metadata == {"note": 29}


@pytest.mark.parametrize("name", [".draft-0123456789abcdef", "manifests/.draft-0123456789abcdef", f"fragments/{STRAY}"])
def test_temporary_files_of_dead_writers_are_removed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0])
    left = tmp_path / name
    left.write_bytes(b"half")
    writer.compact()
    assert left.exists()  # it may be a successor's
    an_hour_passes(monkeypatch)
    writer.compact()

    assert not left.exists()


def test_lives_shorter_than_the_grace_period_do_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one writer found unneeded, the next ones remove in time."""
    for version in range(1, 6):
        writer = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=1800.0)
        commit(writer, [0], version)
        writer.compact()
        if version == 3:
            unneeded = names(tmp_path, "snapshots") | names(tmp_path, "fragments")
            unneeded -= {path.name for path in named(tmp_path, "snapshots")}
            an_hour_passes(monkeypatch)

    assert len(unneeded) == 5
    assert not unneeded & (names(tmp_path, "snapshots") | names(tmp_path, "fragments"))
    assert read(tmp_path) == {0: (5, -1.0)}


def test_lives_that_end_in_their_fold_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(ScoreWriter(tmp_path, N), [0])
    for _ in range(5):
        writer = ScoreWriter(tmp_path, N, grace_s=1800.0)
        with mock.patch.object(writer, "_replace_by", side_effect=MemoryError), pytest.raises(MemoryError):
            writer.compact()
        an_hour_passes(monkeypatch)

    assert len(names(tmp_path, "snapshots")) == 2  # this life's, and the one before it that it found


def test_a_full_disk_gets_room_before_the_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then also the note of what is unneeded cannot be written."""
    writer = ScoreWriter(tmp_path, N, retention=Retention(0))
    for version in (1, 2):
        commit(writer, [0], version)
        writer.compact()
    commit(writer, [0], 3)
    an_hour_passes(monkeypatch)
    full = mock.patch.object(storage, "_write_out", side_effect=OSError(errno.ENOSPC, "No space"))
    with full, pytest.raises(OSError, match="No space"):
        writer.compact()

    assert names(tmp_path, "snapshots") == {path.name for path in named(tmp_path, "snapshots")}
    assert names(tmp_path, "fragments") == {path.name for path in named(tmp_path, "fragments")}


def test_a_full_disk_gets_room_before_the_versions_that_are_kept_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the next manifest, which keeps fewer, cannot be written."""
    writer = ScoreWriter(tmp_path, N, retention=Retention(1))
    for version in (1, 2, 3):
        commit(writer, [0], version)
        writer.compact()
    commit(writer, [0], 4)
    before = names(tmp_path, "snapshots")
    an_hour_passes(monkeypatch)
    full = mock.patch.object(storage, "_write_out", side_effect=OSError(errno.ENOSPC, "No space"))
    with full, pytest.raises(OSError, match="No space"):
        writer.compact()

    assert len(names(tmp_path, "snapshots")) < len(before)
    assert read(tmp_path) == {0: (4, -1.0)}


def test_a_full_disk_gets_room_by_commits_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compaction is due there, and none could be made."""
    writer = ScoreWriter(tmp_path, N, retention=Retention(0))
    for version in (1, 2):
        commit(writer, [0], version)
        writer.compact()
    assert names(tmp_path, "snapshots") > {path.name for path in named(tmp_path, "snapshots")}
    an_hour_passes(monkeypatch)
    writer.append(make_rows([0], 3))
    with mock.patch.object(storage, "_write_out", side_effect=OSError(errno.ENOSPC, "No space")):
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                writer.commit()

    assert names(tmp_path, "snapshots") == {path.name for path in named(tmp_path, "snapshots")}
    assert writer.commit() == 3
    assert read(tmp_path) == {0: (3, -1.0)}


def test_a_damaged_manifest_of_an_earlier_version_goes_with_that_version(tmp_path: Path) -> None:
    """Neither compaction nor commits, on a disk that was full for a moment, are kept from going on."""
    writer = ScoreWriter(tmp_path, N, retention=Retention(3))
    for version in (1, 2):
        commit(writer, [0], version)
        writer.compact()
    (anchor,) = {one.generation for one in writer._manifest.earlier if one.last == 1}
    writer.close()
    (tmp_path / "manifests" / f"{anchor:012d}.json").write_text("torn")

    writer = ScoreWriter(tmp_path, N, retention=Retention(3))
    writer.append(make_rows([0], 3))
    full = mock.patch.object(storage, "_write_out", side_effect=OSError(errno.ENOSPC, "No space"))
    with full, pytest.raises(OSError, match="No space"):
        writer.commit()
    for version in range(4, 9):
        commit(writer, [0], version)
    writer.compact()
    assert writer.snapshot_version == writer.version
    assert store_check.verify(tmp_path) == []


def test_a_compaction_that_fails_is_not_tried_again_by_every_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try may read all of the store."""
    monkeypatch.setattr(score_store, "COMPACT_AFTER_FRAGMENTS", 4)
    tried: list[int] = []

    def fail(writer: ScoreWriter, _: Any) -> None:
        tried.append(writer.version)
        raise StoreCorrupt("a bit flipped")

    writer = ScoreWriter(tmp_path, N)
    with mock.patch.object(ScoreWriter, "_fold", fail):
        for version in range(1, 13):
            commit(writer, [0], version)
            if (compactor := writer._compactor) is not None:
                compactor.join()
    assert tried == [4, 8, 12]
    for version in range(13, 17):
        commit(writer, [0], version)
    writer.close()
    assert writer.snapshot_version == 16


def test_a_store_that_comes_into_being_while_it_is_opened_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Folder.read

    def late(folder: Folder, name: str) -> bytes:
        monkeypatch.setattr(Folder, "read", look)
        with ScoreWriter(tmp_path, N) as writer:
            commit(writer, [0])
        raise FileNotFoundError(name)

    monkeypatch.setattr(Folder, "read", late)

    assert ScoreReader(tmp_path).version == 1


def test_a_listing_that_missed_the_newest_generations_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing of very many names is no one instant's: between its parts a writer may remove and make some."""
    writer = ScoreWriter(tmp_path, N)
    for version in range(1, 4):
        commit(writer, [0], version)
    reader, look = ScoreReader(tmp_path), StoreFiles.generations
    commit(writer, [0], 4)

    def partly(store: StoreFiles) -> list[int]:
        monkeypatch.setattr(StoreFiles, "generations", look)
        return look(store)[:1]

    monkeypatch.setattr(StoreFiles, "generations", partly)

    assert reader.refresh() == 4


def test_what_others_put_into_the_store_stays_and_is_in_nobodys_way(tmp_path: Path) -> None:
    others = [
        tmp_path / name for name in (".DS_Store", "fragments/notes.txt", "snapshots/.nfs0001", "manifests/old.json")
    ]
    writer = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0)
    for path in others:
        path.write_bytes(b"?")
    (tmp_path / "fragments" / os.fsdecode(b"\xff")).touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    commit(writer, [0])
    writer.compact()

    assert all(path.exists() for path in others)
    assert set(os.listdir(tmp_path / "fragments")) == {
        "notes.txt",
        os.fsdecode(b"\xff"),
        *writer._store._parts["fragments"]._spares,
    }
    assert read(tmp_path) == {0: (1, -1.0)}


def noted(uri: Path) -> dict[str, float]:
    return {path: float(since) for path, since in json.loads((uri / store_files.NOTES).read_bytes()).items()}


def test_notes_say_what_is_unneeded_and_since_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, began = ScoreWriter(tmp_path, N, retention=Retention(0)), time.time()
    commit(writer, [0])
    [fragment] = named(tmp_path, "fragments")
    writer.compact()

    first = noted(tmp_path)
    assert first.keys() == {f"fragments/{fragment.name}"}
    assert began <= min(first.values()) <= time.time()
    writer.compact()
    assert noted(tmp_path) == first
    an_hour_passes(monkeypatch)
    ScoreWriter(tmp_path, N, retention=Retention(0)).compact()
    assert not fragment.exists()
    assert all((tmp_path / path).exists() for path in noted(tmp_path))


@pytest.mark.parametrize("since", ["null", '"0"', '"nan"', "NaN", "[]", "1e12", None])
def test_wrong_notes_begin_anew(tmp_path: Path, since: str | None) -> None:
    """1e12: by a clock that was ahead."""
    writer = ScoreWriter(tmp_path, N, retention=Retention(0))
    commit(writer, [0])
    [fragment] = named(tmp_path, "fragments")
    notes = f'{{"fragments/{fragment.name}": {since}}}' if since else "[1]"
    (tmp_path / store_files.NOTES).write_text(notes)
    writer.compact()

    assert fragment.exists()
    assert time.time() - 60 < noted(tmp_path)[f"fragments/{fragment.name}"] <= time.time()


def test_a_writer_that_cannot_write_notes_remembers_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=60.0)
    monkeypatch.setattr(writer._store._root, "put", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space")))
    commit(writer, [0])
    fragments = named(tmp_path, "fragments")
    began = time.time()
    for later_s in (0, 59, 61):
        assert all(path.exists() for path in fragments)
        then = began + later_s
        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            patch.setattr(time, "time", lambda then=then: then)
            writer.compact()

    assert not any(path.exists() for path in fragments)


def test_lives_of_one_commit_leave_few_manifests(tmp_path: Path) -> None:
    for version in range(1, 21):
        writer = ScoreWriter(tmp_path, N)
        commit(writer, [0], version)
    writer.close()

    assert len(names(tmp_path, "manifests")) == store_files.SUPERSEDED_MANIFESTS_KEPT + 1


def test_compaction_collects_also_when_there_is_nothing_to_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(0))
    commit(writer, [0])
    writer.compact()
    an_hour_passes(monkeypatch)
    writer.compact()

    assert names(tmp_path, "fragments") == set()
    assert read(tmp_path).keys() == {0}


def test_retention_counts_also_where_there_is_nothing_to_fold(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N, grace_s=0.0)
    for version in (1, 2, 3):
        commit(writer, [0], version)
        writer.compact()
    assert [latest(ScoreReader(tmp_path).table(v))[0][0] for v in (1, 2, 3)] == [1, 2, 3]
    ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0).compact()

    assert names(tmp_path, "fragments") == set()
    assert len(names(tmp_path, "snapshots")) == 1
    with refuses(NoSuchVersion, "version", 1):
        ScoreReader(tmp_path).table(1)


def test_a_version_that_two_kept_manifests_hold_keeps_only_the_later(tmp_path: Path) -> None:
    """Commits come in while a snapshot is made: the manifest before it and the one after both reach them."""
    writer = ScoreWriter(tmp_path, N, retention=Retention(0, keep_every=2), grace_s=0.0)
    fold = writer._fold

    def fold_and_commit(manifest: Any) -> Any:
        snapshot = fold(manifest)
        commit(writer, [0], writer.version + 1)
        return snapshot

    commit(writer, [0], 1)
    with mock.patch.object(writer, "_fold", fold_and_commit):
        writer.compact()  # its snapshot is of version 1; version 2 is in this manifest and in the one before
    commit(writer, [0], 3)
    writer.compact()
    reader = ScoreReader(tmp_path)

    assert latest(reader.table(2)) == {0: (2, -1.0)}
    with refuses(NoSuchVersion, "version", 0):
        reader.table(0)


def test_commits_wait_for_a_compaction_that_is_far_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_store, "COMPACT_AFTER_FRAGMENTS", 2)
    monkeypatch.setattr(score_store, "MOST_DEBT", 2.0)
    writer, may_fold = ScoreWriter(tmp_path, N), threading.Event()
    fold = writer._fold

    def fold_later(manifest: Any) -> Any:
        may_fold.wait(LIMIT_S)
        return fold(manifest)

    with mock.patch.object(writer, "_fold", fold_later):
        for version in (1, 2, 3):
            commit(writer, [0], version)  # the compaction has begun, and these do not wait
        thread = threading.Thread(target=commit, args=(writer, [0], 4))
        thread.start()
        wait_for(lambda: read(tmp_path) == {0: (4, -1.0)}, what="the fourth commit")
        assert thread.is_alive()  # it is durable and waits
        may_fold.set()
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert writer.snapshot_version >= 2
