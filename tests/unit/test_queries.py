"""Answers about difficulty, computed by hand from a small store and its checkpoints."""

import json
import math
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from torch import nn

from services import difficulty as looking
from services import queries
from services.answers import Answer
from services.difficulty import Difficulty
from services.queries import Limits
from shared.attempts import begin
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import Images
from shared.errors import ConfigError, DataError, NoSuchVersion, RunError, StoreError, StoreMismatch
from shared.measures import MEASURES
from shared.schema import arrow_file
from shared.score_store import Retention, ScoreReader, ScoreWriter
from tests.raising import refuses
from tests.rows import SCORED_AT, make_rows
from tests.waiting import LIMIT_S, wait_for

SAMPLES = 6
GAPS = [  # with their clean losses, of samples 0, 1 and 2 below
    (math.log1p(math.exp(margin)) * (math.exp(log_ratio) - 1), math.log1p(math.exp(margin)))
    for margin, log_ratio in ((0.0, 0.5), (-1.0, 2.0), (3.0, 1.0))
]
MEAN_LOSS = sum(loss for _, loss in GAPS) / 3


@pytest.fixture(autouse=True)
def _looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(looking, "WAIT_AFTER_S", 0)


def plain(answer: Answer | dict[str, Any]) -> dict[str, Any]:
    """As a client gets it in JSON."""
    content = answer.json() if isinstance(answer, Answer) else answer
    found: dict[str, Any] = orjson.loads(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))
    return found


def scores(difficulty: Difficulty, ids: Any, measure: str = "adm", **limits: Any) -> dict[str, Any]:
    return plain(queries.scores(difficulty.view(), ids, measure, Limits(**limits)))


def sample(difficulty: Difficulty, sample_id: int, *arguments: Any) -> dict[str, Any]:
    return plain(queries.sample(difficulty.view(), sample_id, *arguments))


def stats(difficulty: Difficulty) -> dict[str, Any]:
    return plain(queries.stats(difficulty.view(), difficulty.last_epoch()))


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
    answer = scores(filled, [5, 1, 3, 0, 1])
    age_s = time.time() - SCORED_AT.timestamp()

    assert answer.pop("age_s") == [None, *[pytest.approx(age_s, abs=60)] * 4]
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
    answer = scores(filled, [0, 1, 2], measure)

    assert pytest.approx(values, rel=1e-6) == answer["value"]
    assert measure == answer["measure"]


def test_percentiles_follow_the_measure_and_the_store(filled):
    """And stay among the rows of one model_version."""
    assert pytest.approx([1 / 2, 1 / 6, 5 / 6]) == scores(filled, [0, 1, 2], "loss")["percentile"]
    commit(filled.run, make_rows([0], 3, margin=-9.0))

    assert pytest.approx([1 / 2, 1 / 4, 3 / 4]) == scores(filled, [0, 1, 2], "loss")["percentile"]


def test_instability_counts_from_when_it_was_first_asked(filled):
    """Sample 1's label goes from probability 1 / (1 + e^-1) to 1/2; the others have had one version."""
    first = scores(filled, [0, 1, 5], "instability")
    commit(filled.run, make_rows([1], 3, margin=0.0))
    second = scores(filled, [0, 1, 5], "instability")
    change = 1 / (1 + math.exp(-1)) - 1 / 2

    assert (first["value"], first["percentile"]) == ([None] * 3, [None] * 3)
    assert second["value"] == [None, pytest.approx(change, rel=1e-6), None]
    assert second["percentile"] == [None, 1 / 2, None]
    assert sample(filled, 1, "instability")["value"] == pytest.approx(change, rel=1e-6)
    assert scores(filled, [1], "instability")["value"] == second["value"][1:2]


def test_answers_have_no_infinities(run):
    """A clean margin of -5000, such as of a net whose logits have run away, goes through JSON like any other."""
    commit(run, make_rows([0, 1], 1, margin=np.array([-5000.0, 4.0]), log_ratio=np.array([5001.4, -5001.4])))
    difficulty = Difficulty(run)

    for sample_id in (0, 1):
        json.dumps(sample(difficulty, sample_id), allow_nan=False, default=str)


