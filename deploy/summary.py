"""What came of a run: the content of its summary.json."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.attempts import attempts
from shared.catalogue import Run
from shared.events import read_events
from shared.freshness import staleness_bound
from shared.score_store import ScoreReader

if TYPE_CHECKING:
    from deploy.training import Outcome
    from scorer.config import ScoringConfig


def summarise(run: Run, outcome: "Outcome", status: Mapping[str, Any], config: "ScoringConfig") -> dict[str, Any]:
    """What came of the run; `status` is the controller's last.

    Shares are of all draws; ages are those of the draws, in versions; seconds are those of the last attempt.

    Forward equivalents are passes of one sample through the network, a backward pass to the weights being two and one
    to the input one. Fidelity is the rank correlation of the scores in use with those of the newest weights.
    """
    result, draws = outcome.result, outcome.result.draws
    latency_50, latency_95 = first_score_latency(outcome.published_at, outcome.first_seen)
    fidelity = status.get("fidelity") or {}
    stored = _stored(run)
    scored = stored["scored_rows"] + status.get("audited_rows", 0)
    return {
        "test_accuracy": result.test_accuracy,
        "steps": result.steps,
        "attempts": len(attempts(run.path)),
        "scoring_mode": config.mode,
        "model_versions_published": sum(event["event"] == "published" for event in read_events(run.path)),
        **stored,
        "age_versions_p50": draws.age_quantile(0.5),
        "age_versions_p95": draws.age_quantile(0.95),
        "draws_fresh": draws.fresh / max(draws.total, 1),
        "draws_stale": draws.stale / max(draws.total, 1),
        "draws_unscored": draws.unscored / max(draws.total, 1),
        "fidelity_mean": fidelity.get("mean"),
        "fidelity_min": fidelity.get("min"),
        "audits": fidelity.get("count", 0),
        "seconds_to_first_score_p50": latency_50,
        "seconds_to_first_score_p95": latency_95,
        "scorer_samples_per_second": status.get("samples_per_second_mean"),
        "trainer_forward_equivalents": result.forward_equivalents,
        "scorer_forward_equivalents": scored * config.attack.forward_equivalents,
        "trainer_seconds_in_publish": round(result.seconds_in_publish, 6),
        "trainer_seconds_in_sampler": round(result.seconds_in_sampler, 6),
        "trainer_seconds_in_save": round(result.seconds_in_save, 6),
        "trainer_seconds_in_scoring": round(result.seconds_in_scoring, 6),
        "trainer_seconds_total": round(result.seconds, 6),
        "checkpoints_failed": outcome.checkpoints_failed,
        "checkpoints_superseded": outcome.checkpoints_superseded,
        "states_failed": result.states_failed,
        "scores_unreadable": outcome.scores_unreadable,
        "run_folder": str(run.path),
    }


def _stored(run: Run) -> dict[str, Any]:
    """What the score store holds; nothing where nothing is scored."""
    if not (run.scores_uri / "store.json").exists():
        nothing = ("model_versions_scored", "scored_rows", "coverage", "quarantined_rows")
        return dict.fromkeys(nothing, 0) | {"staleness_bound": None, "reports": {}}
    reader = ScoreReader(run.scores_uri)
    return {
        "model_versions_scored": int(reader.metadata.get("model_versions_scored", 0)),
        "scored_rows": reader.rows,
        "coverage": float((reader.dense("model_version") >= 0).mean()),
        "quarantined_rows": int(reader.metadata.get("quarantined_rows", 0)),
        "staleness_bound": staleness_bound(reader.metadata),
        "reports": dict(reader.metadata.get("reports", {})),
    }


def first_score_latency(
    published_at: Mapping[int, float], first_seen: Mapping[int, float]
) -> tuple[float | None, float | None]:
    """Median and 95th percentile of the seconds from `publish` to the first score that the sampler could see.

    A version that scorers jumped over counts until the next one that they scored; those that no score followed any
    more, at the end of the training, do not count. (None, None) when nothing was scored.
    """
    latencies = []
    seen, earliest = sorted(first_seen.items()), math.inf
    for version in sorted(published_at, reverse=True):
        while seen and seen[-1][0] >= version:
            earliest = min(earliest, seen.pop()[1])
        if earliest < math.inf:
            latencies.append(earliest - published_at[version])
    if not latencies:
        return None, None
    middle, high = np.quantile(latencies, (0.5, 0.95))
    return round(float(middle), 3), round(float(high), 3)
