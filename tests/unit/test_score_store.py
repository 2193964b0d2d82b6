import contextlib
import datetime
import errno
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared import store_files
from shared.errors import ConfigError, DataError, Fenced, StoreCorrupt, StoreError, StoreMismatch
from shared.schema import SCORE_SCHEMA, SNAPSHOT_SCHEMA
from shared.score_store import COMPACT_AFTER_FRAGMENTS, Retention, ScoreReader, ScoreWriter
from shared.store_view import stable_order
from tests.rows import SCORED_AT, make_rows
from tests.waiting import wait_for

N = 10
Latest = dict[int, tuple[int, float]]


def latest(table: pa.Table) -> Latest:
    """sample_id -> (model_version, margin); the table must be sorted and have one row of each."""
    ids = table["sample_id"].to_pylist()
    assert ids == sorted(set(ids))
    assert table.schema == SCORE_SCHEMA
    return dict(
        zip(ids, zip(table["model_version"].to_pylist(), table["margin"].to_pylist(), strict=True), strict=True)
    )


def read(uri: Path) -> Latest:
    return latest(ScoreReader(uri).table())


def commit(writer: ScoreWriter, ids: Any, model_version: Any = 1, **columns: Any) -> int:
    writer.append(make_rows(ids, model_version, **columns))
    return writer.commit()


def age(uri: Path) -> None:
    """Make all files of the store an hour old."""
    for path in uri.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


def names(uri: Path, folder: str) -> set[str]:
    return set(os.listdir(uri / folder))


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
        with pytest.raises(DataError, match=rf"sample_id {wrong} is outside 0\.\.9"):
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
    with pytest.raises(StoreError, match="no column 'adm'; there are sample_id, model_version"):
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

    with pytest.raises(StoreError, match=f"version {version} is not there; this reader is at version 2"):
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
    with pytest.raises(Fenced, match=str(tmp_path)):
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
    second = ScoreWriter(tmp_path, N)
    commit(second, [1], 1)
    age(tmp_path)
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
    assert "000000000002.json" not in names(tmp_path, "manifests")

    with pytest.raises(Fenced):
        first.commit()
    assert read(tmp_path).keys() == {1}
    second.compact()
    assert "000000000002.json" not in names(tmp_path, "manifests")
    assert (commit(second, [2], 1), read(tmp_path).keys()) == (second.version, {1, 2})


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
    child = subprocess.run([sys.executable, "-c", DYING_WRITER, tmp_path, moment], check=False, timeout=60)
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
        with pytest.raises(StoreError, match="closed"):
            call()


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
    ("rows", "message"),
    [
        (make_rows([0]).drop_columns(["el2n"]), r"lack columns \['el2n'\], have unknown ones \[\]"),
        (make_rows([0]).append_column("adm", pa.array([0.5])), r"lack columns \[\], have unknown ones \['adm'\]"),
        (make_rows([0]).append_column("el2n", pa.array([0.5])), "el2n"),
        (make_rows([0]).set_column(0, "sample_id", pa.array([0.5])), "do not fit SCORE_SCHEMA"),
        (make_rows([0]).set_column(4, "margin", pa.array(["large"])), "do not fit SCORE_SCHEMA"),
        (make_rows([0]).set_column(4, "margin", pa.array([[1.0]])), "do not fit SCORE_SCHEMA"),
        (make_rows([0, 1]).set_column(8, "el2n", pa.array([0.5, None], pa.float32())), "column el2n has 1 nulls"),
        (make_rows([3, N]), r"sample ids 3\.\.10 do not fit 0\.\.9"),
        (make_rows([-1, 3]), r"sample ids -1\.\.3 do not fit 0\.\.9"),
        (make_rows([3], -1), "model_version is below 0"),
    ],
    ids=["missing", "extra", "twice", "fraction", "string", "list", "null", "id too large", "id below 0", "version"],
)
def test_rows_that_do_not_fit(tmp_path: Path, rows: pa.Table, message: str) -> None:
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([5]))
    with pytest.raises(StoreMismatch, match=message):
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

    with pytest.raises(StoreMismatch, match="num_samples 10, asked for 11; use a new run"):
        ScoreWriter(tmp_path, 11, scoring_id="fgsm")
    with pytest.raises(StoreMismatch, match="scoring_id 'fgsm', asked for 'pgd'; use a new run"):
        ScoreWriter(tmp_path, N, scoring_id="pgd")
    with pytest.raises(StoreMismatch, match="num_samples is 0"):
        ScoreWriter(tmp_path / "other", 0)
    with pytest.raises(ConfigError, match="s3"):
        ScoreWriter("s3://bucket/scores", N)
    with pytest.raises(StoreError, match=f"no score store at {tmp_path / 'nowhere'}"):
        ScoreReader(tmp_path / "nowhere")


