"""Audits: which samples, who scores them and when; fidelity by hand; and the controller's on a real score store."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import services.controller
from services.audit import Audit, fidelity
from services.config import ControllerConfig
from services.controller import Controller
from services.difficulty import Difficulty
from services.queries import stats
from shared.catalogue import Run
from shared.datasets import Images
from shared.errors import ConfigError
from shared.events import read_events
from shared.leases import AUDIT, Lease
from shared.score_store import ScoreReader
from shared.store_files import StoreFiles
from tests.raising import refuses
from tests.rows import make_rows
from tests.waiting import wait_for

SAMPLES, BLOCK, AUDITED = 300, 100, 128
STRANGE = -5  # no lease has this id
ONE_VERSION = np.zeros(10, dtype=np.int64)


def take(audit: Audit, version: int, *, scorer: str = "a", now: float = 0.0) -> Lease | None:
    return audit.lease(scorer, version, now, 10.0)


# -- fidelity ----------------------------------------------------------------------------------------------------------


def test_fidelity_of_one_swap_among_ten() -> None:
    """1 - 6 (1 + 1) / (10 (100 - 1))."""
    fresh = np.array([0.0, 1, 2, 3, 5, 4, 6, 7, 8, 9])

    assert fidelity(np.arange(10.0), ONE_VERSION, fresh) == pytest.approx(1 - 12 / 990)
    assert fidelity(np.arange(10.0), ONE_VERSION, -np.arange(10.0)) == pytest.approx(-1)


def test_fidelity_takes_percentiles_within_each_version() -> None:
    """Both versions have the percentiles .1 .3 .5 .7 .9: mean ranks 1.5, 3.5 ... against 1, 3 ... and 2, 4 ...: the
    centred products add to 80, their squares to 80 and 82.5. Raw values would give 0.64.
    """
    stored = np.array([1.0, 2, 3, 4, 5, 101, 102, 103, 104, 105])
    fresh = np.array([0.0, 2, 4, 6, 8, 1, 3, 5, 7, 9])

    assert fidelity(stored, np.repeat([1, 2], 5), fresh) == pytest.approx(math.sqrt(80 / 82.5))


def test_samples_that_are_not_audited_make_the_percentiles_fine() -> None:
    """No score has changed, and yet few rows to a version look like staleness, unless the others are ranked along."""
    rng = np.random.default_rng(1)
    value, version = rng.permutation(2000.0 * np.arange(1, 2001)), np.repeat(np.arange(1, 21), 100)
    order = rng.permutation(2000)  # the audited 100 come first
    stored, versions = value[order], version[order]
    fresh = stored[:100]

    assert fidelity(stored, versions, fresh) > 0.97
    assert fidelity(stored[:100], versions[:100], fresh) < 0.93


def test_fidelity_is_spearmans_correlation_at_one_version() -> None:
    rng = np.random.default_rng(0)
    stored, fresh = rng.integers(0, 20, 200).astype(float), rng.integers(0, 20, 200).astype(float)
    fresh += stored / 2

    assert fidelity(stored, np.full(200, 4), fresh) == pytest.approx(spearmanr(stored, fresh).statistic)


def test_samples_without_both_values_do_not_count() -> None:
    stored = np.append(np.arange(10.0), [np.nan, 3.0, np.inf, 0.0])
    versions = np.append(np.ones(10, dtype=np.int64), [-1, -1, 1, 1])
    fresh = np.append(np.array([0.0, 1, 2, 3, 5, 4, 6, 7, 8, 9]), [1.0, 99.0, 1.0, np.nan])

    assert fidelity(stored, versions, fresh) == pytest.approx(1 - 12 / 990)


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        (np.arange(9.0), np.arange(9.0)),
        (np.append(np.arange(9.0), np.nan), np.arange(10.0)),
        (np.ones(10), np.arange(10.0)),
        (np.arange(10.0), np.ones(10)),
        (np.zeros(0), np.zeros(0)),
    ],
    ids=["nine", "nine with values", "stored all equal", "fresh all equal", "none"],
)
def test_too_little_to_compare_gives_none(stored: np.ndarray, fresh: np.ndarray) -> None:
    assert fidelity(stored, np.ones(len(stored), dtype=np.int64), fresh) is None


# -- which samples, and leases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "share", "audited"),
    [(100, 0.01, 100), (128, 0.5, 128), (1000, 0.01, 128), (50_000, 0.01, 500), (300, 1.0, 300), (1000, 0.0, 0)],
)
def test_size_of_the_audit_set(samples: int, share: float, audited: int) -> None:
    ids = Audit(samples, share).ids

    assert audited == len(ids) == len(set(ids.tolist()))
    assert set(ids.tolist()) <= set(range(samples))


def test_audit_set_depends_on_the_seed_alone_and_is_no_beginning_of_the_blocks_order() -> None:
    """Else all audit samples would lie in one block, and be of one age."""
    first, again, other = (Audit(1000, 0.2, seed).ids.tolist() for seed in (3, 3, 4))

    assert first == again
    assert first != other
    assert first != sorted(np.random.default_rng(3).permutation(1000)[:200].tolist())


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_share_outside_zero_to_one_is_refused(share: float) -> None:
    with refuses(ConfigError, "share", share):
        Audit(10, share)
    with pytest.raises(ValueError, match="audit_share"):
        ControllerConfig(audit_share=share)


def test_one_scorer_audits_a_version() -> None:
    audit = Audit(SAMPLES, 0.01)
    lease = take(audit, 3)

    assert (lease.block, lease.sample_ids.tolist()) == (AUDIT, audit.ids.tolist())
    assert [take(audit, version, scorer="b") for version in (2, 3)] == [None, None]
    assert audit.submitted(lease.lease_id, lease.sample_ids, 3, is_block=False)
    assert [take(audit, version, scorer="b") for version in (2, 3)] == [None, None]
    assert take(audit, 4, scorer="b") is not None


def test_newer_version_does_not_wait_for_the_audit_of_an_older_one() -> None:
    audit = Audit(SAMPLES, 0.01)
    slow = take(audit, 3, scorer="slow")

    assert take(audit, 4, scorer="slow") is None  # it may yet score its lease with version 4
    newer = take(audit, 4, scorer="b")
    assert audit.submitted(newer.lease_id, newer.sample_ids, 4, is_block=False)
    assert audit.submitted(slow.lease_id, slow.sample_ids, 3, is_block=False)
    assert take(audit, 4, scorer="slow") is None


def test_audit_is_of_the_version_that_the_rows_have() -> None:
    """The scorer found newer weights between lease and scoring."""
    audit = Audit(SAMPLES, 0.01)
    lease = take(audit, 3)
    audit.submitted(lease.lease_id, lease.sample_ids, 5, is_block=False)

    assert take(audit, 5) is None
    assert take(audit, 6) is not None


def test_released_audit_is_free_again() -> None:
    audit = Audit(SAMPLES, 0.01)
    take(audit, 3)

    assert (audit.release("b"), audit.release("a"), audit.release("a")) == (0, 1, 0)
    assert take(audit, 3, scorer="b") is not None


def test_expired_audit_is_free_again_and_counted() -> None:
    audit = Audit(SAMPLES, 0.01)
    late = take(audit, 3)

    assert take(audit, 3, scorer="b", now=10.0) is None
    assert take(audit, 3, scorer="b", now=10.1) is not None
    assert audit.expired == 1
    assert audit.submitted(late.lease_id, late.sample_ids, 3, is_block=False)
    assert take(audit, 3, scorer="c", now=99.0) is None


def test_rows_of_an_unknown_lease_are_an_audits_by_their_samples() -> None:
    audit = Audit(SAMPLES, 0.01)
    ids = audit.ids

    assert audit.submitted(STRANGE, ids[::-1].copy(), 1, is_block=False)
    assert not audit.submitted(STRANGE, ids, 1, is_block=True)
    assert not audit.submitted(STRANGE, ids[1:], 1, is_block=False)
    assert not Audit(SAMPLES, 0.0).submitted(STRANGE, ids[:0], 1, is_block=False)


def test_notes_are_running_numbers_that_an_earlier_life_hands_on() -> None:
    audit = Audit(SAMPLES, 0.01)
    assert audit.notes() is None
    audit.compared(2, 0.5)
    audit.compared(3, None)
    audit.compared(4, 0.9)
    assert audit.notes() == pytest.approx({"latest": 0.9, "mean": 0.7, "min": 0.5, "count": 2, "model_version": 4})
    later = Audit(SAMPLES, 0.01, notes=audit.notes())
    later.compared(5, 0.1)

    assert later.notes() == pytest.approx({"latest": 0.1, "mean": 0.5, "min": 0.1, "count": 3, "model_version": 5})
    assert take(Audit(SAMPLES, 0.01, notes=later.notes()), 5) is None


# -- the controller ----------------------------------------------------------------------------------------------------


@contextmanager
def controller_of(run: Path, **settings: Any) -> Iterator[Controller]:
    config = ControllerConfig(**({"block_size": BLOCK, "commit_interval_s": 0.01} | settings))
    controller = Controller(str(run), SAMPLES, "id", config)
    try:
        yield controller
    finally:
        controller.close()


def hand_in(controller: Controller, lease: Lease, version: int, **columns: Any) -> None:
    """Rows whose log_ratio is the sample_id unless given."""
    log_ratio = {"log_ratio": lease.sample_ids.astype(float)} | columns
    controller.submit("a", lease.lease_id, make_rows(lease.sample_ids, version, **log_ratio))


def score_blocks(controller: Controller, version: int, scorer: str = "a") -> list[int]:
    """Score, as `scorer`, all blocks that can be had; the blocks."""
    blocks = []
    while lease := controller.lease(scorer, version):
        blocks.append(lease.block)
        hand_in(controller, lease, version)
    controller.flush()
    return blocks


def test_audit_comes_first_at_each_version_but_the_first_and_only_once(tmp_path: Path) -> None:
    with controller_of(tmp_path) as controller:
        blocks = [score_blocks(controller, version) for version in (1, 2, 2, 3)]

    assert blocks == [[0, 1, 2], [AUDIT, 0, 1, 2], [], [AUDIT, 0, 1, 2]]


def test_no_audit_at_a_version_that_began_before_there_was_anything_to_compare(tmp_path: Path) -> None:
    """Its rows are in the store by the time a second scorer comes."""
    with controller_of(tmp_path) as controller:
        hand_in(controller, controller.lease("a", 1), 1)
        controller.flush()

        assert controller.lease("b", 1).block != AUDIT
    with controller_of(tmp_path) as controller:
        assert controller.lease("b", 1).block != AUDIT


def test_share_of_zero_audits_nothing(tmp_path: Path) -> None:
    with controller_of(tmp_path, audit_share=0) as controller:
        assert [score_blocks(controller, version) for version in (1, 2)] == [[0, 1, 2]] * 2
        assert (controller.status()["fidelity"], controller.status()["audited_rows"]) == (None, 0)
    assert "fidelity" not in ScoreReader(tmp_path / "scores").metadata


def test_fidelity_of_an_audit_and_its_line_in_the_diary(tmp_path: Path) -> None:
    """The store ranks by sample_id; of the fresh values, the lowest and the second are swapped."""
    with controller_of(tmp_path) as controller:
        score_blocks(controller, 1)
        audit = controller.lease("a", 2)
        fresh = np.arange(float(AUDITED))
        fresh[:2] = [1, 0]
        hand_in(controller, audit, 2, log_ratio=fresh)
        expected = 1 - 6 * 2 / (AUDITED * (AUDITED**2 - 1))
        notes = {
            "latest": expected,
            "mean": expected,
            "min": expected,
            "count": 1,
            "model_version": 2,
            "measure": "adm",
        }

        assert controller.status()["fidelity"] == pytest.approx(notes)
    assert ScoreReader(tmp_path / "scores").metadata["fidelity"] == pytest.approx(notes)
    (event,) = [event for event in read_events(tmp_path) if event["event"] == "audited"]
    assert event | {"model_version": 2, "fidelity": pytest.approx(expected), "samples": AUDITED} == event


def test_audit_compares_with_what_the_store_holds_by_then(tmp_path: Path) -> None:
    """The order turns round at version 2, and the store has turned with it by the audit of version 3."""
    found = []
    with controller_of(tmp_path, block_size=SAMPLES) as controller:
        score_blocks(controller, 1)
        for version in (2, 3):
            for _ in ("audit", "block"):
                lease = controller.lease("a", version)
                hand_in(controller, lease, version, log_ratio=-lease.sample_ids.astype(float))
            controller.flush()
            found.append(controller.status()["fidelity"]["latest"])

    assert found == pytest.approx([-1, 1])


def test_audit_rows_count_as_work_and_do_not_enter_the_store(tmp_path: Path) -> None:
    with controller_of(tmp_path) as controller:
        score_blocks(controller, 1)
        hand_in(controller, controller.lease("a", 2), 2, margin=-7.0)
        controller.flush()
        status = controller.status()
    reader = ScoreReader(tmp_path / "scores")

    assert (status["audited_rows"], status["rows_received"], status["leased"]) == (AUDITED, SAMPLES + AUDITED, 0)
    assert status["scorers"][0]["scored"] == SAMPLES + AUDITED
    assert reader.rows == SAMPLES
    assert reader.dense("model_version").tolist() == [1] * SAMPLES
    assert reader.metadata["newest_scored_version"] == 1


def test_audit_rows_that_are_not_finite_are_left_out_and_counted_nowhere(tmp_path: Path) -> None:
    with controller_of(tmp_path) as controller:
        score_blocks(controller, 1)
        audit = controller.lease("a", 2)
        margin, log_ratio = np.full(AUDITED, -1.0), audit.sample_ids.astype(float)
        margin[3], log_ratio[3], log_ratio[5] = np.nan, 1e9, np.inf
        hand_in(controller, audit, 2, margin=margin, log_ratio=log_ratio)

        assert controller.status()["quarantined_rows"] == 0
        assert controller.status()["fidelity"]["latest"] == pytest.approx(1)
    assert [event["samples"] for event in read_events(tmp_path) if event["event"] == "audited"] == [AUDITED - 2]


def test_release_expiry_and_the_end_of_a_scorer_free_its_audit(tmp_path: Path) -> None:
    with controller_of(tmp_path) as controller:
        score_blocks(controller, 1)
        blocks = [controller.lease("a", 2).block]
        blocks.append(controller.lease("b", 2).block)
        assert controller.release("a") == 1
        blocks.append(controller.lease("c", 2).block)
        controller.decide(("b",))
        blocks.append(controller.lease("d", 2).block)

    assert blocks == [AUDIT, 0, AUDIT, AUDIT]
    with controller_of(tmp_path, lease_timeout_s=0.01, block_size=SAMPLES) as controller:
        assert controller.lease("a", 2).block == AUDIT
        wait_for(lambda: (lease := controller.lease("b", 2)) and lease.block == AUDIT, what="the end of the lease")
        assert controller.status()["leases_expired"] >= 1


def test_deadline_of_an_audit_grows_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 samples in blocks of 32: four times as long as a block."""
    with controller_of(tmp_path, block_size=32, lease_timeout_s=10.0) as controller:
        score_blocks(controller, 1)
        now = [1e6]
        monkeypatch.setattr(services.controller.time, "monotonic", lambda: now[0])
        controller.lease("a", 2)
        now[0] += 39.0
        early = controller.lease("b", 2)
        now[0] += 2.0
        late = controller.lease("c", 2)
        monkeypatch.undo()

    assert (early.block, late.block) == (0, AUDIT)


