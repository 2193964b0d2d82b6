import contextlib
import datetime
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shared import store_files
from shared.errors import ConfigError, DataError, Fenced, NoSuchVersion, StoreError, StoreMismatch
from shared.schema import SCORE_SCHEMA, SNAPSHOT_SCHEMA
from shared.score_store import COMPACT_AFTER_FRAGMENTS, Retention, ScoreReader, ScoreWriter
from shared.store_view import stable_order
from tests.raising import refuses
from tests.rows import SCORED_AT, make_rows
from tests.stores import Latest, N, commit, latest, names, read
from tests.waiting import LIMIT_S, wait_for


@pytest.mark.parametrize("most", [5, 1 << 40, (1 << 63) - 1], ids=["repeats", "large", "too large for one word"])
def test_stable_order_is_argsorts(most: int) -> None:
    keys = np.random.default_rng(0).integers(0, most, 1000)
    keys[500:510] = most - 1

    np.testing.assert_array_equal(stable_order(keys), np.argsort(keys, kind="stable"))
    assert len(stable_order(keys[:0])) == 0


# Rows, versions, answers


def test_empty_store(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "scores", N, scoring_id="s") as writer:
        reader = ScoreReader(tmp_path / "scores")

        assert writer.commit() == 0
    assert (reader.num_samples, reader.scoring_id) == (N, "s")
    assert (reader.refresh(), reader.rows, reader.metadata, reader.committed_at) == (0, 0, {}, None)
    assert latest(reader.table()) == latest(reader.table(0)) == latest(reader.changes(0)) == {}
    assert reader.lookup([3]).to_pylist() == [dict.fromkeys(SCORE_SCHEMA.names) | {"sample_id": 3}]
    assert np.isnan(reader.dense("margin")).tolist() == [True] * N


def test_commit_makes_appended_tables_visible_at_once_and_sorted(tmp_path: Path) -> None:
    writer, reader = ScoreWriter(tmp_path, N), ScoreReader(tmp_path)
    writer.append(make_rows([7, 2], 1, margin=[0.5, 0.25]))
    writer.append(make_rows([0], 1, margin=3.0).to_batches()[0])
    writer.append(make_rows([]))
    assert reader.refresh() == 0
    before = datetime.datetime.now(datetime.UTC)

    assert writer.commit({"bound": 4}) == writer.version == 1
    assert latest(reader.table()) == {}  # until it refreshes
    assert reader.refresh() == reader.version == 1
    assert latest(reader.table()) == {0: (1, 3.0), 2: (1, 0.25), 7: (1, 0.5)}
    assert (reader.rows, reader.metadata) == (writer.rows, writer.metadata) == (3, {"bound": 4})
    assert reader.committed_at is not None
    assert before <= reader.committed_at <= datetime.datetime.now(datetime.UTC)
    assert commit(writer, [1]) == 2
    assert writer.metadata == {"bound": 4}  # stays until told otherwise


def test_every_column_comes_back(tmp_path: Path) -> None:
    row = {
        "sample_id": 4,
        "model_version": 3,
        "step": 2**40,
        "scored_at": SCORED_AT + datetime.timedelta(microseconds=1),
        "margin": -0.5,
        "adversarial_margin": float("inf"),
        "log_ratio": 0.125,
        "grad_norm": 2.0,
        "el2n": 1.25,
        "predicted": 7,
        "correct": False,
        "robust": True,
    }
    with ScoreWriter(tmp_path, N) as writer:
        writer.append(pa.Table.from_pylist([row], schema=SCORE_SCHEMA).select(SCORE_SCHEMA.names[::-1]))

    assert ScoreReader(tmp_path).table().to_pylist() == [row]


