"""Answers about difficulty, computed by hand from a small store and its checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from services.queries import Difficulty
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import Images
from shared.errors import ConfigError, DataError, StoreError
from shared.measures import MEASURES
from shared.score_store import ScoreReader, ScoreWriter
from tests.rows import SCORED_AT, make_rows

SAMPLES = 6
GAPS = [  # with their clean losses, of samples 0, 1 and 2 below
    (math.log1p(math.exp(margin)) * (math.exp(log_ratio) - 1), math.log1p(math.exp(margin)))
    for margin, log_ratio in ((0.0, 0.5), (-1.0, 2.0), (3.0, 1.0))
]
MEAN_LOSS = sum(loss for _, loss in GAPS) / 3


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Six samples with labels 0, 1, 2, 0, 1, 2; nothing scored."""
    images = Images(np.zeros((SAMPLES, 1, 2, 2), np.uint8), np.arange(SAMPLES) % 3, white=1, num_classes=3)
    return Run.create(tmp_path / "run", dataset_fingerprint="f", train=images, config={}, scoring_id="s")


def publish(run: Run, versions: int) -> None:
    """Checkpoint v is step 10 v."""
    with CheckpointPublisher(run.path) as publisher:
        for version in range(1, versions + 1):
            publisher.publish(nn.Linear(1, 1), 10 * version)
            publisher.flush()


def commit(run: Run, *tables: Any, **metadata: Any) -> None:
    with ScoreWriter(run.scores_uri, SAMPLES, scoring_id="s") as writer:
        for table in tables:
            writer.append(table)
        writer.commit(metadata)


@pytest.fixture
def filled(run: Run) -> Difficulty:
    """Samples 0..2 at version 2, 3 and 4 at version 1, 5 unscored; the newest checkpoint is version 6."""
    publish(run, 6)
    log_ratio, margin = np.array([0.5, 2.0, 1.0]), np.array([0.0, -1.0, 3.0])
    new = make_rows([0, 1, 2], 2, log_ratio=log_ratio, margin=margin, grad_norm=0.25, el2n=0.75)
    old = make_rows([4, 3], 1, log_ratio=np.array([9.0, 9.0]), predicted=2, correct=False)
    commit(run, old, new, model_versions_scored=2)
    return Difficulty(run)


def test_scores_are_columns_in_the_order_asked(filled):
    answer = filled.scores([5, 1, 3, 0, 1])

    assert {
        "measure": "adm",
        "meaning": "higher is more difficult: fragile relative to its own loss",
        "store_version": 1,
        "newest_model_version": 6,
        "staleness_bound": 4,
        "sample_id": [5, 1, 3, 0, 1],
        "value": pytest.approx([None, math.tanh(1.0), math.tanh(4.5), math.tanh(0.25), math.tanh(1.0)]),
        "percentile": pytest.approx([None, 5 / 6, 1 / 2, 1 / 6, 5 / 6]),
        "status": ["unscored", "fresh", "stale", "fresh", "fresh"],
        "age_versions": [None, 4, 5, 4, 4],
        "age_steps": [None, 40, 50, 40, 40],
        "model_version": [None, 2, 1, 2, 2],
        "step": [None, 20, 10, 20, 20],
    } == answer


@pytest.mark.parametrize(
    ("measure", "values"),
    [
        ("adm", [math.tanh(0.25), math.tanh(1.0), math.tanh(0.5)]),
        ("loss", [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(3))]),
        ("margin", [0.0, -1.0, 3.0]),
        ("log_ratio", [0.5, 2.0, 1.0]),
        ("adm_by_clean", [math.exp(0.5) - 1, math.exp(2) - 1, math.exp(1) - 1]),
        ("adm_by_adversarial", [1 - math.exp(-0.5), 1 - math.exp(-2), 1 - math.exp(-1)]),
        ("gap", [gap for gap, _ in GAPS]),
        ("gap_by_batch", [gap / MEAN_LOSS for gap, _ in GAPS]),
        ("gap_by_dataset", [gap / MEAN_LOSS for gap, _ in GAPS]),
        ("confidence", [0.5, 1 / (1 + math.e), 1 / (1 + math.exp(-3))]),
        ("robust_margin", [0.5] * 3),
        ("grad_norm", [0.25] * 3),
        ("el2n", [0.75] * 3),
    ],
)
def test_each_measure_shows_its_values(filled, measure, values):
    answer = filled.scores([0, 1, 2], measure)

    assert pytest.approx(values, rel=1e-6) == answer["value"]
    assert measure == answer["measure"]


