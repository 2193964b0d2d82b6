"""What the controller tells people: reports, reasons of failed samples, events; and what a resumed run's hears."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from services.quarantine import QUARANTINE_FILE
from shared.attempts import begin
from shared.errors import Fenced, RunError, ServiceError
from shared.events import EVENTS_FILE, read_events
from shared.score_store import ScoreReader, ScoreWriter
from shared.store_files import StoreFiles
from tests.controllers import SAMPLES, controller_of, open_controller, score
from tests.raising import refuses
from tests.rows import make_rows
from tests.waiting import wait_for


def metadata(run: Path) -> dict[str, Any]:
    return dict(ScoreReader(run / "scores").metadata)


def events(run: Path, *names: str) -> list[dict[str, Any]]:
    """Without their times."""
    return [
        {key: value for key, value in event.items() if key != "time"}
        for event in read_events(run)
        if event["event"] in names
    ]


def test_reports_are_counted_by_name_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with controller_of(tmp_path) as controller:
        controller.report("a", "checkpoint_skipped", "v7 does not match its checksum")
        controller.report("b", "checkpoint_skipped", "v8 is missing")
        controller.report("a", "batch_halved", "out of memory at 256")

        assert controller.status()["reports"] == {"checkpoint_skipped": 2, "batch_halved": 1}
    assert metadata(tmp_path)["reports"] == {"checkpoint_skipped": 2, "batch_halved": 1}
    assert events(tmp_path, "checkpoint_skipped", "batch_halved") == [
        {"event": "checkpoint_skipped", "scorer_id": "a", "detail": "v7 does not match its checksum"},
        {"event": "checkpoint_skipped", "scorer_id": "b", "detail": "v8 is missing"},
        {"event": "batch_halved", "scorer_id": "a", "detail": "out of memory at 256"},
    ]
    assert "a: batch_halved: out of memory at 256" in caplog.text


def test_report_alone_is_committed_without_a_new_version(tmp_path: Path) -> None:
    with controller_of(tmp_path) as controller:
        controller.report("a", "batch_halved", "")
        wait_for(lambda: metadata(tmp_path).get("reports") == {"batch_halved": 1}, what="the commit")

        assert controller.status()["store_version"] == 0
    assert events(tmp_path, "committed") == []


def test_reports_survive_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        with controller_of(tmp_path) as controller:
            controller.report("a", "batch_halved", "")

    assert metadata(tmp_path)["reports"] == {"batch_halved": 2}


def test_failed_samples_go_to_quarantine_with_their_own_reasons(tmp_path: Path) -> None:
    with controller_of(tmp_path, block_size=SAMPLES) as controller:
        margins = np.array([np.nan, 1.0, np.nan, np.inf, 1.0, np.nan])
        ids = controller.lease("a", 3).sample_ids
        controller.release("a")
        failed = {int(ids[0]): "out of memory", int(ids[2]): "out of memory", int(ids[5]): "no image", 99: "unheard of"}
        score(controller, 3, failed, margin=margins)

        assert controller.status()["quarantined_rows"] == 4
    rows = pa.ipc.open_file((tmp_path / QUARANTINE_FILE).read_bytes()).read_all()
    expected = {
        int(ids[0]): "out of memory",
        int(ids[2]): "out of memory",
        int(ids[3]): "a measured value is not finite",
        int(ids[5]): "no image",
    }

    assert expected == dict(zip(rows.column("sample_id").to_pylist(), rows.column("reason").to_pylist(), strict=True))
    assert {event["reason"]: event["rows"] for event in events(tmp_path, "quarantine")} == {
        "out of memory": 2,
        "a measured value is not finite": 1,
        "no image": 1,
    }
    assert sorted(ids[[1, 4]].tolist()) == ScoreReader(tmp_path / "scores").table().column("sample_id").to_pylist()


def test_commits_and_wishes_are_in_the_diary(tmp_path: Path) -> None:
    with controller_of(tmp_path) as controller:
        score(controller, 1)
        controller.flush()
        controller.set_wanted(5)
        score(controller, 1, margin=np.array([np.nan, 1.0]))
        controller.flush()
        controller.flush()

    assert events(tmp_path, "committed", "scaled") == [
        {"event": "committed", "store_version": 1, "commits": 1, "rows": 2},
        {"event": "scaled", "wanted": 5, "before": 2, "reason": "asked for"},
        {"event": "committed", "store_version": 2, "commits": 1, "rows": 1},
    ]


def test_diary_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).mkdir()
    with controller_of(tmp_path) as controller:
        controller.report("a", "batch_halved", "")
        controller.set_wanted(1)
        for _ in range(3):
            score(controller, 1)
        controller.flush()

    assert ScoreReader(tmp_path / "scores").dense("model_version").tolist() == [1] * SAMPLES


def test_flush_makes_durable_what_came_in(tmp_path: Path) -> None:
    """At once, however long the pace of commits; the leases are done."""
    with controller_of(tmp_path, commit_interval_s=3600.0) as controller:
        for version in (1, 2):
            for _ in range(3):
                score(controller, version)
            controller.flush()

            assert ScoreReader(tmp_path / "scores").dense("model_version").tolist() == [version] * SAMPLES
            assert controller.status()["leased"] == 0
            assert controller.lease("a", version) is None


def full(times: int, write: Callable[..., Any]) -> Callable[..., Any]:
    left = [times]

    def failing(*args: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        return write(*args)

    return failing


def test_flush_on_a_full_disk_raises_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = open_controller(tmp_path, commit_interval_s=3600.0)
    controller.report("a", "batch_halved", "")
    wait_for(lambda: metadata(tmp_path).get("reports"), what="the first commit, after which the thread paces itself")
    monkeypatch.setattr(StoreFiles, "begin_part", full(2, StoreFiles.begin_part))
    score(controller, 1)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            controller.flush()
    controller.flush()

    assert controller.status()["oldest_block_version"] == 0
    assert sorted(ScoreReader(tmp_path / "scores").dense("model_version").tolist()) == [-1] * 4 + [1] * 2
    controller.close()


def test_rows_of_a_failed_flush_are_committed_by_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rows of its own failed commits are: no later submit is needed, and the trouble shows."""
    with controller_of(tmp_path) as controller:
        monkeypatch.setattr(StoreFiles, "begin_part", full(1, StoreFiles.begin_part))
        with controller._lock:  # the thread sees the rows only after the flush
            score(controller, 1)
            with pytest.raises(OSError, match="No space left"):
                controller.flush()

        wait_for(lambda: controller.status()["store_version"] == 1, "the commit")