@pytest.mark.parametrize(("bound", "status"), [(3, "stale"), (4, "fresh"), (5, "fresh")])
def test_the_bound_is_the_one_that_the_controller_committed(run, bound, status):
    publish(run, 5)
    commit(run, make_rows([0], 1), staleness_bound=bound)
    answer = scores(Difficulty(run), [0])

    assert ([4], [status], bound) == (answer["age_versions"], answer["status"], answer["staleness_bound"])


def test_ages_are_never_below_zero(run):
    """Rows of a checkpoint that is not there any more, or whose folder cannot be seen."""
    commit(run, make_rows([0], 7))
    answer = scores(Difficulty(run), [0])

    assert (answer["age_versions"], answer["age_steps"], answer["status"]) == ([0], [0], ["fresh"])


def test_a_sample_answers_with_every_measure(filled):
    answer = sample(filled, 1)

    assert {
        "adm": math.tanh(1.0),
        "log_ratio": 2.0,
        "adm_by_clean": math.exp(2) - 1,
        "adm_by_adversarial": 1 - math.exp(-2),
        "gap": GAPS[1][0],
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
    answer = sample(filled, 5)
    empty = ("value", "percentile", "age_versions", "age_steps", "model_version", "step", "measures", "predicted")

    assert [None] * len(empty) == [answer[name] for name in empty]
    assert (answer["status"], answer["label"], answer["correct"]) == ("unscored", 2, None)


def test_an_answer_belongs_to_one_store_version(run):
    """Also when a commit comes while it is put together."""
    publish(run, 1)
    commit(run, make_rows([0, 1], 1, log_ratio=1.0, predicted=0))
    difficulty = Difficulty(run)
    view = difficulty.view()
    commit(run, make_rows([0, 1], 2, log_ratio=2.0, predicted=1))
    assert difficulty.view().reader.version == 2
    then, many = plain(queries.sample(view, 0)), plain(queries.scores(view, [0, 1]))

    assert (then["store_version"], then["model_version"], then["predicted"]) == (1, 1, 0)
    assert then["value"] == then["measures"]["adm"] == many["value"][1] == pytest.approx(math.tanh(0.5))
    assert sample(difficulty, 0)["predicted"] == 1


@pytest.mark.parametrize("ids", [[6], [0, -1]])
def test_an_unknown_id_is_refused(filled, ids):
    with refuses(DataError, "sample_id", f"{ids[-1]} is outside 0..5"):
        scores(filled, ids)


def test_an_unknown_measure_is_refused(filled):
    with refuses(ConfigError, "measure", "'nice'") as caught:
        scores(filled, [0], "nice")
    assert all(name in caught.value.fix for name in MEASURES)


def test_no_ids_give_empty_columns(filled):
    answer = scores(filled, [])

    assert [answer[name] for name in ("sample_id", "value", "status")] == [[]] * 3


def test_stats(filled):
    """Ages are 4, 4, 4, 5, 5."""
    found = stats(filled)
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
    } == found
    assert committed > SCORED_AT.isoformat()


def test_stats_of_a_store_without_rows(run):
    commit(run)
    found = stats(Difficulty(run))

    assert found["status"] == {"fresh": 0, "stale": 0, "unscored": 6}
    assert tuple(
        found[name]
        for name in ("coverage", "age_versions_p50", "age_versions_p95", "committed_at", "newest_model_version")
    ) == (0.0, None, None, None, 0)


def test_checkpoints_are_listed_newest_first(run):
    publish(run, 3)
    found = queries.checkpoints(run)

    assert [(c["model_version"], c["step"]) for c in found] == [(3, 30), (2, 20), (1, 10)]
    assert all(c["age_s"] >= 0 and c["bytes"] > 0 and len(c["sha256"]) == 64 for c in found)


def test_ready_once_scores_are_committed(run):
    difficulty = Difficulty(run)
    with refuses(StoreError, value=run.scores_uri):
        difficulty.view()

    assert str(run.scores_uri) in str(difficulty.missing())
    commit(run)
    assert difficulty.missing() == "no scores are committed yet"
    commit(run, make_rows([0]))
    assert difficulty.missing() is None


