"""What came of a run; and how long it takes from a checkpoint to the first score that the sampler can see."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.summary import first_score_latency, summarise
from deploy.training import Outcome
from scorer.config import ScoringConfig
from shared.attempts import begin
from shared.catalogue import Run
from shared.events import Events
from shared.samples import Images
from shared.score_store import ScoreWriter
from tests.rows import make_rows
from trainer.loop import TrainResult
from trainer.sampler import CurriculumSampler


@pytest.mark.parametrize(
    ("published_at", "first_seen", "expected"),
    [
        ({}, {}, (None, None)),
        ({1: 10.0}, {}, (None, None)),
        ({}, {1: 10.0}, (None, None)),
        ({1: 10.0}, {1: 10.5}, (0.5, 0.5)),
        ({1: 10.0}, {-1: 9.0, 0: 9.5, 1: 10.5}, (0.5, 0.5)),
        ({1: 10.0, 2: 20.0, 3: 30.0}, {1: 11.0, 2: 22.0, 3: 34.0}, (2.0, 3.8)),
        ({1: 10.0, 2: 20.0, 3: 30.0}, {3: 31.0}, (11.0, 20.0)),
        ({1: 10.0, 2: 20.0, 3: 30.0}, {2: 21.25, 1: 10.25}, (0.75, 1.2)),
        ({1: 10.0, 2: 20.0}, {1: 26.0, 2: 25.0}, (10.0, 14.5)),
        ({31: 10.0, 32: 20.0}, {30: 5.0, 31: 12.0}, (2.0, 2.0)),
        ({1: 0.0}, {1: 1.23456}, (1.235, 1.235)),
    ],
    ids=[
        "nothing at all",
        "nothing scored",
        "nothing published",
        "one",
        "views before the first score",
        "each version",
        "versions jumped over count until the next one scored",
        "versions that no score followed do not count",
        "the older version was seen after the newer one",
        "scores of an earlier attempt",
        "to the millisecond",
    ],
)
def test_first_score_latency(
    published_at: dict[int, float], first_seen: dict[int, float], expected: tuple[float | None, float | None]
) -> None:
    assert expected == first_score_latency(published_at, first_seen)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Of ten samples, with one attempt and two published versions."""
    images = Images(np.zeros((10, 1, 2, 2), np.uint8), np.arange(10) % 2, white=1, num_classes=2)
    made = Run.create(tmp_path / "run", dataset_fingerprint="f", train=images, config={}, scoring_id="s")
    begin(made.path, fork_step=0, last_valid_version=0, first_version=1)
    for version in (1, 2):
        Events(made.path).append("published", model_version=version)
    return made


def make_summary(run: Run, config: ScoringConfig, status: dict[str, Any], first_seen: dict[int, float]) -> Any:
    sampler = CurriculumSampler(10, None)
    list(sampler)
    result = TrainResult(
        steps=5,
        finished=True,
        test_accuracy=0.5,
        forward_equivalents=60,
        seconds=2.0,
        seconds_in_publish=0.25,
        seconds_in_sampler=0.125,
        seconds_in_save=0.5,
        seconds_in_scoring=0.75,
        states_failed=0,
        draws=sampler.draws,
    )
    outcome = Outcome(result, {1: 10.0, 2: 20.0}, first_seen, checkpoints_failed=0, checkpoints_superseded=1)
    return summarise(run, outcome, status, config)


def test_summary_of_a_run_that_scores_nothing(run: Run) -> None:
    """No store, no scorers, nobody to ask."""
    summary = make_summary(run, ScoringConfig(mode="off"), {}, {})

    assert (summary["scoring_mode"], summary["test_accuracy"], summary["steps"], summary["attempts"]) == (
        "off",
        0.5,
        5,
        1,
    )
    assert {summary[f"draws_{kind}"] for kind in ("fresh", "stale")} == {0.0}
    assert summary["draws_unscored"] == 1.0
    counts = (
        "model_versions_scored",
        "scored_rows",
        "coverage",
        "quarantined_rows",
        "scorer_forward_equivalents",
        "audits",
    )
    assert [summary[name] for name in counts] == [0] * 6
    assert (summary["model_versions_published"], summary["trainer_forward_equivalents"]) == (2, 60)
    unknown = ("staleness_bound", "age_versions_p50", "fidelity_mean", "fidelity_min", "seconds_to_first_score_p50")
    assert [summary[name] for name in unknown] == [None] * 5
    assert summary["reports"] == {}


def test_summary_counts_what_scoring_cost(run: Run) -> None:
    """Eight rows stored and four audited, PGD in 3 steps: seven passes each."""
    with ScoreWriter(run.scores_uri, 10, scoring_id="s") as writer:
        for version in (1, 2):
            writer.append(make_rows(np.arange(4), version))
            writer.commit({"model_versions_scored": version, "quarantined_rows": 3})
    fidelity = {"latest": 0.9, "mean": 0.8, "min": 0.7, "count": 6}
    status = {"audited_rows": 4, "fidelity": fidelity, "samples_per_second_mean": 123.0}
    config = ScoringConfig.model_validate({"attack": {"name": "pgd", "steps": 3}})
    summary = make_summary(run, config, status, {1: 11.0, 2: 22.0})

    assert summary["scorer_forward_equivalents"] == 12 * 7
    assert (summary["scored_rows"], summary["coverage"], summary["quarantined_rows"]) == (8, 0.4, 3)
    assert [summary[name] for name in ("fidelity_mean", "fidelity_min", "audits")] == [0.8, 0.7, 6]
    assert (summary["seconds_to_first_score_p50"], summary["scorer_samples_per_second"]) == (1.5, 123.0)
