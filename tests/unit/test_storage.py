import contextlib
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from shared.errors import ConfigError
from shared.storage import SPARES, Folder, local_path
from tests.disk import Disk
from tests.raising import refuses
from tests.waiting import wait_for

WRITES = {"put": Folder.put, "create": Folder.create}


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with refuses(ConfigError, str(tmp_path), os.strerror(number)):
        Folder(tmp_path).create("x", b"first")
    assert os.listdir(tmp_path) == []


def test_put_replaces_and_create_does_not(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a" / "b").make()
    folder.put("x", b"old")
    folder.put("x", b"new")

    assert folder.read("x") == b"new"
    assert not folder.create("x", b"other")
    assert folder.create("y", b"first")
    assert (folder.read("x"), folder.read("y")) == (b"new", b"first")
    assert os.listdir(folder.path) in (["x", "y"], ["y", "x"])  # no temporary file beside them


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_content_is_durable_before_the_name_shows_and_the_name_before_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Folder, str, bytes], object]
) -> None:
    folder, fsync, synced = Folder(tmp_path), os.fsync, []

    def record(descriptor: int) -> None:
        fsync(descriptor)
        what = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "content"
        synced.append((what, os.fstat(descriptor).st_size if what == "content" else None, folder.names()))

    monkeypatch.setattr(os, "fsync", record)
    write(folder, "x", b"four")

    assert synced == [("content", 4, []), ("folder", None, ["x"])]


@pytest.mark.parametrize(
    ("write", "step"),
    [(Folder.put, "fsync"), (Folder.put, "replace"), (Folder.create, "fsync"), (Folder.create, "link")],
)
def test_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Folder, str, bytes], object], step: str
) -> None:
    folder = Folder(tmp_path)
    folder.put("old", b"kept")
    monkeypatch.setattr(os, step, no_space)

    with pytest.raises(OSError, match="No space"):
        write(folder, "old" if write is Folder.put else "new", b"lost")
    assert os.listdir(tmp_path) == ["old"]
    assert folder.read("old") == b"kept"


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: folder.create("x", str(i).encode()), range(32)))

    assert sum(won) == 1
    assert folder.read("x") == str(won.index(True)).encode()
    assert os.listdir(tmp_path) == ["x"]


def test_names_are_sorted_without_temporary_ones_and_delete_is_idempotent(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "f")

    assert folder.names() == []
    folder.make().make()
    for name in ("b", "a", "c"):
        folder.put(name, b"")
    (folder.path / ".d.0123").write_bytes(b"half")
    folder.delete("b")
    folder.delete("b")
    assert folder.names() == ["a", "c"]


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/data/run", "/data/run"),
        ("file:///data/run", "/data/run"),
        ("file:///data/a%20run", "/data/a run"),
        ("/data/a%20run", "/data/a%20run"),
        (Path("/data/run"), "/data/run"),
    ],
)
def test_local_paths(uri: str | Path, path: str) -> None:
    assert local_path(uri) == Path(path)


def test_relative_path_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert local_path("runs/a") == tmp_path / "runs" / "a"


@pytest.mark.parametrize("scheme", ["s3", "gs", "http"])
def test_remote_uri_is_refused(scheme: str) -> None:
    uri = f"{scheme}://bucket/run"
    with refuses(ConfigError, uri, uri):
        Folder(uri)


def test_file_uri_of_another_host_is_refused() -> None:
    with refuses(ConfigError, "file://disk/run", "'disk'"):
        local_path("file://disk/run")


def test_make_syncs_the_name_of_a_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it may have been killed before."""
    (tmp_path / "there").mkdir()
    fsync, synced = os.fsync, []

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    Folder(tmp_path / "there").make()

    assert synced == [str(tmp_path)]


def test_create_that_nfs_answers_twice_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the first request is lost, and the second finds the link that the first made."""
    link = os.link

    def link_twice(*paths: object) -> None:
        link(*paths)  # type: ignore[arg-type]
        link(*paths)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", link_twice)

    assert Folder(tmp_path).create("x", b"mine")
    assert not Folder(tmp_path).create("x", b"other")


def test_names_are_not_listed_while_they_are_prepared(tmp_path: Path) -> None:
    folder, go_on = Folder(tmp_path), threading.Event()
    with mock.patch.object(folder, "sync", go_on.wait), ThreadPoolExecutor(2) as threads:
        preparing = threads.submit(folder.prepare, ".arrow")
        wait_for(lambda: len(os.listdir(tmp_path)) == SPARES)
        listing = threads.submit(folder.names)
        with contextlib.suppress(TimeoutError):
            listing.result(0.2)
        go_on.set()
        preparing.result()

    assert listing.result() == []


def test_prepared_names_are_used_once_or_tidied_up(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.prepare(".arrow")
    folder.prepare(".arrow")
    prepared = set(os.listdir(tmp_path))
    first, second = folder.new_name(".arrow"), folder.new_name(".arrow")
    folder.fill(first, b"1")
    os.unlink(tmp_path / second)  # somebody collected it
    folder.fill(second, b"2")

    assert len(prepared) == SPARES
    assert {first, second} < prepared
    assert folder.names() == sorted([first, second])
    folder.tidy()
    assert sorted(os.listdir(tmp_path)) == sorted([first, second])
    assert folder.read(first) + folder.read(second) == b"12"


def test_filled_names_are_durable(tmp_path: Path) -> None:
    """Prepared ones, one that is new, and one that somebody collected."""
    disk = Disk(tmp_path)
    with disk.watching():
        folder = Folder(tmp_path / "a").make()
        names = [folder.new_name("") for _ in range(2)]
        folder.prepare("")
        names += [folder.new_name("") for _ in range(2)]
        os.unlink(folder.path / names[-1])
        for name in names:
            folder.fill(name, name.encode())

        left = disk.after_power_cut(tmp_path.with_name("left"))
    assert [(left / "a" / name).read_bytes() for name in names] == [name.encode() for name in names]
