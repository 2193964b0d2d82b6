"""Questions about difficulty, answered from a run's files alone. REST handlers, the CLI and notebooks share them."""

import dataclasses
import math
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.attempts import abandoned, attempts
from shared.catalogue import Run
from shared.checkpoints import newest, stable
from shared.errors import StoreError
from shared.events import EventFollower, last_events
from shared.freshness import ABANDONED, age_versions, staleness_bound, statuses
from shared.measures import MEASURES, find_measure
from shared.score_store import ScoreReader
from shared.tracking import Tracker

AGE_QUANTILES = (0.5, 0.95)


@dataclasses.dataclass
class _Measured:
    """One measure of all samples at one store version; measures over versions count from when it was first asked."""

    tracker: Tracker
    version: int = -1
    value_N: npt.NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0))
    percentile_N: npt.NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0))


class Difficulty:
    """One run's scores with what is needed to judge them. Every answer belongs to one store version.

    Answers name the measure and which way it points; an unscored sample has nulls and the status `unscored`, never 0.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._reader: ScoreReader | None = None
        self._measured: dict[str, _Measured] = {}
        self._diary = EventFollower(run.path)
        self._epoch: dict[str, Any] | None = None
        self._lock = threading.RLock()  # an answer is made whole before the next one refreshes

    def refresh(self) -> ScoreReader:
        """The reader, at the newest version. Raises StoreError while no score store is there."""
        if self._reader is None:
            self._reader = ScoreReader(self.run.scores_uri)
        else:
            self._reader.refresh()
        return self._reader

    def scores(self, ids: npt.ArrayLike, measure: str = "adm") -> dict[str, Any]:
        """Columns for `ids`, in the order asked. Raises DataError for an unknown id, ConfigError for a measure."""
        with self._lock:
            reader = self.refresh()
            return self._describe(reader, reader.lookup(ids), measure)

    def sample(self, sample_id: int) -> dict[str, Any]:
        """Everything known of one sample: each measure, status, ages. Raises DataError for an unknown id."""
        with self._lock:
            reader = self.refresh()
            row = reader.lookup([sample_id])
            columns = self._describe(reader, row, "adm")
            scored = columns["status"][0] != "unscored"
            measures = {name: self._value(reader, row, name) for name in MEASURES if scored}
            about = self.run.samples().slice(sample_id, 1).to_pylist()[0]
            facts = {key: value[0] for key, value in columns.items() if isinstance(value, list)}
            shared = {key: value for key, value in columns.items() if not isinstance(value, list)}
            outcome = {key: row.column(key)[0].as_py() for key in ("predicted", "correct", "robust")}
            answer: dict[str, Any] = shared | about | facts | {"measures": measures or None} | outcome
            return answer

    def stats(self) -> dict[str, Any]:
        """Coverage, ages and counts of the whole run."""
        with self._lock:
            reader = self.refresh()
            checkpoint = newest(self.run.path)
            newest_version = checkpoint.model_version if checkpoint else 0
            bound = staleness_bound(reader.metadata)
            version_N = reader.dense("model_version")
            age_N = age_versions(version_N, newest_version, abandoned(self.run.path))
            dated = age_N[(age_N >= 0) & (age_N < ABANDONED)]
            status, count = np.unique(statuses(age_N, bound), return_counts=True)
            ages = np.quantile(dated, AGE_QUANTILES).tolist() if len(dated) else [None] * len(AGE_QUANTILES)
            return {
                "run_id": self.run.description["run_id"],
                "num_samples": reader.num_samples,
                "coverage": float((age_N >= 0).mean()),
                "status": dict.fromkeys(("fresh", "stale", "unscored"), 0)
                | dict(zip(status, count.tolist(), strict=True)),
                "age_versions_p50": ages[0],
                "age_versions_p95": ages[1],
                "staleness_bound": bound,
                "store_version": reader.version,
                "committed_at": reader.committed_at.isoformat() if reader.committed_at else None,
                "scored_rows": reader.rows,
                "newest_model_version": newest_version,
                "newest_step": checkpoint.step if checkpoint else 0,
                "model_versions_scored": int(reader.metadata.get("model_versions_scored", 0)),
                "quarantined_rows": int(reader.metadata.get("quarantined_rows", 0)),
                "reports": dict(reader.metadata.get("reports", {})),
                "fidelity": reader.metadata.get("fidelity"),
                "attempts": len(attempts(self.run.path)),
                "training": self._last_epoch(),
            }

    def events(self, limit: int) -> list[dict[str, Any]]:
        """The last `limit` events of the run's diary, in order."""
        return last_events(self.run.path, limit)

    def checkpoints(self) -> list[dict[str, Any]]:
        """Stable checkpoints, newest first."""
        now = time.time()
        return [
            {
                "model_version": c.model_version,
                "step": c.step,
                "bytes": c.bytes,
                "sha256": c.sha256,
                "age_s": round(max(now - c.published_at, 0.0), 3),
            }
            for c in stable(self.run.path)
        ]

    def ready(self) -> str | None:
        """None when difficulty can be asked for, else what is missing."""
        with self._lock:
            try:
                reader = self.refresh()
            except StoreError as error:
                return str(error)
            return None if reader.version else "no scores are committed yet"

    def _last_epoch(self) -> dict[str, Any] | None:
        """The last epoch of the training that ended: epoch, step, steps, loss, accuracy; None before the first."""
        for event in self._diary.new():
            if event["event"] == "epoch":
                self._epoch = {key: value for key, value in event.items() if key not in ("event", "time")}
        return self._epoch

    def _describe(self, reader: ScoreReader, rows: pa.Table, measure: str) -> dict[str, Any]:
        rule = find_measure(measure)
        checkpoint = newest(self.run.path)
        newest_version = checkpoint.model_version if checkpoint else 0
        version_B = rows.column("model_version").fill_null(-1).to_numpy()
        age_B = age_versions(version_B, newest_version, abandoned(self.run.path))
        scored_B = version_B >= 0
        dated_B = scored_B & (age_B < ABANDONED)  # scores that a resumed trainer left behind are stale and have no age
        measured, id_B = self._measure(reader, measure), rows.column("sample_id").to_numpy()
        value_B, percentile_B = measured.value_N[id_B], measured.percentile_N[id_B]
        step_B = rows.column("step").fill_null(-1).to_numpy()
        return {
            "measure": measure,
            "meaning": f"higher is more difficult: {rule.meaning}",
            "store_version": reader.version,
            "newest_model_version": newest_version,
            "staleness_bound": staleness_bound(reader.metadata),
            "sample_id": rows.column("sample_id").to_pylist(),
            "value": _nullable(value_B, ~np.isnan(value_B)),
            "percentile": _nullable(percentile_B, ~np.isnan(percentile_B)),
            "status": statuses(age_B, staleness_bound(reader.metadata)).tolist(),
            "age_versions": _nullable(age_B, dated_B),
            "age_steps": _nullable(np.maximum((checkpoint.step if checkpoint else 0) - step_B, 0), dated_B),
            "model_version": _nullable(version_B, scored_B),
            "step": _nullable(step_B, scored_B),
        }

    def _value(self, reader: ScoreReader, row: pa.Table, measure: str) -> float | None:
        """One sample's value; None where it has none, such as of a measure over versions after one version."""
        rule = find_measure(measure)
        if rule.of_one_row:
            return float(rule.show({name: row.column(name).to_numpy() for name in rule.columns})[0])
        value = float(self._measure(reader, measure).value_N[row.column("sample_id")[0].as_py()])
        return None if math.isnan(value) else value

    def _measure(self, reader: ScoreReader, measure: str) -> _Measured:
        measured = self._measured.setdefault(measure, _Measured(Tracker(measure)))
        if measured.version != reader.version:
            measured.value_N, measured.percentile_N = measured.tracker.update(reader)
            measured.version = reader.version
        return measured


def _nullable(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> list[Any]:
    return [value if ok else None for value, ok in zip(values.tolist(), valid.tolist(), strict=True)]
