"""A run's samples beside their scores, as one table: for notebooks and exports. Follows a run that goes on."""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from shared.catalogue import Run
from shared.errors import ConfigError
from shared.measures import MEASURES, find_measure
from shared.schema import SCORE_SCHEMA
from shared.score_store import ScoreReader
from shared.store_view import column_array

if TYPE_CHECKING:
    import pandas as pd

SHOWN_MEASURES = ("adm", "loss")


class RunScores:
    """One run: `shared.open_run` opens it. Answers from the store version at which it was opened or last refreshed.

    Raises: RunError when there is no run at `uri`; StoreError while it has no score store.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.run = Run(uri)
        self.scores = ScoreReader(self.run.scores_uri)

    def __repr__(self) -> str:
        return f"<run {self.run.path}: {self.run.num_samples} samples, store version {self.scores.version}>"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.run.path

    @property
    def num_samples(self) -> int:
        return self.run.num_samples

    def refresh(self) -> int:
        """Move on to the newest store version and return it."""
        return self.scores.refresh()

    def to_arrow(self, *, measures: Sequence[str] = SHOWN_MEASURES) -> pa.Table:
        """All N samples in order of their ids: what is known of the sample, its latest score row, and `measures`.

        Of unscored samples the row and the measures are null. Any measure of a row alone may be asked for.

        Raises ConfigError for a measure that is unknown or needs more than a row.
        """
        samples = self.run.samples()
        rows = self.scores.lookup(np.arange(self.run.num_samples))
        return self._beside(samples, rows, measures)

    def to_pandas(self, *, measures: Sequence[str] = SHOWN_MEASURES) -> "pd.DataFrame":
        """`to_arrow` as a data frame indexed by sample_id. Raises ConfigError without pandas."""
        return _data_frame(self.to_arrow(measures=measures), "sample_id")

    def history(self, sample_id: int, *, measures: Sequence[str] = SHOWN_MEASURES) -> pa.Table:
        """The rows of one sample that are still kept, one per model_version, oldest first, with `measures`.

        Raises DataError for an id outside 0..N-1.
        """
        rows = self.scores.history(sample_id)
        return self._beside(rows.select(["sample_id"]), rows, measures)

    @property
    def committed_at(self) -> datetime.datetime | None:
        """When the store version was committed (UTC)."""
        return self.scores.committed_at

    def _beside(self, samples: pa.Table, rows: pa.Table, measures: Sequence[str]) -> pa.Table:
        table = samples
        for name in SCORE_SCHEMA.names[1:]:
            table = table.append_column(SCORE_SCHEMA.field(name), rows.column(name))
        is_scored = rows.column("model_version").is_valid().to_numpy()
        scored = rows.filter(pa.array(is_scored))
        for name in measures:
            rule = find_measure(name)
            if not rule.of_one_row:
                known = ", ".join(known for known, rule in MEASURES.items() if rule.of_one_row)
                wrong = f"the measure {name!r} needs more than a sample's own row"
                raise ConfigError(wrong, fix=f"choose one of {known}", key="measures")
            if name not in table.column_names:  # margin, grad_norm and el2n are columns of the row
                value = np.full(len(is_scored), np.nan)
                value[is_scored] = rule.show({column: column_array(scored, column) for column in rule.columns})
                table = table.append_column(name, pa.array(value, mask=~is_scored))
        return table


def _data_frame(table: pa.Table, index: str) -> "pd.DataFrame":
    try:
        return table.to_pandas().set_index(index)
    except ImportError as error:
        fix = "pip install pandas, or take to_arrow(), which does without"
        raise ConfigError("to_pandas needs pandas", fix=fix, key="pandas") from error