@pytest.mark.parametrize("opening", [lambda uri: ScoreWriter(uri, N), ScoreReader], ids=["writer", "reader"])
@pytest.mark.parametrize("part", ["store.json", "000000000002.json"])
@pytest.mark.parametrize(("found", "fix"), [(3, "install a newer one"), (1, "score the run again")])
def test_another_format(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opening: Callable[[Path], object],
    part: str,
    found: int,
    fix: str,
) -> None:
    with monkeypatch.context() as other:
        if part == "store.json":
            other.setattr(store_files, "FORMAT", found)
        writer = ScoreWriter(tmp_path, N)
        other.setattr(store_files, "FORMAT", found)
        commit(writer, [0])

    with pytest.raises(StoreMismatch, match=f"{part} has format {found}; this steppe reads 2: {fix}"):
        opening(tmp_path)


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
    path = max((tmp_path / folder).iterdir())
    whole = path.read_bytes()
    damage(path)

    for call in (reader.refresh, reader.refresh, lambda: ScoreReader(tmp_path), lambda: ScoreWriter(tmp_path, N)):
        with pytest.raises(StoreCorrupt, match=path.name):
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
        with pytest.raises(StoreCorrupt, match=r"store\.json"):
            opening()


# Failing disks


@contextlib.contextmanager
def no_space(monkeypatch: pytest.MonkeyPatch, function: str, call: int, *, after: bool = False) -> Iterator[None]:
    """From its `call`-th call on os.`function` raises ENOSPC, before or after having done its work."""
    real, calls = getattr(os, function), itertools.count(1)

    def fail(*args: Any) -> Any:
        failing = next(calls) >= call
        result = None if failing and not after else real(*args)
        if failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        yield


FAILURES = [
    *(pytest.param("fsync", call, False, id=f"fsync {call}") for call in (1, 2, 3, 4)),  # the fourth is after the link
    pytest.param("link", 1, False, id="before the link"),
    pytest.param("link", 1, True, id="after the link"),
]


@pytest.mark.parametrize(("function", "call", "after"), FAILURES)
def test_failed_commit_is_brought_by_the_next_one_exactly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, after: bool
) -> None:
    writer, reader = ScoreWriter(tmp_path, N), ScoreReader(tmp_path)
    commit(writer, [0, 1], 1)
    writer.append(make_rows([1, 2], 2))
    for _ in range(2):
        with no_space(monkeypatch, function, call, after=after), contextlib.suppress(OSError):
            writer.commit()
        reader.refresh()
        assert latest(reader.table()).keys() in ({0, 1}, {0, 1, 2})  # whole: the old version or the new one
    writer.append(make_rows([3], 2))
    took_effect = after or call == 4

    assert writer.commit() == (3 if took_effect else 2)
    assert writer.commit() == writer.version == reader.refresh()
    assert {i: version for i, (version, _) in latest(reader.table()).items()} == {0: 1, 1: 2, 2: 2, 3: 2}
    assert (reader.rows, writer.rows) == (5, 5)


def test_failed_commit_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ScoreWriter(tmp_path, N)
    writer.append(make_rows([0]))

    for model_version, failure in enumerate(FAILURES, start=2):
        function, call, after = failure.values
        writer.append(make_rows([0], model_version=model_version))
        with no_space(monkeypatch, function, call, after=after), pytest.raises(OSError, match="No space"):
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
    with no_space(monkeypatch, "link", 1, after=True), pytest.raises(OSError, match="No space"):
        writer.commit()

    assert writer.commit() == 2
    assert writer.rows == 4
    assert read(tmp_path) == {0: (5, -1.0), 1: (3, 2.0)}