@pytest.mark.parametrize("compacted", [False, True], ids=["fragments", "snapshot"])
@pytest.mark.parametrize(
    ("commits", "expected"),
    [
        ([([0], 1, 1.0), ([0], 2, 2.0)], {0: (2, 2.0)}),
        ([([0], 2, 2.0), ([0], 1, 1.0)], {0: (2, 2.0)}),
        ([([0], 2, 1.0), ([0], 2, 2.0)], {0: (2, 2.0)}),
        ([([0, 0], [2, 1], [2.0, 1.0])], {0: (2, 2.0)}),
        ([([0, 0], 2, [1.0, 2.0])], {0: (2, 2.0)}),
        ([([0, 5, 9], 3, 3.0), ([9, 0], [2, 4], [2.0, 4.0]), ([9], 3, 5.0)], {0: (4, 4.0), 5: (3, 3.0), 9: (3, 5.0)}),
    ],
    ids=["newer", "late", "tie", "late in one table", "tie in one table", "mixed"],
)
def test_highest_model_version_wins_then_the_later_row(
    tmp_path: Path, commits: list[Any], expected: Latest, compacted: bool
) -> None:
    writer, reader = ScoreWriter(tmp_path, N), ScoreReader(tmp_path)
    for ids, version, margin in commits:
        commit(writer, ids, version, margin=margin)
        reader.refresh()
        if compacted:
            writer.compact()

    assert latest(reader.table()) == read(tmp_path) == expected
    answers = dict(enumerate(zip(*(reader.dense(c).tolist() for c in ("model_version", "margin")), strict=True)))
    assert {i: found for i, found in answers.items() if found[0] != -1} == expected


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("compacted", [False, True], ids=["fragments", "snapshot"])
def test_same_rows_again_change_nothing(tmp_path: Path, reopen: bool, compacted: bool) -> None:
    rows = make_rows([3, 1], [2, 1], margin=[np.nan, 1.0])
    writer = ScoreWriter(tmp_path, N)
    writer.append(rows)
    writer.commit()
    if compacted:
        writer.compact()
    before = ScoreReader(tmp_path)
    if reopen:
        writer = ScoreWriter(tmp_path, N)
    writer.append(rows)
    writer.append(rows.slice(1))

    assert writer.commit() == 1
    after = ScoreReader(tmp_path)
    assert (after.version, after.rows) == (1, 2)
    assert str(after.snapshot().to_pylist()) == str(before.snapshot().to_pylist())  # NaN is not equal to itself
    assert after.changes(1).num_rows == 0
    assert commit(writer, [1, 2], 1, margin=1.0) == 2  # what is new beside what is known
    assert latest(ScoreReader(tmp_path).changes(1)) == {2: (1, 1.0)}


@pytest.mark.parametrize("versions", [3, [3, 2, 2], [2, 3, 1]], ids=["one version", "falling", "mixed"])
def test_a_block_sent_again_by_the_same_writer_is_known(tmp_path: Path, versions: Any) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0, 0, 1], versions)
    rows = ScoreReader(tmp_path).table()
    writer.append(rows)

    assert (writer.commit(), writer.rows) == (1, 3)


def test_superseded_rows_again_change_no_latest_row(tmp_path: Path) -> None:
    """A block sent twice, the second time after a newer checkpoint's rows."""
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0, 1], 1)
    commit(writer, [0, 1], 2)

    before = ScoreReader(tmp_path).table()
    commit(writer, [0, 1], 1)

    assert ScoreReader(tmp_path).table() == before
    assert ScoreReader(tmp_path).changes(2).num_rows == 0


def test_known_row_still_counts_as_the_later_one_of_its_commit(tmp_path: Path) -> None:
    """In one commit: another row of the same version, then again the one that is in the store. The last one wins."""
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0], 1, margin=1.0)
    writer.append(make_rows([0], 1, margin=2.0))
    commit(writer, [0], 1, margin=1.0)

    assert read(tmp_path) == {0: (1, 1.0)}