# -- limits on age -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "values", "status", "refused"),
    [
        ({"max_age_versions": 4}, [True, False, False], ["fresh", "stale", "unscored"], 1),
        ({"max_age_versions": 3}, [False, False, False], ["stale", "stale", "unscored"], 2),
        ({"max_age_versions": 5}, [True, True, False], ["fresh", "stale", "unscored"], 0),
        ({"max_age_s": 10.0}, [False, False, False], ["stale", "stale", "unscored"], 2),
        ({"max_age_s": 1e9}, [True, True, False], ["fresh", "stale", "unscored"], 0),
        ({"max_age_s": 10.0, "now": SCORED_AT.timestamp() + 9}, [True, True, False], ["fresh", "stale", "unscored"], 0),
        ({"max_age_s": 10.0, "now": SCORED_AT.timestamp() + 11}, [False] * 3, ["stale", "stale", "unscored"], 2),
    ],
    ids=str,
)
def test_older_scores_than_the_limits_are_refused(filled, limits, values, status, refused):
    """Samples 0 (4 versions old), 3 (5 versions old) and 5 (unscored)."""
    answer = scores(filled, [0, 3, 5], **limits)
    alone = [plain(queries.sample(filled.view(), i, "adm", Limits(**limits))) for i in (0, 3, 5)]

    assert [value is not None for value in answer["value"]] == values
    assert [value is not None for value in answer["percentile"]] == values
    assert (answer["status"], answer["refused"]) == (status, refused)
    for name in ("value", "percentile", "status", "age_versions", "model_version"):
        assert [one[name] for one in alone] == answer[name]
    for name in ("measures", "predicted", "correct", "robust"):
        assert [one[name] is not None for one in alone] == values
    assert "refused" not in scores(filled, [0])


def test_scores_of_abandoned_versions_are_stale_without_an_age_and_refused_by_any_age_in_versions(filled):
    begin(filled.run.path, fork_step=10, last_valid_version=1, first_version=3)  # version 2 is left behind
    with CheckpointPublisher(filled.run.path) as publisher:
        publisher.publish(nn.Linear(1, 1), 70)
    answer = scores(filled, [0, 3], max_age_versions=2**62)

    assert (answer["status"], answer["age_versions"], answer["age_steps"]) == (["stale"] * 2, [None, 5], [None, 60])
    assert [value is None for value in answer["value"]] == [True, False]
    assert plain(queries.history(filled.view(), 0))["abandoned"] == [True]


# -- lists -------------------------------------------------------------------------------------------------------------


def listed(difficulty: Difficulty, limit: int = 100, **chosen: Any) -> list[int]:
    """All pages' ids."""
    view = difficulty.view()
    cursor: queries.Cursor | None = queries.first_cursor(view, queries.Selection(**chosen))
    ids: list[int] = []
    while cursor is not None:
        answer, cursor = queries.page(view, cursor, limit)
        ids += plain(answer)["sample_id"]
    return ids


@pytest.mark.parametrize("limit", [1, 2, 100])
@pytest.mark.parametrize(
    ("chosen", "ids"),
    [
        ({}, [1, 2, 3, 4, 0, 5]),  # percentiles 5/6, 1/2, 1/2, 1/2, 1/6
        ({"order": "asc"}, [0, 2, 3, 4, 1, 5]),
        ({"measure": "loss"}, [2, 0, 3, 4, 1, 5]),
        ({"label": 0}, [3, 0]),
        ({"label": 9}, []),
        ({"status": "fresh"}, [1, 2, 0]),
        ({"status": "unscored"}, [5]),
        ({"status": "stale", "label": 1}, [4]),
        ({"max_age_versions": 4}, [1, 2, 0, 3, 4, 5]),  # refused ones are null and come last
        ({"max_age_versions": 4, "status": "stale"}, [3, 4]),
        ({"domain": "photo"}, []),
    ],
    ids=str,
)
def test_lists_go_by_percentile_then_id(filled, chosen, ids, limit):
    assert listed(filled, limit, **chosen) == ids