def test_restarted_controller_knows_the_rows_of_an_audit_that_it_did_not_lease(tmp_path: Path) -> None:
    with controller_of(tmp_path) as controller:
        score_blocks(controller, 1)
        hand_in(controller, controller.lease("a", 2), 2)
        late = controller.lease("a", 3)
        assert late.block == AUDIT
    with controller_of(tmp_path) as controller:
        assert controller.status()["fidelity"]["count"] == 1
        hand_in(controller, late, 3, log_ratio=-late.sample_ids.astype(float))

        assert controller.lease("b", 3).block != AUDIT
        assert controller.status()["fidelity"] == pytest.approx(
            {"latest": -1, "mean": 0, "min": -1, "count": 2, "model_version": 3, "measure": "adm"}, abs=1e-12
        )
    assert ScoreReader(tmp_path / "scores").rows == SAMPLES


def test_second_audit_of_a_version_changes_nothing(tmp_path: Path) -> None:
    with controller_of(tmp_path) as controller:
        score_blocks(controller, 1)
        audit = controller.lease("a", 2)
        for sign in (1.0, -1.0):
            hand_in(controller, audit, 2, log_ratio=sign * audit.sample_ids)

        assert controller.status()["fidelity"]["count"] == 1
        assert controller.status()["audited_rows"] == 2 * AUDITED