@pytest.mark.parametrize("compacted", [False, True], ids=["fragments", "snapshot"])
def test_lookup_keeps_order_and_repeats(tmp_path: Path, compacted: bool) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [2, 4, 6], 1, margin=[0.5, 1.0, 1.5])
    if compacted:
        writer.compact()
    commit(writer, [4], 2, margin=8.0)
    reader = ScoreReader(tmp_path)
    rows = reader.lookup([6, 0, 4, 6, 9])

    assert rows.schema == SCORE_SCHEMA
    assert rows["sample_id"].to_pylist() == [6, 0, 4, 6, 9]
    assert rows["margin"].to_pylist() == [1.5, None, 8.0, 1.5, None]
    assert [set(row.values()) for row in rows.to_pylist() if row["margin"] is None] == [{0, None}, {9, None}]
    assert reader.lookup([]).num_rows == 0
    for wrong in (-1, N):
        with refuses(DataError, "sample_id", wrong):
            reader.lookup([0, wrong])


DENSE: dict[str, tuple[Any, Any, str]] = {  # column: where unscored, the row's, dtype
    "sample_id": (-1, 1, "int64"),
    "model_version": (-1, 6, "int64"),
    "step": (-1, 60, "int64"),
    "scored_at": (np.datetime64("NaT"), np.datetime64(SCORED_AT.replace(tzinfo=None)), "datetime64[us]"),
    "margin": (np.nan, -1, "float32"),
    "adversarial_margin": (np.nan, 0.5, "float32"),
    "log_ratio": (np.nan, 1, "float32"),
    "grad_norm": (np.nan, np.float32(0.1), "float32"),
    "el2n": (np.nan, np.float32(0.3), "float32"),
    "predicted": (-1, 0, "int32"),
    "correct": (-1, 1, "int8"),
    "robust": (-1, 0, "int8"),
    "store_version": (-1, 1, "int64"),
}


@pytest.mark.parametrize("compacted", [False, True], ids=["fragments", "snapshot"])
def test_dense_columns(tmp_path: Path, compacted: bool) -> None:
    writer = ScoreWriter(tmp_path, 2)
    commit(writer, [1], 6)
    if compacted:
        writer.compact()
    reader = ScoreReader(tmp_path)

    assert DENSE.keys() == set(SNAPSHOT_SCHEMA.names)
    for column, (unscored, value, dtype) in DENSE.items():
        dense = reader.dense(column)
        assert dense.dtype == dtype, column
        np.testing.assert_array_equal(dense, np.array([unscored, value], dtype=dtype), err_msg=column)
    with refuses(StoreError, "column", "adm"):
        reader.dense("adm")


def test_changes_and_time_travel_before_and_after_compaction(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0, 1, 2], 1)
    commit(writer, [1, 5], 2)
    commit(writer, [2, 5], 1, margin=9.0)  # late for 5
    changes = [{0: 1, 1: 2, 2: 1, 5: 2}, {1: 2, 2: 1, 5: 2}, {2: 1}, {}, {}]
    tables = [{}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 2, 2: 1, 5: 2}, {0: 1, 1: 2, 2: 1, 5: 2}]
    followed = ScoreReader(tmp_path)

    for then in (lambda: None, writer.compact, lambda: commit(writer, [9], 3)):
        then()
        followed.refresh()
        for reader in (followed, ScoreReader(tmp_path)):
            new = {9: 3} if reader.version == 4 else {}
            for since, expected in enumerate(changes):
                found = {i: version for i, (version, _) in latest(reader.changes(since)).items()}
                assert found == expected | (new if since < 4 else {})
            for version, expected in enumerate(tables):
                assert {i: found for i, (found, _) in latest(reader.table(version)).items()} == expected
    assert names(tmp_path, "snapshots")