def test_percentiles_follow_the_measure_and_the_store(filled):
    """And stay among the rows of one model_version."""
    assert pytest.approx([1 / 2, 1 / 6, 5 / 6]) == filled.scores([0, 1, 2], "loss")["percentile"]
    commit(filled.run, make_rows([0], 3, margin=-9.0))

    assert pytest.approx([1 / 2, 1 / 4, 3 / 4]) == filled.scores([0, 1, 2], "loss")["percentile"]


def test_instability_counts_from_when_it_was_first_asked(filled):
    """Sample 1's label goes from probability 1 / (1 + e^-1) to 1/2; the others have had one version."""
    first = filled.scores([0, 1, 5], "instability")
    commit(filled.run, make_rows([1], 3, margin=0.0))
    second = filled.scores([0, 1, 5], "instability")
    change = 1 / (1 + math.exp(-1)) - 1 / 2

    assert (first["value"], first["percentile"]) == ([None] * 3, [None] * 3)
    assert second["value"] == [None, pytest.approx(change, rel=1e-6), None]
    assert second["percentile"] == [None, 1 / 2, None]
    assert filled.sample(1)["measures"]["instability"] == pytest.approx(change, rel=1e-6)
    assert filled.scores([1], "instability")["value"] == second["value"][1:2]


def test_answers_have_no_infinities(run):
    """A clean margin of -5000, such as of a net whose logits have run away, goes through JSON like any other."""
    commit(run, make_rows([0, 1], 1, margin=np.array([-5000.0, 4.0]), log_ratio=np.array([5001.4, -5001.4])))
    difficulty = Difficulty(run)

    for sample_id in (0, 1):
        json.dumps(difficulty.sample(sample_id), allow_nan=False, default=str)


@pytest.mark.parametrize(("bound", "status"), [(3, "stale"), (4, "fresh"), (5, "fresh")])
def test_the_bound_is_the_one_that_the_controller_committed(run, bound, status):
    publish(run, 5)
    commit(run, make_rows([0], 1), staleness_bound=bound)
    answer = Difficulty(run).scores([0])

    assert ([4], [status], bound) == (answer["age_versions"], answer["status"], answer["staleness_bound"])


def test_ages_are_never_below_zero(run):
    """Rows of a checkpoint that is not there any more, or whose folder cannot be seen."""
    commit(run, make_rows([0], 7))
    answer = Difficulty(run).scores([0])

    assert (answer["age_versions"], answer["age_steps"], answer["status"]) == ([0], [0], ["fresh"])


def test_a_sample_answers_with_every_measure(filled):
    answer = filled.sample(1)

    assert answer["measures"].pop("instability") is None
    assert {
        "adm": math.tanh(1.0),
        "log_ratio": 2.0,
        "adm_by_clean": math.exp(2) - 1,
        "adm_by_adversarial": 1 - math.exp(-2),
        "gap": GAPS[1][0],
        "gap_by_batch": GAPS[1][0] / MEAN_LOSS,
        "gap_by_dataset": GAPS[1][0] / MEAN_LOSS,
        "loss": math.log1p(math.exp(-1)),
        "margin": -1.0,
        "confidence": 1 / (1 + math.e),
        "robust_margin": 0.5,
        "grad_norm": 0.25,
        "el2n": 0.75,
    } == pytest.approx(answer["measures"], rel=1e-6)
    facts = ("sample_id", "key", "label", "status", "age_versions", "model_version", "predicted", "correct", "robust")

    assert tuple(answer[fact] for fact in facts) == (1, "1", 1, "fresh", 4, 2, 0, True, False)
    assert answer["value"] == answer["measures"]["adm"]