@pytest.mark.parametrize(("function", "call", "after"), FAILURES)
def test_failed_compaction_changes_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, after: bool
) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0, 1], 1)
    with no_space(monkeypatch, function, call, after=after), pytest.raises(OSError, match="No space"):
        writer.compact()

    assert read(tmp_path) == {0: (1, -1.0), 1: (1, -1.0)}
    writer.compact()
    assert commit(writer, [1], 2) == 2
    assert read(tmp_path) == {0: (1, -1.0), 1: (2, -1.0)}


def test_successor_of_a_writer_with_a_half_failed_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ScoreWriter(tmp_path, N)
    first.append(make_rows([0]))
    with no_space(monkeypatch, "link", 1, after=True), pytest.raises(OSError, match="No space"):
        first.commit()
    second = ScoreWriter(tmp_path, N)
    first.append(make_rows([1]))

    with pytest.raises(Fenced):
        first.commit()
    assert commit(second, [2]) == 2
    assert read(tmp_path).keys() == {0, 2}


# Collection


def test_what_no_kept_version_needs_is_removed_when_old(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(1))
    for version in (1, 2, 3):
        commit(writer, [0, version], version)
    writer.compact()
    followed = ScoreReader(tmp_path)
    for version in (4, 5, 6):
        commit(writer, [0, version], version)
    fragments = names(tmp_path, "fragments")
    stray = tmp_path / "fragments" / "000000000007-dead-writer.arrow"
    stray.write_bytes(b"never committed")
    writer.compact()
    assert names(tmp_path, "fragments") == fragments | {stray.name}  # a reader may still be opening them

    commit(writer, [7], 7)
    age(tmp_path)
    before = ScoreReader(tmp_path)
    writer = ScoreWriter(tmp_path, N, retention=Retention(1))  # has not seen for how long nobody needs them
    writer.compact()
    age(tmp_path)
    ScoreWriter(tmp_path, N, retention=Retention(1)).compact()

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
        with pytest.raises(StoreError, match=f"version {gone} is no longer kept; raise keep_last"):
            reader.table(gone)


def test_time_travel_reaches_as_far_as_keep_versions_says(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(4))
    for version in range(1, 13):
        commit(writer, [0], version)
        age(tmp_path)
        if version % 2 == 0:
            writer.compact()
    reader = ScoreReader(tmp_path)

    assert [latest(reader.table(v))[0][0] for v in range(8, 13)] == [8, 9, 10, 11, 12]
    with pytest.raises(StoreError, match="no longer kept"):
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
        with contextlib.suppress(StoreError):
            assert latest(reader.table(version)) == ({0: (version, -1.0)} if version else {})
            readable.add(version)
    assert kept <= readable
    assert len(readable) <= 2 * len(kept) + 1
    history = reader.history(0)["model_version"].to_pylist()
    assert history == sorted(set(history))
    assert set(history) >= kept - {0}


def test_retention_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="keep_last is -1, keep_every 0; both must be at least 0"):
        Retention(keep_last=-1)


def test_files_that_nothing_names_stay_for_the_grace_period(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(0), grace_s=0.2)
    commit(writer, [0])
    writer.compact()
    assert len(names(tmp_path, "fragments")) == 1
    time.sleep(0.25)
    writer.compact()

    assert names(tmp_path, "fragments") == set()


def test_manifests_do_not_pile_up(tmp_path: Path) -> None:
    """Not those of commits, and not those of notes alone."""
    writer = ScoreWriter(tmp_path, N)
    for note in range(30):
        writer.commit({"note": note})
        commit(writer, [note % N], note + 1)

    assert len(names(tmp_path, "manifests")) <= store_files.SUPERSEDED_MANIFESTS_KEPT + 1
    assert ScoreReader(tmp_path).metadata == {"note": 29}


@pytest.mark.parametrize("folder", ["", "fragments", "snapshots", "manifests"])
def test_temporary_files_of_dead_writers_are_removed(tmp_path: Path, folder: str) -> None:
    writer = ScoreWriter(tmp_path, N)
    commit(writer, [0])
    left = tmp_path / folder / ".000000000002-dead.arrow.0123456789ab"
    left.write_bytes(b"half")
    age(tmp_path)
    writer.compact()

    assert not left.exists()