@pytest.mark.parametrize("version", [-1, 3, 99])
def test_version_that_is_not_there(tmp_path: Path, version: int) -> None:
    writer, reader = ScoreWriter(tmp_path, N), ScoreReader(tmp_path)
    for model_version in (1, 2):
        commit(writer, [0], model_version)
    reader.refresh()
    commit(writer, [0], 3)  # the reader has not seen it

    with refuses(NoSuchVersion, "version", version):
        reader.table(version)


def test_many_commits_compact_themselves(tmp_path: Path) -> None:
    writer, reader = ScoreWriter(tmp_path, N), ScoreReader(tmp_path)
    for version in range(1, COMPACT_AFTER_FRAGMENTS + 3):
        commit(writer, [version % N], version)

    wait_for(lambda: names(tmp_path, "snapshots"), what="a snapshot")
    assert reader.refresh() == writer.version == COMPACT_AFTER_FRAGMENTS + 2
    assert {i: version for i, (version, _) in latest(reader.table()).items()} == {
        version % N: version for version in range(COMPACT_AFTER_FRAGMENTS + 3 - N, COMPACT_AFTER_FRAGMENTS + 3)
    }
    assert len(latest(reader.changes(COMPACT_AFTER_FRAGMENTS))) == 2


# One writer


def test_second_writer_fences_the_first(tmp_path: Path) -> None:
    first = ScoreWriter(tmp_path, N)
    commit(first, [0], 1)
    first.append(make_rows([1], 1))
    second, reader = ScoreWriter(tmp_path, N), ScoreReader(tmp_path)
    with refuses(Fenced, str(tmp_path)):
        first.commit()
    commit(second, [2], 2)

    for call in (first.commit, lambda: first.append(make_rows([3])), first.compact):
        with pytest.raises(Fenced):
            call()
    assert (second.version, reader.refresh()) == (2, 2)
    assert latest(reader.table()) == {0: (1, -1.0), 2: (2, -1.0)}
    assert reader.rows == 2