def test_store_that_cannot_be_read_skips_the_audit_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with controller_of(tmp_path) as controller:
        score_blocks(controller, 1)
        audit = controller.lease("a", 2)
        with monkeypatch.context() as patch:
            patch.setattr(StoreFiles, "newest", unreadable)
            hand_in(controller, audit, 2)

        assert controller.status()["fidelity"] is None
        assert controller.status()["reports"] == {"audit_skipped": 1}
        assert score_blocks(controller, 2) == [0, 1, 2]
        hand_in(controller, controller.lease("a", 3), 3)
        assert controller.status()["fidelity"]["model_version"] == 3
    (event,) = [event for event in read_events(tmp_path) if event["event"] == "audit_skipped"]
    assert "version 2: the score store cannot be read: [Errno 5]" in event["detail"]


def test_lines_of_audits_are_paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One each second at most, here each hour; what was not told yet is told at the close."""
    monkeypatch.setattr(services.controller, "EVENT_INTERVAL_S", 3600.0)
    with controller_of(tmp_path) as controller:
        score_blocks(controller, 1)
        for version in (2, 3, 4):
            hand_in(controller, controller.lease("a", version), version)
        assert controller.status()["fidelity"]["count"] == 3
    told = [event["model_version"] for event in read_events(tmp_path) if event["event"] == "audited"]

    assert told == [2, 4]


@pytest.mark.parametrize(("measure", "fidelity_"), [("adm", 1), ("grad_norm", -1), ("instability", 1)])
def test_measure_that_is_compared(tmp_path: Path, measure: str, fidelity_: float) -> None:
    """One over versions has no value in a row alone: `adm` stands in."""
    controller = Controller(str(tmp_path), SAMPLES, "id", ControllerConfig(block_size=SAMPLES), measure=measure)
    block = controller.lease("a", 1)
    hand_in(controller, block, 1, grad_norm=block.sample_ids.astype(float))
    controller.flush()
    audit = controller.lease("a", 2)
    hand_in(controller, audit, 2, grad_norm=-audit.sample_ids.astype(float))
    found = controller.status()["fidelity"]["latest"]
    controller.close()

    assert found == pytest.approx(fidelity_)


def test_stats_show_fidelity(tmp_path: Path) -> None:
    images = Images(np.zeros((SAMPLES, 1, 2, 2), np.uint8), np.arange(SAMPLES) % 3, white=1, num_classes=3)
    run = Run.create(tmp_path / "run", dataset_fingerprint="f", train=images, config={}, scoring_id="id")
    with controller_of(run.path) as controller:
        score_blocks(controller, 1)
        before = stats(Difficulty(run).view())["fidelity"]
        score_blocks(controller, 2)
        after = stats(Difficulty(run).view())["fidelity"]

    assert before is None
    assert after == pytest.approx({"latest": 1, "mean": 1, "min": 1, "count": 1, "model_version": 2, "measure": "adm"})