def test_pages_of_a_cursor_belong_to_one_version(filled):
    view = filled.view()
    answer, following = queries.page(view, queries.first_cursor(view, queries.Selection()), 2)
    publish(filled.run, 2)
    commit(filled.run, make_rows([5, 0], 8, log_ratio=7.0))
    assert filled.view().reader.version == 2
    cursor = queries.Cursor.parse(following.dump())
    then = filled.view_at(cursor.moment)  # made anew from the store
    rest, end = queries.page(then, cursor, 10)

    assert plain(answer)["sample_id"] + plain(rest)["sample_id"] == [1, 2, 3, 4, 0, 5]
    assert plain(rest)["status"] == ["stale", "stale", "fresh", "unscored"]
    assert (plain(rest)["store_version"], plain(rest)["newest_model_version"], end) == (1, 6, None)
    assert plain(rest)["age_steps"] == [50, 50, 40, None]
    assert filled.view_at(cursor.moment) is then


def test_a_cursor_whose_version_is_not_kept_any_more(filled):
    view = filled.view()
    _, following = queries.page(view, queries.first_cursor(view, queries.Selection()), 2)
    with ScoreWriter(filled.run.scores_uri, SAMPLES, scoring_id="s", retention=Retention(0), grace_s=0) as writer:
        for version in (2, 3):
            writer.append(make_rows([0], version, margin=0.5))
            writer.commit()
            writer.compact()

    with refuses(NoSuchVersion, value="version 1"):
        filled.view_at(following.moment)


@pytest.mark.parametrize("text", ["", "e30", "bm90IGpzb24", "eyJzdGFydCI6IC0xfQ", "\u2603", "a"])
def test_what_is_no_cursor_is_refused(text):
    with refuses(DataError, "cursor", repr(text)):
        queries.Cursor.parse(text)


def test_a_cursor_beside_other_parameters_is_refused(filled):
    cursor = queries.first_cursor(filled.view(), queries.Selection(label=1))
    cursor.check({"label": 1, "order": "desc"})

    with refuses(ConfigError, "cursor", "label, order"):
        cursor.check({"label": 2, "order": "asc", "measure": "adm"})


def test_a_view_that_is_made_anew_is_judged_as_it_was(filled):
    """Though bound and attempts have changed meanwhile, and its place was taken by views of other cursors."""
    view = filled.view()
    answer, following = queries.page(view, queries.first_cursor(view, queries.Selection(status="fresh")), 1)
    commit(filled.run, make_rows([5], 6), staleness_bound=9)
    begin(filled.run.path, fork_step=10, last_valid_version=1, first_version=7)
    assert filled.view().abandoned == ((2, 6),)
    rest, _ = queries.page(filled.view_at(following.moment), following, 10)

    assert plain(answer)["sample_id"] + plain(rest)["sample_id"] == [1, 2, 0]
    assert (plain(rest)["staleness_bound"], plain(rest)["age_versions"], plain(rest)["total"]) == (4, [4, 4], 3)


def test_what_is_known_of_the_newest_version_alone_is_refused_of_others(filled):
    view = filled.view()
    _, following = queries.page(view, queries.first_cursor(view, queries.Selection(measure="instability")), 2)
    commit(filled.run, make_rows([5], 6))
    then = filled.view_at(following.moment)

    with refuses(NoSuchVersion, "measure", "instability"):
        queries.page(then, following, 2)


def test_a_cursor_of_another_store_is_refused(filled):
    view = filled.view()
    _, following = queries.page(view, queries.first_cursor(view, queries.Selection()), 2)
    shutil.rmtree(filled.run.scores_uri)
    commit(filled.run, make_rows([0], 1))

    for moment in (following.moment, filled.view().moment._replace(newest_version=99)):
        with refuses(NoSuchVersion, "cursor", "store"):
            filled.view_at(moment)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_histogram(filled):
    found = queries.histogram(filled.view(), "log_ratio", bins=2)
    only = queries.histogram(filled.view(), "log_ratio", bins=2, label=0)
    limited = queries.histogram(filled.view(), "log_ratio", bins=2, limits=Limits(max_age_versions=4))
    nothing = queries.histogram(filled.view(), "log_ratio", bins=2, label=7)

    assert (found["samples"], found["counts"], found["edges"]) == (5, [3, 2], [0.5, 4.75, 9.0])
    assert (found["quantiles"]["0.5"], found["mean"]) == (2.0, pytest.approx(4.3))
    assert (only["samples"], only["edges"]) == (2, [0.5, 4.75, 9.0])
    assert (limited["samples"], limited["edges"][-1]) == (3, 2.0)
    assert (nothing["samples"], nothing["counts"], nothing["edges"], nothing["mean"]) == (0, [], [], None)


