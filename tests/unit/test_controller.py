"""The controller on a real score store, driven by hand."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from services.config import ControllerConfig
from services.controller import Controller, Drain, Start
from shared.errors import ConfigError, Fenced, ServiceError, StoreMismatch
from shared.freshness import staleness_bound
from shared.schema import FLOAT_COLUMNS, QUARANTINE_SCHEMA
from shared.score_store import ScoreReader, ScoreWriter
from shared.store_files import StoreFiles
from tests.controllers import BLOCK, SAMPLES, controller_of, open_controller, score
from tests.raising import refuses
from tests.rows import make_rows
from tests.waiting import wait_for


def wait_until_committed(controller: Controller) -> None:
    wait_for(lambda: controller.status()["leased"] == 0, what="the commit of all leases")


def reader_of(run: Path) -> ScoreReader:
    return ScoreReader(run / "scores")


def test_submitted_rows_become_durable_and_their_leases_done(tmp_path):
    with controller_of(tmp_path) as controller:
        leases = [score(controller, 4) for _ in range(3)]
        wait_until_committed(controller)

        assert list(range(SAMPLES)) == sorted(np.concatenate([lease.sample_ids for lease in leases]).tolist())
        assert reader_of(tmp_path).dense("model_version").tolist() == [4] * SAMPLES
        assert reader_of(tmp_path).dense("step").tolist() == [40] * SAMPLES
        status = controller.status()
        assert tuple(
            status[key] for key in ("blocks", "oldest_block_version", "rows_received", "quarantined_rows")
        ) == (3, 4, SAMPLES, 0)
        assert controller.lease("a", 4) is None
        assert controller.lease("a", 5) is not None


def test_close_commits_what_came_in(tmp_path):
    """Also when the commit thread is pacing itself."""
    controller = open_controller(tmp_path, commit_interval_s=3600.0)
    score(controller, 1)
    wait_for(lambda: controller.status()["store_version"] == 1, what="the first commit")
    score(controller, 1)
    score(controller, 1)
    controller.close()

    assert reader_of(tmp_path).dense("model_version").tolist() == [1] * SAMPLES


def test_a_block_is_leased_to_one_scorer_and_free_after_release(tmp_path):
    with controller_of(tmp_path) as controller:
        leases = [controller.lease(scorer, 1) for scorer in ("a", "b", "a")]

        assert len({lease.block for lease in leases}) == 3
        assert controller.lease("b", 1) is None
        assert controller.release("a") == 2
        assert leases[0].block == controller.lease("b", 1).block


def test_rows_of_an_expired_lease_are_committed_all_the_same(tmp_path):
    with controller_of(tmp_path, block_size=SAMPLES, lease_timeout_s=0.01) as controller:
        late = controller.lease("a", 1)
        again = wait_for(lambda: controller.lease("b", 1), what="the end of the lease")
        controller.submit("a", late.lease_id, make_rows(late.sample_ids, 1, margin=-7.0))
        wait_for(lambda: controller.status()["store_version"], what="the commit")

        assert again.lease_id != late.lease_id
        assert reader_of(tmp_path).dense("margin").tolist() == [-7.0] * SAMPLES
        assert controller.status()["leases_expired"] >= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", FLOAT_COLUMNS)
def test_rows_that_are_not_finite_go_to_quarantine(tmp_path, column, value):
    with controller_of(tmp_path) as controller:
        lease = score(controller, 3, **{column: np.array([0.5, value])})
        wait_until_committed(controller)

        assert tuple(controller.status()[key] for key in ("quarantined_rows", "rows_received")) == (1, BLOCK)
    good, bad = lease.sample_ids.tolist()
    with open_quarantine(tmp_path) as rows:
        assert rows.schema == QUARANTINE_SCHEMA
        assert [(bad, 3, "a measured value is not finite")] == list(
            zip(*(rows.column(name).to_pylist() for name in ("sample_id", "model_version", "reason")), strict=True)
        )
        np.testing.assert_equal(rows.column(column).to_numpy(), np.array([value], dtype=np.float32))

    assert [good] == reader_of(tmp_path).table().column("sample_id").to_pylist()


@contextmanager
def open_quarantine(run: Path) -> Iterator[pa.Table]:
    yield pa.ipc.open_file((run / "quarantine.arrow").read_bytes()).read_all()


def test_a_block_without_one_finite_row_is_done_and_not_leased_for_ever(tmp_path):
    with controller_of(tmp_path, block_size=SAMPLES) as controller:
        score(controller, 1, log_ratio=np.nan)
        wait_until_committed(controller)

        assert controller.lease("a", 1) is None
        assert controller.status()["quarantined_rows"] == SAMPLES
        assert reader_of(tmp_path).table().num_rows == 0


def test_quarantine_survives_a_restart(tmp_path):
    for version in (1, 2):
        with controller_of(tmp_path) as controller:
            score(controller, version, el2n=np.array([np.nan, 1.0]))

            assert version == controller.status()["quarantined_rows"]
    with open_quarantine(tmp_path) as rows:
        assert rows.column("model_version").to_pylist() == [2]  # the latest of each sample; both are counted


@pytest.mark.parametrize(
    ("wanted", "alive", "decisions"),
    [
        (2, (), [Start(2)]),
        (2, ("a",), [Start(1)]),
        (2, ("a", "b"), []),
        (2, ("a", "b", "c", "d"), [Drain(("c", "d"))]),
        (0, ("a",), [Drain(("a",))]),
        (0, (), []),
    ],
)
def test_decisions_follow_wanted_and_alive(tmp_path, wanted, alive, decisions):
    with controller_of(tmp_path) as controller:
        controller.set_wanted(wanted)

        assert decisions == controller.decide(alive)


def test_decide_hands_back_the_leases_of_scorers_that_are_gone(tmp_path):
    with controller_of(tmp_path) as controller:
        for scorer in ("a", "b"):
            controller.register(scorer, 7)
            controller.lease(scorer, 1)
        controller.decide(("b",))

        assert controller.status()["leased"] == 1
        assert [scorer["scorer_id"] for scorer in controller.status()["scorers"]] == ["b"]


def test_status_knows_what_each_scorer_did(tmp_path):
    with controller_of(tmp_path) as controller:
        controller.register("a", 41)
        controller.register("b", 42)
        score(controller, 5)
        score(controller, 5)

        assert controller.status()["scorers"] == [
            {"scorer_id": "a", "pid": 41, "scored": 2 * BLOCK, "model_version": 5},
            {"scorer_id": "b", "pid": 42, "scored": 0, "model_version": 0},
        ]
        assert controller.status()["samples_per_second"] > 0


@pytest.mark.parametrize("replicas", [-1, 1025, 10**12])
def test_a_wanted_number_out_of_range_is_refused(tmp_path, replicas):
    with controller_of(tmp_path) as controller:
        with refuses(ConfigError, "replicas", replicas):
            controller.set_wanted(replicas)

        assert controller.status()["wanted"] == 2
        controller.set_wanted(1024)
        assert controller.status()["wanted"] == 1024


def test_a_restarted_controller_goes_on_from_the_store(tmp_path):
    with controller_of(tmp_path) as controller:
        first = [score(controller, 1) for _ in range(3)]
        wait_until_committed(controller)
        newer = score(controller, 2)
    with controller_of(tmp_path) as controller:
        assert controller.status()["oldest_block_version"] == 1
        assert [first[1].block, first[2].block] == [controller.lease("a", 2).block for _ in range(2)]
        assert controller.lease("a", 2) is None
        assert newer.block == first[0].block


def test_a_restarted_controller_fences_the_one_before(tmp_path):
    old = open_controller(tmp_path)
    lease = old.lease("a", 1)
    with controller_of(tmp_path) as new:
        old.submit("a", lease.lease_id, make_rows(lease.sample_ids, 1))
        wait_for(lambda: old.status()["trouble"], what="the fence")

        for call in (
            lambda: old.lease("a", 1),
            lambda: old.submit("a", lease.lease_id, make_rows(lease.sample_ids, 1)),
            lambda: old.decide(()),
            old.close,
        ):
            with pytest.raises(ServiceError) as caught:
                call()
            assert isinstance(caught.value.__cause__, Fenced)
            assert "--resume" in caught.value.fix
        assert "--resume" in old.status()["trouble"]
        score(new, 2)
    assert {2} == set(reader_of(tmp_path).table().column("model_version").to_pylist())


def test_a_store_of_another_scoring_id_is_refused(tmp_path):
    open_controller(tmp_path).close()
    with refuses(StoreMismatch, value="scoring_id"):
        Controller(str(tmp_path), SAMPLES, "other", ControllerConfig())


@pytest.mark.parametrize(
    ("passes", "bound"),
    [
        ([(1, 1)], 4),
        ([(1, 1, 1)], 4),
        ([(1, 1, 2)], 4),
        ([(1, 2, 3)], 6),
        ([(1, 1, 1), (2, 5, 9)], 16),
        ([(1, 1, 1), (2, 5, 9), (10, 10, 10)], 4),
        ([(1, 1, 1), (2, 5, 9), (10, 20)], 16),
    ],
    ids=str,
)
def test_the_staleness_bound_is_two_passes_and_at_least_four_versions(tmp_path, passes, bound):
    """Each tuple is a pass: the versions at which its blocks are scored. A pass from 2 to 9 is 8 versions long."""
    with controller_of(tmp_path) as controller:
        for version in (version for versions in passes for version in versions):
            score(controller, version)
            wait_until_committed(controller)
    versions = {version for versions in passes for version in versions}
    metadata = reader_of(tmp_path).metadata

    assert bound == staleness_bound(metadata)
    assert max(versions) == metadata["newest_scored_version"]
    assert len(versions) == metadata["model_versions_scored"]


def test_pass_length_and_count_of_versions_survive_a_restart(tmp_path):
    for versions in ((1, 2, 3), (3, 4)):
        with controller_of(tmp_path) as controller:
            for version in versions:
                score(controller, version)
                wait_until_committed(controller)
    metadata = reader_of(tmp_path).metadata

    assert (
        staleness_bound(metadata),
        metadata["newest_scored_version"],
        metadata["model_versions_scored"],
    ) == (6, 4, 4)


def fails(method: Callable[..., Any], times: int, *, after: bool) -> Callable[..., Any]:
    """`method` on a disk that is full for a while: it raises before, or only after, it did its work."""
    left = [times]

    def failing(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            return method(*args)
        if after:
            method(*args)
        raise OSError(28, "No space left on device")

    return failing


@pytest.mark.parametrize(
    ("method", "after"),
    [("begin_part", False), ("begin_part", True), ("write_manifest", False), ("write_manifest", True)],
    ids=["fragment", "fragment begun", "manifest", "manifest written"],
)
def test_a_commit_that_fails_is_tried_again_and_loses_nothing(tmp_path, monkeypatch, method, after):
    with controller_of(tmp_path) as controller:
        monkeypatch.setattr(StoreFiles, method, fails(getattr(StoreFiles, method), 3, after=after))
        for margin in (1.0, 2.0, 3.0):
            score(controller, 1, margin=margin)
        wait_until_committed(controller)

        assert controller.status()["trouble"] is None
        assert controller.status()["oldest_block_version"] == 1
    reader = reader_of(tmp_path)

    assert sorted(reader.dense("margin").tolist()) == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert reader.rows == SAMPLES


def test_a_failing_commit_shows_in_the_status(tmp_path, monkeypatch):
    """Leases go on meanwhile."""
    full = threading.Event()
    full.set()
    begin_part = StoreFiles.begin_part

    def part(*args: Any) -> Any:
        if full.is_set():
            raise OSError(28, "No space left on device")
        return begin_part(*args)

    monkeypatch.setattr(StoreFiles, "begin_part", part)
    with controller_of(tmp_path) as controller:
        score(controller, 1)
        failure = wait_for(lambda: controller.status()["trouble"], what="the failure")
        score(controller, 1)
        full.clear()
        wait_until_committed(controller)

        assert "No space left" in failure
        assert controller.status()["trouble"] is None


def test_rows_that_come_in_during_a_commit_are_in_the_metadata_too(tmp_path, monkeypatch):
    """Their fragment is that commit's or the next one's; what the store says of passes must cover them."""
    commit = ScoreWriter.commit
    with controller_of(tmp_path, block_size=3) as controller:
        second = []

        def busy_commit(writer: ScoreWriter, *args: Any) -> int:
            if not second:
                second.append(True)
                score(controller, 7)
            return commit(writer, *args)

        monkeypatch.setattr(ScoreWriter, "commit", busy_commit)
        score(controller, 3)
        wait_until_committed(controller)
    reader = reader_of(tmp_path)

    assert sorted(reader.dense("model_version").tolist()) == [3, 3, 3, 7, 7, 7]
    assert (
        reader.metadata["newest_scored_version"],
        reader.metadata["model_versions_scored"],
        staleness_bound(reader.metadata),
    ) == (7, 2, 10)
