"""Measures: how score rows become one number per sample. Higher means more difficult *by that measure*.

A new measure is one function of the rows' columns and one line in MEASURES; nothing is scored again. Columns are arrays
over the same samples: those of the score row (`shared.schema`), and as `previous_margin` and so on those of the row
before, of an older model_version, which measures over versions compare with (`shared.tracking` keeps them).

High ADM means fragile relative to its own loss. A mislabelled sample has a high loss, a ratio near 1 and so a *low*
ADM: low ADM is neither "clean" nor "learned".

A measure that needs passes of its own through a network, such as the weight-space gap of ESAM (arXiv 2110.03141) or the
held-out loss of RHO-LOSS (arXiv 2206.07137), begins as a column of the score row, which `scorer.adm` fills.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError

Column = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = Mapping[str, Column]

PREVIOUS = "previous_"
MAX_EXPONENT = 709.0  # e^709 is a float64, e^710 is not


@dataclasses.dataclass(frozen=True)
class Measure:
    """`show` is what people see, `rank` orders samples the same way without saturating; both read `columns`."""

    columns: tuple[str, ...]
    show: Callable[[Rows], Column]
    rank: Callable[[Rows], Column]
    meaning: str

    @property
    def over_versions(self) -> bool:
        """Whether it compares a sample's row with the one before."""
        return any(name.startswith(PREVIOUS) for name in self.columns)

    @property
    def of_one_row(self) -> bool:
        """Whether a row alone has a value; else it takes the rows of other samples, or the row before."""
        return not self.over_versions and not {"model_version", "scored_at"} & set(self.columns)


def adm(rows: Rows) -> Column:
    """(l' - l) / (l' + l) = tanh(ln(l'/l) / 2), our reading of the measure (arXiv 2508.18726)."""
    return np.tanh(_floats(rows, "log_ratio") / 2)


def adm_by_clean(rows: Rows) -> Column:
    """(l' - l) / l = e^log_ratio - 1: the gap in units of the clean loss; it ends where float64 does."""
    return np.expm1(np.minimum(_floats(rows, "log_ratio"), MAX_EXPONENT))


def adm_by_adversarial(rows: Rows) -> Column:
    """(l' - l) / l' = 1 - e^-log_ratio: the gap in units of the adversarial loss; it ends where float64 does."""
    return -np.expm1(np.minimum(-_floats(rows, "log_ratio"), MAX_EXPONENT))


def loss(rows: Rows) -> Column:
    """Cross-entropy: softplus(margin) = ln(1 + e^margin)."""
    return np.logaddexp(0.0, _floats(rows, "margin"))


def gap(rows: Rows) -> Column:
    """l' - l, not normalised.

    The larger loss times 1 - e^-|log_ratio|, since the difference of two small losses would lose its digits. Its log is
    ln l or ln l + log_ratio, where ln l = ln softplus(m) is m to 5e-14 below m = -30.
    """
    margin, log_ratio = _floats(rows, "margin"), _floats(rows, "log_ratio")
    if isinstance(margin, float) and max(abs(margin), abs(log_ratio)) < MAX_EXPONENT:  # one sample's, the quick way
        return loss(rows) * np.expm1(log_ratio)
    log_loss = np.log(np.logaddexp(0.0, np.maximum(margin, -30.0))) + np.minimum(margin + 30.0, 0.0)
    larger: Floats = np.exp(log_loss + np.maximum(log_ratio, 0.0))
    return -np.sign(log_ratio) * larger * np.expm1(-np.abs(log_ratio))


def gap_by_batch(rows: Rows) -> Column:
    """l' - l in units of the mean clean loss of the samples that were scored in the same block."""
    return gap(rows) / _group_mean(loss(rows), rows["model_version"], rows["scored_at"])


def gap_by_dataset(rows: Rows) -> Column:
    """l' - l in units of the mean clean loss of all samples with scores of the same model_version."""
    return gap(rows) / _group_mean(loss(rows), rows["model_version"])


def confidence(rows: Rows) -> Column:
    """1 - p_y = sigmoid(margin): what the prediction leaves to the other classes."""
    return _sigmoid(_floats(rows, "margin"))


def instability(rows: Rows) -> Column:
    """|p_y - previous p_y|: how far the label's probability moved since the version before.

    Averaged over versions it is the soft form of DIHCL's prediction flips (Zhou et al., NeurIPS 2020); the exponential
    mean is `shared.tracking.Tracker`'s.
    """
    return np.abs(_sigmoid(-_floats(rows, "margin")) - _sigmoid(-_floats(rows, PREVIOUS + "margin")))


def _of(name: str) -> Callable[[Rows], Column]:
    return lambda rows: _floats(rows, name)


_BY_RATIO = "fragile relative to its own loss"

MEASURES: dict[str, Measure] = {
    "adm": Measure(("log_ratio",), adm, _of("log_ratio"), _BY_RATIO),
    "log_ratio": Measure(("log_ratio",), _of("log_ratio"), _of("log_ratio"), _BY_RATIO),
    "adm_by_clean": Measure(("log_ratio",), adm_by_clean, _of("log_ratio"), _BY_RATIO),
    "adm_by_adversarial": Measure(("log_ratio",), adm_by_adversarial, _of("log_ratio"), _BY_RATIO),
    "gap": Measure(("margin", "log_ratio"), gap, gap, "an attack adds much loss"),
    "gap_by_batch": Measure(
        ("margin", "log_ratio", "model_version", "scored_at"), gap_by_batch, gap_by_batch, "an attack adds much loss"
    ),
    "gap_by_dataset": Measure(
        ("margin", "log_ratio", "model_version"), gap_by_dataset, gap_by_dataset, "an attack adds much loss"
    ),
    "loss": Measure(("margin",), loss, _of("margin"), "high cross-entropy"),
    "margin": Measure(("margin",), _of("margin"), _of("margin"), "another class is close or ahead"),
    "confidence": Measure(("margin",), confidence, _of("margin"), "little probability for the label"),
    "robust_margin": Measure(
        ("adversarial_margin",),
        _of("adversarial_margin"),
        _of("adversarial_margin"),
        "another class is close or ahead after the attack",
    ),
    "grad_norm": Measure(("grad_norm",), _of("grad_norm"), _of("grad_norm"), "loss is steep in the input"),
    "el2n": Measure(("el2n",), _of("el2n"), _of("el2n"), "prediction far from the label"),
    "instability": Measure(("margin", PREVIOUS + "margin"), instability, instability, "its prediction keeps moving"),
}


def find_measure(name: str) -> Measure:
    """Raises ConfigError listing the known names."""
    if name not in MEASURES:
        raise ConfigError(f"no measure {name!r}", fix=f"choose one of {', '.join(MEASURES)}", key="measure")
    return MEASURES[name]


def _floats(rows: Rows, name: str) -> Floats:
    column: Any = rows[name]
    if type(column) is not float:  # of one sample alone
        column = np.asarray(column, dtype=np.float64)
    floats: Floats = column
    return floats


def _sigmoid(value_N: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -value_N))


def _group_mean(value_N: Floats, *keys: Column) -> Floats:
    """The mean of `value_N` over the samples with the same keys, for each sample; NaN values are left out."""
    group_N = np.zeros(len(value_N), dtype=np.int64)
    for key in keys:
        codes = np.unique(key, return_inverse=True)[1]
        group_N = np.unique(group_N * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]
    known = ~np.isnan(value_N)
    count = np.bincount(group_N[known], minlength=group_N.max(initial=0) + 1)
    total = np.bincount(group_N[known], weights=value_N[known], minlength=len(count))
    mean: Floats = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)[group_N]
    return mean