@pytest.mark.parametrize(
    "log_ratio", [[40, 37.5, 37.4], [1e17] * 3, [0.0, 5e-324, 0.0]], ids=["saturated", "equal and large", "tiny"]
)
def test_a_histogram_of_values_that_hardly_differ(run, log_ratio):
    commit(run, make_rows([0, 1, 2], 1, log_ratio=np.array(log_ratio)))
    for measure in ("adm", "log_ratio"):
        found = queries.histogram(Difficulty(run).view(), measure)

        assert sum(found["counts"]) == 3
        assert len(found["edges"]) == len(found["counts"]) + 1


def test_classes(filled):
    found = plain(queries.classes(filled.view(), "log_ratio"))

    assert found["label"] == [0, 1, 2]
    assert (found["samples"], found["scored"], found["fresh"]) == ([2, 2, 2], [2, 2, 1], [1, 1, 1])
    assert found["p50"] == [4.75, 5.5, 1.0]
    assert found["mean"] == [4.75, 5.5, 1.0]
    assert found["error"] == [0.5, 0.5, 0.0]
    limited = plain(queries.classes(filled.view(), "log_ratio", Limits(max_age_versions=4)))
    assert (limited["scored"], limited["mean"], limited["error"]) == ([2, 2, 1], [0.5, 2.0, 1.0], [0.0, 0.0, 0.0])


def test_classes_of_a_store_without_rows(run):
    commit(run)
    found = plain(queries.classes(Difficulty(run).view()))

    assert (found["scored"], found["mean"], found["error"]) == ([0] * 3, [None] * 3, [None] * 3)


def test_history_has_the_rows_that_are_kept(filled):
    commit(filled.run, make_rows([1], 3, log_ratio=0.25))
    found = plain(queries.history(filled.view(), 1, "log_ratio"))

    assert (found["model_version"], found["value"], found["commit"]) == ([2, 3], [2.0, 0.25], [1, 2])
    assert (found["abandoned"], found["measure"], found["sample_id"]) == ([False, False], "log_ratio", 1)
    assert (found["status"], found["age_versions"], found["age_steps"]) == (["fresh"] * 2, [4, 3], [40, 30])
    assert found["scored_at"] == ["2026-01-02T03:04:05.000000Z"] * 2
    assert plain(queries.history(filled.view(), 5))["value"] == []
    assert plain(queries.history(filled.view(), 1, "instability"))["value"] == [None, None]


def test_suspects_say_how_many_there_are(filled):
    """Sample 2, with margin 3 and a wrong prediction; the others' margins are below ln 2."""
    found = plain(queries.mislabelled(filled.view(), 10))

    assert (found["sample_id"], found["total"], found["estimated_share"]) == ([2], 1, 0.2)
    assert (found["measure"], found["status"], found["age_versions"]) == ("loss", ["fresh"], [4])
    assert found["value"] == pytest.approx([math.log1p(math.exp(3))])
    refused = plain(queries.mislabelled(filled.view(), 10, Limits(max_age_versions=3)))
    assert (refused["sample_id"], refused["value"], refused["status"]) == ([2], [None], ["stale"])
    assert (refused["predicted"], refused["margin"], refused["adm"], refused["label"]) == ([None], [None], [None], [2])


