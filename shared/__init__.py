"""What crosses between processes: schema, stores, catalogue, data sets, models, configuration, errors."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.run_scores import RunScores


def open_run(uri: str | os.PathLike[str]) -> "RunScores":
    """The samples and scores of a run, for notebooks: `open_run("runs/NAME").to_pandas()`.

    Raises: RunError when there is no run at `uri`; StoreError while it has no score store.
    """
    from shared.run_scores import RunScores

    return RunScores(uri)