def test_an_unscored_sample_has_nulls(filled):
    answer = filled.sample(5)
    empty = ("value", "percentile", "age_versions", "age_steps", "model_version", "step", "measures", "predicted")

    assert [None] * len(empty) == [answer[name] for name in empty]
    assert (answer["status"], answer["label"], answer["correct"]) == ("unscored", 2, None)


def test_an_answer_about_a_sample_belongs_to_one_store_version(run):
    """Also when a commit comes while it is put together."""
    publish(run, 1)
    commit(run, make_rows([0], 1, log_ratio=1.0, predicted=0))

    class Overtaken(Difficulty):
        def scores(self, *args: Any) -> dict[str, Any]:
            answer = super().scores(*args)
            commit(run, make_rows([0], 2, log_ratio=2.0, predicted=1))
            return answer

    answer = Overtaken(run).sample(0)

    assert answer["value"] == answer["measures"]["adm"]
    assert answer["model_version"] - 1 == answer["predicted"]


@pytest.mark.parametrize("ids", [[6], [0, -1]])
def test_an_unknown_id_is_refused(filled, ids):
    with pytest.raises(DataError, match=r"outside 0\.\.5"):
        filled.scores(ids)


def test_an_unknown_measure_is_refused(filled):
    with pytest.raises(ConfigError, match=f"no measure 'nice'; known: {', '.join(MEASURES)}"):
        filled.scores([0], "nice")


def test_no_ids_give_empty_columns(filled):
    answer = filled.scores([])

    assert [answer[name] for name in ("sample_id", "value", "status")] == [[]] * 3


def test_stats(filled):
    """Ages are 4, 4, 4, 5, 5."""
    stats = filled.stats()
    committed = ScoreReader(filled.run.scores_uri).committed_at.isoformat()

    assert {
        "run_id": "run",
        "num_samples": 6,
        "coverage": 5 / 6,
        "status": {"fresh": 3, "stale": 2, "unscored": 1},
        "age_versions_p50": 4.0,
        "age_versions_p95": 5.0,
        "staleness_bound": 4,
        "store_version": 1,
        "committed_at": committed,
        "scored_rows": 5,
        "newest_model_version": 6,
        "newest_step": 60,
        "model_versions_scored": 2,
        "quarantined_rows": 0,
        "reports": {},
        "fidelity": None,
        "attempts": 0,
        "training": None,
    } == stats
    assert committed > SCORED_AT.isoformat()


def test_stats_of_a_store_without_rows(run):
    commit(run)
    stats = Difficulty(run).stats()

    assert stats["status"] == {"fresh": 0, "stale": 0, "unscored": 6}
    assert tuple(
        stats[name]
        for name in ("coverage", "age_versions_p50", "age_versions_p95", "committed_at", "newest_model_version")
    ) == (0.0, None, None, None, 0)


def test_checkpoints_are_listed_newest_first(run):
    publish(run, 3)
    found = Difficulty(run).checkpoints()

    assert [(c["model_version"], c["step"]) for c in found] == [(3, 30), (2, 20), (1, 10)]
    assert all(c["age_s"] >= 0 and c["bytes"] > 0 and len(c["sha256"]) == 64 for c in found)


def test_ready_once_scores_are_committed(run):
    difficulty = Difficulty(run)
    with pytest.raises(StoreError, match="no score store"):
        difficulty.refresh()

    assert "no score store" in difficulty.ready()
    commit(run)
    assert difficulty.ready() == "no scores are committed yet"
    commit(run, make_rows([0]))
    assert difficulty.ready() is None
