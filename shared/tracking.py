"""A measure followed over versions: what changed since the last look, and means over a sample's scorings."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, StateError
from shared.measures import PREVIOUS, find_measure
from shared.ranking import Ranking, percentiles
from shared.score_store import ScoreReader
from shared.store_view import column_array

Floats = npt.NDArray[np.float64]

MEMORY_OVER_VERSIONS = 0.9  # of measures that are changes from version to version, when nothing else is asked for


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """Values and ranks at a store version."""

    store_version: int
    value_N: Floats
    ranking: Ranking


class Tracker:
    """Turns a store's rows into one measure's value and percentile per sample.

    Without memory that is a function of the newest rows. With memory g each new scoring of a sample moves its mean:
    g * mean + (1 - g) * new, begun with the first. The mean is of percentiles within the model_version, since values of
    different versions do not compare, and ranked again; of measures over versions it is of the changes themselves. A
    tracker knows what it saw: versions committed between two updates count as one.

    Args:
        measure: a name of `shared.measures.MEASURES`.
        memory: g in [0, 1); None is 0, and 0.9 for measures over versions.
    """

    def __init__(self, measure: str, memory: float | None = None) -> None:
        self.measure = measure
        self._rule = find_measure(measure)
        self._memory = memory if memory is not None else MEMORY_OVER_VERSIONS * self._rule.over_versions
        if not 0 <= self._memory < 1:
            raise ConfigError(f"memory is {memory}", fix="set it to a number in [0, 1), 0 being none", key="memory")
        self._version_N = np.zeros(0, dtype=np.int64)
        self._previous: dict[str, Floats] = {}
        self._mean_N = np.zeros(0)
        self._ranked = _Ranked(0, np.zeros(0), Ranking(0))

    def update(self, reader: ScoreReader) -> tuple[Floats, Floats]:
        """The value that people see and the percentile of every sample, at the reader's version; NaN where unknown."""
        with np.errstate(invalid="ignore"):  # of the NaN of unscored samples
            return self._update(reader)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {
            "measure": self.measure,
            "version": self._version_N.copy(),
            "mean": self._mean_N.copy(),
            "previous": {name: column.copy() for name, column in self._previous.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for the state of another measure, and for unknown or missing fields, by name."""
        if unlike := sorted(state.keys() ^ self.state_dict().keys()):
            wrong = f"not a state of this tracker: the fields {unlike} are unknown or missing"
            raise StateError(wrong, fix="load what state_dict() of a tracker gave", key=unlike[0])
        if state["measure"] != self.measure:
            wrong = f"the state is of the measure {state['measure']!r}, not {self.measure!r}"
            raise StateError(wrong, fix="load it into a tracker of that measure", key="measure")
        self._version_N, self._mean_N = state["version"].copy(), state["mean"].copy()
        self._previous = {name: column.copy() for name, column in state["previous"].items()}

    def _update(self, reader: ScoreReader) -> tuple[Floats, Floats]:
        if self._rule.of_one_row and not self._memory:
            return self._update_by_changes(reader)
        version_N = reader.dense("model_version")
        rows = {name: reader.dense(name) for name in self._rule.columns if not name.startswith(PREVIOUS)}
        if not self._rule.over_versions:
            percentile_N = percentiles(self._rule.rank(rows), version_N)
            if self._memory:  # means crowd around 1/2: ranked again, a curriculum keeps its strength
                everything = np.zeros_like(version_N)
                percentile_N = percentiles(self._average(percentile_N, version_N), everything)
            return self._rule.show(rows), percentile_N
        change_N = self._rule.rank(rows | self._before(rows, version_N))
        mean_N = self._average(change_N, version_N)
        self._previous = {PREVIOUS + name: np.asarray(column, dtype=np.float64) for name, column in rows.items()}
        return mean_N, percentiles(mean_N, version_N)

    def _update_by_changes(self, reader: ScoreReader) -> tuple[Floats, Floats]:
        """Without memory, of a measure of single rows: only what was committed since the last update is read."""
        version, known = reader.version, self._ranked  # the reader may be refreshed meanwhile: then rows come twice
        if len(known.value_N) != reader.num_samples or known.store_version > version:
            known = _Ranked(0, np.full(reader.num_samples, np.nan), Ranking(reader.num_samples))
        changed = reader.changes(known.store_version)
        id_C = column_array(changed, "sample_id")
        rows = {name: column_array(changed, name) for name in self._rule.columns}
        value_N = known.value_N.copy()
        value_N[id_C] = self._rule.show(rows)
        value_N.flags.writeable = False  # it is what the next update starts from
        try:
            percentile_N = known.ranking.update(id_C, self._rule.rank(rows), column_array(changed, "model_version"))
        except BaseException:  # it may be half changed: the next update begins anew
            self._ranked = _Ranked(0, np.zeros(0), Ranking(0))
            raise
        self._ranked = _Ranked(version, value_N, known.ranking)
        return value_N, percentile_N

    def _before(self, rows: dict[str, Any], version_N: npt.NDArray[np.int64]) -> dict[str, Floats]:
        """The rows as they were at the last update; NaN at the first."""
        nothing = np.full(len(version_N), np.nan)
        return {PREVIOUS + name: self._previous.get(PREVIOUS + name, nothing) for name in rows}

    def _average(self, new_N: Floats, version_N: npt.NDArray[np.int64]) -> Floats:
        """The means after the samples with another model_version than last time were counted in."""
        if not len(self._version_N):
            self._version_N, self._mean_N = np.full(len(new_N), -1), np.full(len(new_N), np.nan)
        is_new_N = (version_N != self._version_N) & ~np.isnan(new_N)
        begun_N = np.isnan(self._mean_N)
        moved_N = self._memory * self._mean_N + (1 - self._memory) * new_N
        self._mean_N = np.where(is_new_N, np.where(begun_N, new_N, moved_N), self._mean_N)
        self._version_N = version_N.copy()
        return self._mean_N