@pytest.mark.parametrize("successor_commits", [False, True])
def test_takeover_in_the_middle_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, successor_commits: bool
) -> None:
    """The first writer's fragment is written and its manifest about to be when the second one opens."""
    first = ScoreWriter(tmp_path, N)
    first.append(make_rows([0], 9))
    link = os.link

    def take_over_first(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        second = ScoreWriter(tmp_path, N)
        if successor_commits:
            commit(second, [1], 1)
        link(source, target)

    monkeypatch.setattr(os, "link", take_over_first)
    with pytest.raises(Fenced):
        first.commit()

    assert read(tmp_path) == ({1: (1, -1.0)} if successor_commits else {})


def test_fence_holds_after_the_successor_removed_old_manifests(tmp_path: Path) -> None:
    """A writer that slept through takeover, compaction and collection must still find its place taken."""
    first = ScoreWriter(tmp_path, N)
    first.append(make_rows([0], 9))
    second = ScoreWriter(tmp_path, N, grace_s=0.0)
    commit(second, [1], 1)
    second.compact()

    with pytest.raises(Fenced):
        first.commit()
    assert commit(second, [2], 1) == 2
    assert read(tmp_path).keys() == {1, 2}


def test_late_manifest_of_a_writer_that_slept_does_not_count(tmp_path: Path) -> None:
    """Its place is free again, since its successor went on and removed what lay there; a higher generation says no."""
    first = ScoreWriter(tmp_path, N)
    first.append(make_rows([0], 9))
    second = ScoreWriter(tmp_path, N)
    for version in range(1, store_files.SUPERSEDED_MANIFESTS_KEPT + 4):
        commit(second, [1], version)
    wait_for(lambda: "000000000002.json" not in names(tmp_path, "manifests"), what="the place to be free")

    with pytest.raises(Fenced):
        first.commit()
    assert read(tmp_path).keys() == {1}
    second.compact()
    assert "000000000002.json" not in names(tmp_path, "manifests")
    assert (commit(second, [2], 1), read(tmp_path).keys()) == (second.version, {1, 2})


def test_writer_whose_successor_removed_what_it_was_writing_is_fenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ScoreWriter(tmp_path, N)
    first.append(make_rows([0], 9))
    link = os.link

    def sleep_first(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        second = ScoreWriter(tmp_path, N, grace_s=0.0)
        commit(second, [1], 1)
        second.compact()
        link(source, target)

    monkeypatch.setattr(os, "link", sleep_first)
    with pytest.raises(Fenced):
        first.commit()
    assert read(tmp_path).keys() == {1}


def test_who_waits_for_a_commit_comes_next(tmp_path: Path) -> None:
    """Else a compaction would wait for ever beside a writer that commits without pause."""
    writer, order = ScoreWriter(tmp_path, N), []

    def wait() -> None:
        with writer._turn():
            order.append("waited")

    thread = threading.Thread(target=wait)
    with writer._turn():
        thread.start()
        wait_for(writer._turn_lock.locked, what="the other thread")
    with writer._turn():
        order.append("came back")
    thread.join(LIMIT_S)

    assert order == ["waited", "came back"]


DYING_WRITER = """
import os, sys
from shared.score_store import ScoreWriter
from tests.rows import make_rows

uri, moment = sys.argv[1:]
writer = ScoreWriter(uri, 10)
writer.append(make_rows([0, 1], 1))
writer.commit()
writer.append(make_rows([1, 2], 2))
link = os.link
if moment == "before the manifest":
    os.link = lambda *_: os._exit(9)
if moment == "after the manifest":
    os.link = lambda *names: (link(*names), os._exit(9))
if moment != "before commit":
    writer.commit()
os._exit(9)
"""


@pytest.mark.parametrize(
    ("moment", "versions"),
    [
        ("before commit", {0: 1, 1: 1}),
        ("before the manifest", {0: 1, 1: 1}),
        ("after the manifest", {0: 1, 1: 2, 2: 2}),
    ],
)
def test_writer_that_dies_loses_uncommitted_rows_only(tmp_path: Path, moment: str, versions: dict[int, int]) -> None:
    child = subprocess.run([sys.executable, "-c", DYING_WRITER, tmp_path, moment], check=False, timeout=LIMIT_S)
    assert child.returncode == 9
    left = {i: version for i, (version, _) in read(tmp_path).items()}
    successor = ScoreWriter(tmp_path, N)

    assert left == versions
    assert successor.version == (2 if 2 in versions else 1)
    assert commit(successor, [1, 2], 2) == 2  # sent again
    assert {i: version for i, (version, _) in read(tmp_path).items()} == {0: 1, 1: 2, 2: 2}


def test_close_commits_and_ends(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([0]))
    writer.close()
    writer.close()

    assert read(tmp_path).keys() == {0}
    for call in (writer.commit, lambda: writer.append(make_rows([1])), writer.compact):
        with refuses(StoreError, str(tmp_path)) as caught:
            call()
        assert caught.type is StoreError  # and not Fenced


def test_row_appended_while_closing_is_stored_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([0]))
    link, accepted = os.link, [0]

    def append_first(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        with contextlib.suppress(StoreError):
            writer.append(make_rows([1]))
            accepted.append(1)
        link(source, target)

    monkeypatch.setattr(os, "link", append_first)
    writer.close()

    assert sorted(read(tmp_path)) == accepted


# Refusals


@pytest.mark.parametrize(
    ("rows", "key", "value"),
    [
        (make_rows([0]).drop_columns(["el2n"]), "el2n", "lack columns ['el2n']"),
        (make_rows([0]).append_column("adm", pa.array([0.5])), "adm", "unknown ones ['adm']"),
        (make_rows([0]).append_column("el2n", pa.array([0.5])), "el2n", "twice ['el2n']"),
        (make_rows([0]).set_column(0, "sample_id", pa.array([0.5])), "sample_id", "0.5"),
        (make_rows([0]).set_column(4, "margin", pa.array(["large"])), "margin", "large"),
        (make_rows([0]).set_column(4, "margin", pa.array([[1.0]])), "margin", "list"),
        (make_rows([0, 1]).set_column(8, "el2n", pa.array([0.5, None], pa.float32())), "el2n", "1 nulls"),
        (make_rows([3, N]), "sample_id", "3..10"),
        (make_rows([-1, 3]), "sample_id", "-1..3"),
        (make_rows([3], -1), "model_version", -1),
    ],
    ids=["missing", "extra", "twice", "fraction", "string", "list", "null", "id too large", "id below 0", "version"],
)
def test_rows_that_do_not_fit(tmp_path: Path, rows: pa.Table, key: str, value: object) -> None:
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([5]))
    with refuses(StoreMismatch, key, value):
        writer.append(rows)

    assert writer.commit() == 1
    assert read(tmp_path).keys() == {5}  # nothing of the refused table


def test_wider_types_that_fit_are_taken(tmp_path: Path) -> None:
    rows = make_rows([0], margin=0.5)
    rows = rows.set_column(0, "sample_id", rows["sample_id"].cast(pa.int16()))
    rows = rows.set_column(4, "margin", rows["margin"].cast(pa.float64()))
    with ScoreWriter(tmp_path, N) as writer:
        writer.append(rows)

    assert read(tmp_path) == {0: (1, 0.5)}


def test_store_of_something_else(tmp_path: Path) -> None:
    ScoreWriter(tmp_path, N, scoring_id="fgsm")

    with refuses(StoreMismatch, "num_samples", 11):
        ScoreWriter(tmp_path, 11, scoring_id="fgsm")
    with refuses(StoreMismatch, "scoring_id", "pgd"):
        ScoreWriter(tmp_path, N, scoring_id="pgd")
    with refuses(StoreMismatch, "num_samples", 0):
        ScoreWriter(tmp_path / "other", 0)
    with refuses(ConfigError, "s3://bucket/scores"):
        ScoreWriter("s3://bucket/scores", N)
    with refuses(StoreError, str(tmp_path / "nowhere")):
        ScoreReader(tmp_path / "nowhere")


@pytest.mark.parametrize("opening", [lambda uri: ScoreWriter(uri, N), ScoreReader], ids=["writer", "reader"])
@pytest.mark.parametrize("part", ["store.json", "000000000002.json"])
@pytest.mark.parametrize("found", [3, 1])
def test_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opening: Callable[[Path], object], part: str, found: int
) -> None:
    with monkeypatch.context() as other:
        if part == "store.json":
            other.setattr(store_files, "FORMAT", found)
        writer = ScoreWriter(tmp_path, N)
        other.setattr(store_files, "FORMAT", found)
        commit(writer, [0])

    with refuses(StoreMismatch, value=f"format {found}") as caught:
        opening(tmp_path)
    assert Path(caught.value.key).name == part
    assert ("install" in caught.value.fix) == (found > store_files.FORMAT)


