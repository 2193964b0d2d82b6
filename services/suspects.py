"""Which samples look mislabelled, from score rows and labels alone.

A flipped label shows as a high loss with a prediction that disagrees. It does not show as a high ADM: its ratio is near
1, so its ADM is among the lowest. The list therefore goes by the margin, in which the loss is monotone.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import StoreMismatch
from shared.measures import adm, loss
from shared.ranking import percentiles
from shared.score_store import ScoreReader
from shared.store_view import column_array

Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class _Judged:
    """The B scored samples of one store version."""

    rows: pa.Table
    about: pa.Table  # their samples: key, label, clean_label where the data set tells
    percentile_B: npt.NDArray[np.float64]
    suspect_B: Bools


def suspects(reader: ScoreReader, samples: pa.Table, limit: int | None = None) -> pa.Table:
    """The samples that look mislabelled, most suspicious first: at most `limit` of them.

    A suspect is scored, predicted to be of another class, and its label is less likely than chance under the newest
    score: p_y < 1/K, a loss above ln K; K is the number of classes that labels and predictions speak of. The order is
    the margin's percentile within the row's own model_version, because ranks of different versions do not mix; ties by
    margin, then by id.

    Args:
        samples: row i is sample i, as `Run.samples()` gives them: key, label, and clean_label where there.

    Returns: sample_id, key, label, predicted, loss, margin, percentile, adm, model_version, step; clean_label when any
        is known.

    Raises: StoreMismatch when samples and store are of different size.
    """
    judged = _judge(reader, samples)
    at = np.flatnonzero(judged.suspect_B)
    rows, about, percentile = judged.rows.take(at), judged.about.take(at), judged.percentile_B[at]
    margin = column_array(rows, "margin")
    columns = {
        "sample_id": rows.column("sample_id"),
        "key": about.column("key"),
        "label": about.column("label"),
        "predicted": rows.column("predicted"),
        "loss": pa.array(loss({"margin": margin})),
        "margin": rows.column("margin"),
        "percentile": pa.array(percentile),
        "adm": pa.array(adm({"log_ratio": column_array(rows, "log_ratio")})),
        "model_version": rows.column("model_version"),
        "step": rows.column("step"),
    }
    if _known_clean(samples).any():
        columns["clean_label"] = about.column("clean_label")
    order = np.lexsort((-margin, -percentile))  # stable, and rows come by id
    return pa.table(columns).take(order[:limit])


def estimate(reader: ScoreReader, samples: pa.Table) -> float | None:
    """The estimated share of mislabelled samples: suspects / scored; None when nothing is scored."""
    suspect_B = _judge(reader, samples).suspect_B
    return float(suspect_B.mean()) if len(suspect_B) else None


def quality(reader: ScoreReader, samples: pa.Table) -> dict[str, Any] | None:
    """How well the loss finds labels that differ from the clean ones; None where no scored sample's is known.

    Over the `known` scored samples with a clean label, `mislabelled` of which differ: precision and recall of the whole
    list of suspects; AUC of the margin's percentile within its model_version, equal ones counting half. None where not
    defined: precision of an empty list, recall and AUC without a mislabelled sample, AUC without a right one.
    """
    from scipy.stats import rankdata

    judged = _judge(reader, samples)
    known_B = _known_clean(judged.about)
    if not known_B.any():
        return None
    about = judged.about.filter(pa.array(known_B))
    wrong_B = column_array(about, "label") != column_array(about, "clean_label")
    suspect_B, rank_B = judged.suspect_B[known_B], rankdata(judged.percentile_B[known_B])
    hits, wrong, right = int((wrong_B & suspect_B).sum()), int(wrong_B.sum()), int((~wrong_B).sum())
    above = float(rank_B[wrong_B].sum()) - wrong * (wrong + 1) / 2  # pairs in which the mislabelled one ranks higher
    return {
        "precision": hits / int(suspect_B.sum()) if suspect_B.any() else None,
        "recall": hits / wrong if wrong else None,
        "auc": above / (wrong * right) if wrong and right else None,
        "mislabelled": wrong,
        "known": len(wrong_B),
    }


def _judge(reader: ScoreReader, samples: pa.Table) -> _Judged:
    if samples.num_rows != reader.num_samples:
        raise StoreMismatch(
            f"{samples.num_rows} samples for the {reader.num_samples} of the score store {reader.uri}",
            fix="bring the samples of the same run",
            key="samples",
        )
    rows = reader.table()
    about = samples.take(rows.column("sample_id"))
    label_B, predicted_B = column_array(about, "label"), column_array(rows, "predicted")
    margin_B = column_array(rows, "margin").astype(np.float64)
    classes = 1 + max(int(column_array(samples, "label").max()), int(predicted_B.max(initial=0)))
    below_chance_B = margin_B > math.log(max(classes, 2) - 1)  # p_y = 1 / (1 + e^margin) < 1/K
    return _Judged(
        rows,
        about,
        percentiles(margin_B, column_array(rows, "model_version")),
        (predicted_B != label_B) & below_chance_B,
    )


def _known_clean(samples: pa.Table) -> Bools:
    if "clean_label" not in samples.column_names:
        return np.zeros(samples.num_rows, dtype=bool)
    known: Bools = np.asarray(pc.is_valid(samples.column("clean_label")))
    return known