def test_flush_after_a_takeover_is_refused(tmp_path: Path) -> None:
    old = open_controller(tmp_path)
    with controller_of(tmp_path):
        score(old, 1)
        wait_for(lambda: old.status()["trouble"], what="the fence")

        with pytest.raises(ServiceError) as caught:
            old.flush()
    assert isinstance(caught.value.__cause__, Fenced)


def test_failing_commits_are_in_the_diary_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with controller_of(tmp_path) as controller:
        for version, times in ((1, 4), (2, 2)):
            monkeypatch.setattr(StoreFiles, "begin_part", full(times, StoreFiles.begin_part))
            score(controller, version)
            wait_for(lambda: controller.status()["leased"] == 0, what="the commit")

    assert [event["event"] for event in events(tmp_path, "committed", "commit_failed")] == [
        "commit_failed",
        "committed",
    ] * 2
    assert "No space left" in events(tmp_path, "commit_failed")[0]["reason"]


@pytest.mark.parametrize(
    ("forks", "leased"),
    [
        ([], [0, 1, 2]),
        ([(0, 1)], [0, 1, 2]),
        ([(0, 1), (2, 4)], [2, 0, 1]),
        ([(0, 1), (1, 4)], [1, 2, 0]),
        ([(0, 1), (0, 4)], [0, 1, 2]),
        ([(0, 1), (1, 3), (3, 4)], [1, 0, 2]),
    ],
    ids=["no attempts", "the first", "the newest left behind", "two left behind", "all left behind", "in the middle"],
)
def test_blocks_of_abandoned_versions_are_scored_first(
    tmp_path: Path, forks: list[tuple[int, int]], leased: list[int]
) -> None:
    """Blocks 0, 1, 2 hold scores of versions 1, 2, 3; the abandoned ones are as good as unscored."""
    with controller_of(tmp_path) as controller:
        leases = [controller.lease("a", 4) for _ in range(3)]
    with ScoreWriter(tmp_path / "scores", SAMPLES, scoring_id="id") as writer:
        for version, lease in enumerate(leases, 1):
            writer.append(make_rows(lease.sample_ids, version))
    for last_valid, first in forks:
        begin(tmp_path, fork_step=0, last_valid_version=last_valid, first_version=first)
    with controller_of(tmp_path) as controller:
        found = [controller.lease("a", 4).block for _ in range(3)]

    assert leased == found


def test_damaged_attempt_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "attempt-0001.json").write_text(json.dumps([]))

    with refuses(RunError, str(tmp_path / "train" / "attempt-0001.json")):
        open_controller(tmp_path)