# Threads


def test_appends_from_threads_during_commits_lose_nothing(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, 400)

    def append(first: int) -> None:
        for i in range(first, 400, 4):
            writer.append(make_rows([i], i + 1))

    threads = [threading.Thread(target=append, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        writer.commit()
    writer.close()

    assert read(tmp_path) == {i: (i + 1, -1.0) for i in range(400)}
    assert writer.rows == 400


def test_reader_beside_the_writer_sees_versions_rise_and_whole_tables(tmp_path: Path) -> None:
    """Every commit scores all samples and compactions remove what the reader may be opening."""
    writer = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.0)
    reader = ScoreReader(tmp_path)
    seen: list[tuple[int, set[int], int]] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def follow() -> None:
        try:
            while not done.is_set() or reader.refresh() > seen[-1][0]:
                reader.refresh()
                rows = reader.snapshot()
                seen.append(
                    (max([0, *rows["store_version"].to_pylist()]), set(rows["model_version"].to_pylist()), len(rows))
                )
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    for version in range(1, 61):
        commit(writer, np.arange(N), version)
        if version % 5 == 0:
            writer.compact()
        if version in (1, 30):  # at least these are seen before they are compacted away
            wait_for(lambda: failures or (seen and seen[-1][0] == version), "the reader")  # noqa: B023
    done.set()
    thread.join()

    assert failures == []
    versions = [version for version, _, _ in seen]
    assert versions == sorted(versions)
    assert len(set(versions)) > 2
    assert versions[-1] == 60
    assert all((found, rows) == (({version}, N) if version else (set(), 0)) for version, found, rows in seen)


# -- one row, some values, pinned readers ------------------------------------------------------------------------------


@pytest.fixture
def layered(tmp_path: Path) -> Iterator[ScoreReader]:
    """A snapshot of samples 0..7 and two fragments above it; sample 9 is unscored."""
    with ScoreWriter(tmp_path, N) as writer:
        commit(writer, range(8), 1, margin=np.arange(8.0))
        writer.compact()
        commit(writer, [2, 8], 2, margin=20.0, correct=False)
        commit(writer, [3, 2], 3, margin=30.0)
        yield ScoreReader(tmp_path)


def test_one_row_is_what_lookup_finds(layered: ScoreReader) -> None:
    for sample_id in range(N):
        row, (found,) = layered.row(sample_id), layered.lookup([sample_id]).to_pylist()
        if found["model_version"] is None:
            assert row is None
            continue
        assert row is not None
        found["scored_at"] = round(found["scored_at"].timestamp() * 1e6)
        assert {name: row[name] for name in found} == found


@pytest.mark.parametrize("sample_id", [-1, N, 2**63, 2**70])
def test_a_row_of_an_unknown_id_is_refused(layered: ScoreReader, sample_id: int) -> None:
    with refuses(DataError, "sample_id", sample_id):
        layered.row(sample_id)


def test_values_are_those_of_the_dense_columns(layered: ScoreReader) -> None:
    ids = np.array([9, 2, 0, 3, 8, 2])
    names = ("margin", "model_version", "scored_at", "correct", "store_version")

    for name, values in zip(names, layered.values(ids, names), strict=True):
        np.testing.assert_array_equal(values, layered.dense(name)[ids])
    with refuses(DataError, "sample_id", N):
        layered.values(np.array([N]), names)


def test_values_of_an_empty_store(tmp_path: Path) -> None:
    ScoreWriter(tmp_path, N).close()
    reader = ScoreReader(tmp_path)

    assert [values.tolist() for values in reader.values(np.array([1, 1]), ["step", "correct"])] == [[-1, -1], [-1, -1]]
    assert reader.row(1) is None


def test_a_pinned_reader_stays_where_it_is(layered: ScoreReader, tmp_path: Path) -> None:
    now, then = layered.pinned(), layered.pinned(1)
    with ScoreWriter(tmp_path, N) as writer:
        commit(writer, [0], 4)
        assert not now.is_newest()
    layered.refresh()

    assert (layered.version, now.version, then.version) == (4, 3, 1)
    assert then.table() == layered.table(1)
    assert now.row(0) is not None
    assert now.row(0)["model_version"] == 1  # type: ignore[index]
    assert layered.is_newest()
    assert (now.rows, then.rows) == (layered.rows - 1, 8)
    assert then.committed_at is None
    assert not then.is_newest()
    assert then.refresh() == 4
    assert then.table() == layered.table()
    with refuses(NoSuchVersion, "version", 9):
        layered.pinned(9)


def test_snapshot_since_a_version_has_the_commit_of_each_row(layered: ScoreReader) -> None:
    found = layered.snapshot(since=1)

    assert found.column("sample_id").to_pylist() == [2, 3, 8]
    assert found.column("store_version").to_pylist() == [3, 3, 2]
