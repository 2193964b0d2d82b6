"""The list of samples that look mislabelled, computed by hand and from softmax itself."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from services.suspects import estimate, quality, suspects
from shared.errors import StoreMismatch
from shared.score_store import ScoreReader, ScoreWriter
from tests.raising import refuses
from tests.rows import make_rows

LABELS = [0, 1, 2, 0, 1, 2, 0, 1]
CLEAN = [1, 1, 0, 0, 1, None, 0, 0]


def make_samples(label: list[int], clean: list[int | None] | None = None) -> pa.Table:
    columns: dict[str, Any] = {
        "sample_id": np.arange(len(label)),
        "key": [f"image-{i}.png" for i in range(len(label))],
        "label": np.array(label),
    }
    if clean is not None:
        columns["clean_label"] = pa.array(clean, pa.int64())
    return pa.table(columns)


def make_store(folder: Path, samples: int, *tables: pa.Table) -> ScoreReader:
    with ScoreWriter(folder, samples) as writer:
        for table in tables:
            writer.append(table)
    return ScoreReader(folder)


@pytest.fixture
def filled(tmp_path: Path) -> ScoreReader:
    """Of three classes, so that below chance is a margin above ln 2 = 0.69; sample 7 is unscored.

    Of version 2: 0 and 3 are suspects, 2 is wrong but likelier than chance, 4 is right. Of version 1: 5 is a suspect.
    """
    margin, ratio = np.array([3.0, -2.0, 0.5, 2.0, 0.8]), np.array([0.5, 2.0, 1.0, 1.0, 1.0])
    new = make_rows(range(5), 2, margin=margin, log_ratio=ratio, predicted=np.array([1, 1, 0, 2, 1]))
    old = make_rows([6, 5], 1, margin=np.array([-1.0, 9.0]), predicted=0)
    return make_store(tmp_path, 8, old, new)


def test_suspects_disagree_below_chance_and_come_by_percentile_within_their_version(filled):
    """Sample 5 has the highest margin of all, but only the 0.75 quantile of its own model_version."""
    found = suspects(filled, make_samples(LABELS))

    assert found.to_pydict() == {
        "sample_id": [0, 5, 3],
        "key": ["image-0.png", "image-5.png", "image-3.png"],
        "label": [0, 2, 0],
        "predicted": [1, 0, 2],
        "loss": pytest.approx([math.log1p(math.exp(3)), math.log1p(math.exp(9)), math.log1p(math.exp(2))]),
        "margin": [3.0, 9.0, 2.0],
        "percentile": pytest.approx([0.9, 0.75, 0.7]),
        "adm": pytest.approx([math.tanh(0.25), math.tanh(0.5), math.tanh(0.5)]),
        "model_version": [2, 1, 2],
        "step": [20, 10, 20],
    }


def test_equal_percentiles_come_by_margin_then_by_id(tmp_path):
    rows = [
        make_rows([i], version, margin=margin, predicted=1) for i, version, margin in [(0, 1, 2), (2, 2, 4), (1, 3, 4)]
    ]
    reader = make_store(tmp_path, 3, *rows)

    assert suspects(reader, make_samples([0, 0, 0])).column("sample_id").to_pylist() == [1, 2, 0]


@pytest.mark.parametrize(("limit", "ids"), [(None, [0, 5, 3]), (9, [0, 5, 3]), (2, [0, 5]), (0, [])])
def test_limit_keeps_the_most_suspicious(filled, limit, ids):
    assert suspects(filled, make_samples(LABELS), limit).column("sample_id").to_pylist() == ids


def test_classes_that_only_predictions_speak_of_count(tmp_path):
    """Five classes: below chance is a margin above ln 4 = 1.39."""
    reader = make_store(
        tmp_path, 3, make_rows(range(3), margin=np.array([1.3, 1.4, 1.0]), predicted=np.array([1, 1, 4]))
    )

    assert suspects(reader, make_samples([0, 0, 0])).column("sample_id").to_pylist() == [1]


def test_suspects_are_those_that_softmax_itself_makes_them(tmp_path):
    rng = np.random.default_rng(0)
    logits_NK, label_N = rng.normal(0, 2, (400, 4)), rng.integers(0, 4, 400)
    p_N = (np.exp(logits_NK) / np.exp(logits_NK).sum(axis=1, keepdims=True))[np.arange(400), label_N]
    predicted_N = logits_NK.argmax(axis=1)
    rows = make_rows(range(400), margin=np.log((1 - p_N) / p_N), predicted=predicted_N, correct=predicted_N == label_N)
    found = suspects(make_store(tmp_path, 400, rows), make_samples(label_N.tolist()))
    expected = np.flatnonzero((predicted_N != label_N) & (p_N < 1 / 4))

    assert 100 < len(expected) < (predicted_N != label_N).sum()
    assert found.column("sample_id").to_pylist() == sorted(expected, key=lambda i: p_N[i])
    assert pytest.approx(-np.log(np.sort(p_N[expected])), rel=1e-5) == found.column("loss").to_pylist()


def test_clean_labels_are_shown_where_any_is_known(filled):
    known = suspects(filled, make_samples(LABELS, CLEAN))
    unknown = suspects(filled, make_samples(LABELS, [None] * 8))

    assert known.column("clean_label").to_pylist() == [1, None, 0]
    assert "clean_label" not in unknown.column_names


def test_estimate_is_the_share_of_suspects_among_the_scored(filled):
    assert estimate(filled, make_samples(LABELS)) == pytest.approx(3 / 7)


def test_nothing_scored_has_no_suspects_and_no_estimate(tmp_path):
    reader, samples = make_store(tmp_path, 2), make_samples([0, 1], [1, 1])

    assert suspects(reader, samples).num_rows == 0
    assert (estimate(reader, samples), quality(reader, samples)) == (None, None)


def test_one_class_has_no_suspects(tmp_path):
    assert suspects(make_store(tmp_path, 2, make_rows([0, 1], margin=-5.0)), make_samples([0, 0])).num_rows == 0


def test_quality_counts_scored_samples_whose_clean_label_is_known(filled):
    """0 and 2 are mislabelled; 0 and 3 are suspects.

    Percentiles 0.9 and 0.3 against 0.1, 0.7, 0.5 and 0.25 of the right ones: above in 4 + 2 of 8 pairs.
    """
    assert quality(filled, make_samples(LABELS, CLEAN)) == {
        "precision": 1 / 2,
        "recall": 1 / 2,
        "auc": 6 / 8,
        "mislabelled": 2,
        "known": 6,
    }


def test_equal_losses_count_half_in_the_auc(tmp_path):
    reader = make_store(tmp_path, 3, make_rows(range(3), margin=np.array([1.0, 1.0, -1.0]), predicted=1))

    assert quality(reader, make_samples([0, 0, 0], [1, 0, 0]))["auc"] == 3 / 4


@pytest.mark.parametrize(
    ("clean", "expected"),
    [([0, 0], (None, None, None)), ([1, 0], (None, 0.0, 0.5)), ([1, 1], (None, 0.0, None))],
    ids=["none mislabelled", "no suspects", "all mislabelled"],
)
def test_quality_that_is_not_defined_is_none(tmp_path, clean, expected):
    found = quality(make_store(tmp_path, 2, make_rows([0, 1])), make_samples([0, 0], clean))

    assert tuple(found[name] for name in ("precision", "recall", "auc")) == expected


@pytest.mark.parametrize("clean", [None, [None] * 8], ids=["no column", "all null"])
def test_quality_is_unknown_without_clean_labels(filled, clean):
    assert quality(filled, make_samples(LABELS, clean)) is None


def test_samples_of_another_run_are_refused(filled):
    with refuses(StoreMismatch, "samples", "3 samples for the 8"):
        suspects(filled, make_samples([0, 1, 2]))