def test_snapshot_and_what_came_since(filled):
    commit(filled.run, make_rows([5, 0], 8))
    view = filled.view()
    reader = view.reader

    assert plain(queries.snapshot(view, reader))["sample_id"] == [0, 1, 2, 3, 4, 5]
    assert plain(queries.snapshot(view, reader, since=1))["sample_id"] == [0, 5]
    assert plain(queries.snapshot(view, reader.pinned(1)))["sample_id"] == [0, 1, 2, 3, 4]
    assert queries.snapshot(view, reader, since=2).table().num_rows == 0
    queries.check_since(view, reader, 2, Difficulty(filled.run).view().store)
    with refuses(NoSuchVersion, "since", "since=3 is beyond version 2"):
        queries.check_since(view, reader, 3, None)


def test_columns_tell_the_same_in_json_and_arrow(filled):
    answer = queries.scores(filled.view(), [5, 1, 3])
    table = answer.table()

    assert {name: table.column(name).to_pylist() for name in table.column_names} | answer.head == plain(answer)
    assert orjson.loads(table.schema.metadata[b"steppe"]) == answer.head


# -- following the run -------------------------------------------------------------------------------------------------


def test_while_one_thread_makes_the_next_view_others_answer_from_the_one_before(filled, monkeypatch):
    before = filled.view()
    commit(filled.run, make_rows([5], 8))
    begun, go_on = threading.Event(), threading.Event()
    advance = filled._refreshed

    def slowly(view: Any) -> Any:
        begun.set()
        assert go_on.wait(LIMIT_S)
        return advance(view)

    monkeypatch.setattr(filled, "_refreshed", slowly)
    monkeypatch.setattr(looking, "WAIT_AFTER_S", 3600)
    other = threading.Thread(target=filled.follow)
    other.start()
    assert begun.wait(LIMIT_S)

    assert filled.view() is before
    assert filled.at_hand() is before
    go_on.set()
    other.join()
    assert filled.view().reader.version == 2


