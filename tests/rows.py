"""Score rows made by hand."""

import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.schema import SCORE_SCHEMA

SCORED_AT = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


def make_rows(ids: npt.ArrayLike, model_version: npt.ArrayLike = 1, **columns: Any) -> pa.Table:
    """Rows of `ids` at `model_version`; other columns have plain values unless given (scalar or array)."""
    ids = np.asarray(ids, dtype=np.int64)
    values: dict[str, Any] = {
        "sample_id": ids,
        "model_version": model_version,
        "step": np.asarray(model_version) * 10,
        "scored_at": SCORED_AT,
        "margin": -1.0,
        "adversarial_margin": 0.5,
        "log_ratio": 1.0,
        "grad_norm": 0.1,
        "el2n": 0.3,
        "predicted": 0,
        "correct": True,
        "robust": False,
    } | columns
    arrays = {
        name: pa.array([value] * len(ids), type=SCORE_SCHEMA.field(name).type)
        if isinstance(value, (int, float, bool, datetime.datetime))
        else pa.array(np.broadcast_to(value, ids.shape)).cast(SCORE_SCHEMA.field(name).type)
        for name, value in values.items()
    }
    return pa.table(arrays, schema=SCORE_SCHEMA)