def test_compaction_collects_also_when_there_is_nothing_to_fold(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, N, retention=Retention(0))
    commit(writer, [0])
    writer.compact()
    age(tmp_path)
    ScoreWriter(tmp_path, N, retention=Retention(0)).compact()  # one that has not seen for how long nobody needs them

    assert names(tmp_path, "fragments") == set()
    assert read(tmp_path).keys() == {0}


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
    writer, reader = ScoreWriter(tmp_path, N, retention=Retention(0)), ScoreReader(tmp_path)
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
            age(tmp_path)
            writer.compact()
    done.set()
    thread.join(30)

    assert failures == []
    versions = [version for version, _, _ in seen]
    assert versions == sorted(versions)
    assert len(set(versions)) > 2
    assert versions[-1] == 60
    assert all((found, rows) == (({version}, N) if version else (set(), 0)) for version, found, rows in seen)


# Any interleaving, against a dict


ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 2), st.sampled_from([0.0, 1.0])), min_size=1, max_size=4)


class AgainstADict(RuleBasedStateMachine):
    """The store's model: rows in order of appending; a row wins unless the one it meets has a higher model_version."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.uri = Path(self._folder.name)
        self.writer = self.open()
        self.reader = ScoreReader(self.uri)
        self.pending: list[tuple[int, int, float]] = []
        self.rows: dict[tuple[int, int], float] = {}  # (sample_id, model_version) -> margin, of all that is committed
        self.history: list[Latest] = [{}]  # by store version
        self.seen = 0

    def open(self) -> ScoreWriter:
        return ScoreWriter(self.uri, 2, retention=Retention(keep_all=True), grace_s=0.0)

    def teardown(self) -> None:
        self._folder.cleanup()

    @rule(rows=ROWS)
    def append(self, rows: list[tuple[int, int, float]]) -> None:
        ids, versions, margins = zip(*rows, strict=True)
        self.writer.append(make_rows(ids, np.array(versions), margin=np.array(margins)))
        self.pending += rows

    @rule(rows=ROWS)
    def append_and_commit(self, rows: list[tuple[int, int, float]]) -> None:
        self.append(rows)
        self.commit()

    @rule()
    def commit(self) -> None:
        before, now = self.history[-1], dict(self.history[-1])
        for sample_id, version, margin in self.pending:
            if version >= now.get(sample_id, (0,))[0]:
                now[sample_id] = (version, margin)
        known = all(before.get(row[0]) == row[1:] for row in self.pending)
        version = self.writer.commit()

        assert version - len(self.history) + 1 in ((0,) if known else (1,) if now != before else (0, 1))
        if version == len(self.history):
            self.history.append(now)
        self.rows |= {row[:2]: row[2] for row in self.pending}
        self.pending = []
        self.check()

    @rule()
    def reopen(self) -> None:
        """A successor; what the old writer had not committed is lost with it."""
        old, self.writer = self.writer, self.open()
        if self.pending and any(self.history[-1].get(row[0]) != row[1:] for row in self.pending):
            with pytest.raises(Fenced):
                old.commit()
        self.pending = []
        self.check()

    @rule()
    def compact(self) -> None:
        self.writer.compact()
        self.check()

    @rule()
    def refresh(self) -> None:
        self.seen = self.reader.refresh()

        assert self.seen == len(self.history) - 1

    @invariant()
    def reader_is_at_the_version_it_last_saw(self) -> None:
        assert latest(self.reader.table()) == self.history[self.seen]

    def check(self) -> None:
        """A new reader agrees with the model at every version."""
        reader = ScoreReader(self.uri)
        for version, expected in enumerate(self.history):
            assert latest(reader.table(version)) == expected
            changes = latest(reader.changes(version))
            assert changes.items() <= self.history[-1].items()
            assert changes.items() >= self.history[-1].items() - expected.items()
        for sample_id in (0, 1):
            rows = reader.history(sample_id)
            expected = {version: margin for (i, version), margin in sorted(self.rows.items()) if i == sample_id}
            assert dict(zip(rows["model_version"].to_pylist(), rows["margin"].to_pylist(), strict=True)) == expected
            assert rows["model_version"].to_pylist() == list(expected)


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(
    max_examples=15,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