class Queue:
    """A lock that counts who asked for it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock, self.asked = lock, 0

    def __enter__(self) -> None:
        self.asked += 1  # under the interpreter's lock, and read by the test alone
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_view_that_was_the_newest_too_long_ago_is_no_answer_while_the_next_is_made(filled, monkeypatch):
    """All wait, and those who came during a look share the next."""
    monkeypatch.setattr(looking, "WAIT_AFTER_S", 10)
    filled.view()
    filled._looked_at -= 11
    commit(filled.run, make_rows([5], 8))
    begun, go_on, looks = threading.Event(), threading.Event(), []
    look = filled._is_newest

    def slowly(view: Any) -> bool:
        looks.append(view)
        begun.set()
        assert go_on.wait(LIMIT_S)
        return bool(look(view))

    monkeypatch.setattr(filled, "_is_newest", slowly)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(filled.view)
        assert begun.wait(LIMIT_S)
        assert filled.at_hand() is None
        queue = Queue(filled._refreshing)
        monkeypatch.setattr(filled, "_refreshing", queue)
        others = [pool.submit(filled.view) for _ in range(3)]
        wait_for(lambda: queue.asked == 3, "the others, waiting")
        assert wait([first, *others], timeout=0).done == set()
        go_on.set()
        assert [one.result(LIMIT_S).reader.version for one in (first, *others)] == [2] * 4
    assert len(looks) == 2


def test_one_caller_at_a_time_sees_to_the_next_view(filled, monkeypatch):
    before, begun = filled.view(), []
    monkeypatch.setattr(looking, "WAIT_AFTER_S", 3600)
    monkeypatch.setattr(filled, "_beside", begun.append)
    commit(filled.run, make_rows([5], 8))

    assert [filled.at_hand() for _ in range(3)] == [before] * 3
    assert begun == [filled.follow]
    assert filled.follow().reader.version == 2
    assert filled.at_hand() is not before


def test_an_event_loop_is_answered_at_once_and_the_next_view_made_beside(filled, monkeypatch):
    before = filled.view()
    monkeypatch.setattr(looking, "WAIT_AFTER_S", 3600)
    commit(filled.run, make_rows([5], 8))

    assert filled.at_hand() is before
    wait_for(lambda: filled.at_hand().reader.version == 2, what="the next view")


def test_after_a_failure_the_next_caller_tries_again(filled):
    filled.view()
    (filled.run.path / "checkpoints").rename(filled.run.path / "moved")
    (filled.run.path / "checkpoints").write_text("")
    for _ in range(2):
        with pytest.raises(RunError):
            filled.view()
    (filled.run.path / "checkpoints").unlink()
    (filled.run.path / "moved").rename(filled.run.path / "checkpoints")

    assert filled.view().newest_version == 6


def test_a_store_that_was_removed_and_made_again_is_followed(filled):
    first = filled.view()
    shutil.rmtree(filled.run.scores_uri)
    with pytest.raises(StoreError):
        filled.view()
    commit(filled.run, make_rows([0], 1, log_ratio=3.0))

    assert sample(filled, 0)["value"] == pytest.approx(math.tanh(1.5))
    assert sample(filled, 1)["status"] == "unscored"
    assert filled.view().moment.store != first.moment.store


def test_an_older_copy_in_place_of_the_store_is_followed(filled, tmp_path):
    shutil.copytree(filled.run.scores_uri, tmp_path / "copy")
    commit(filled.run, make_rows([0], 6, log_ratio=3.0))
    before = filled.view()
    shutil.rmtree(filled.run.scores_uri)
    shutil.copytree(tmp_path / "copy", filled.run.scores_uri)
    after = filled.view()

    assert (before.reader.version, after.reader.version) == (2, 1)
    assert sample(filled, 0)["value"] == pytest.approx(math.tanh(0.25))
    assert after.moment.store != before.moment.store


def test_older_manifests_in_place_of_the_newest_are_followed(filled, tmp_path):
    """As rsync brings them back, which leaves store.json as it is."""
    commit(filled.run, make_rows([0], 6, log_ratio=3.0))
    before = filled.view()
    for path in sorted((filled.run.scores_uri / "manifests").iterdir())[2:]:
        path.unlink()
    after = filled.view()

    assert (before.reader.version, after.reader.version) == (2, 1)
    assert sample(filled, 0)["value"] == pytest.approx(math.tanh(0.25))
    assert after.moment.store != before.moment.store


def test_a_new_attempt_alone_makes_scores_stale(filled):
    assert scores(filled, [0])["status"] == ["fresh"]
    begin(filled.run.path, fork_step=10, last_valid_version=1, first_version=7)

    assert scores(filled, [0])["status"] == sample(filled, 0)["status"].split() == ["stale"]


def test_measures_that_nobody_asks_for_any_more_are_not_followed(filled):
    scores(filled, [0], "loss")
    for version in (7, 8):
        commit(filled.run, make_rows([0], version))
        view = filled.view()
        assert view.scores.is_prepared("adm")
        assert view.scores.is_prepared("loss") == (version == 7)


def test_what_the_system_refuses_says_which_file(filled):
    (filled.run.path / "checkpoints").rename(filled.run.path / "moved")
    (filled.run.path / "checkpoints").write_text("")

    with refuses(RunError, str(filled.run.path / "checkpoints")):
        filled.view()


def test_a_short_list_of_samples_is_refused(run):
    commit(run, make_rows([0]))
    path = run.path / "samples.arrow"
    path.write_bytes(arrow_file(run.samples().slice(0, 2).combine_chunks()).to_pybytes())

    with refuses(RunError, str(path), "2 samples of 6"):
        Difficulty(run).view()


def test_a_store_of_another_run_is_refused(filled):
    shutil.rmtree(filled.run.scores_uri)
    with ScoreWriter(filled.run.scores_uri, SAMPLES + 1) as writer:
        writer.append(make_rows([0]))

    with refuses(StoreMismatch, str(filled.run.scores_uri), "7 samples, the run has 6"):
        Difficulty(filled.run).view()


def test_scores_are_read_once_for_views_of_one_store_version(filled):
    before = filled.view()
    with CheckpointPublisher(filled.run.path) as publisher:
        publisher.publish(nn.Linear(1, 1), 70)
    after = filled.view()

    assert (before.newest_version, after.newest_version) == (6, 7)
    assert after.scores is before.scores
