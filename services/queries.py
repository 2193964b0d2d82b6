"""Questions about difficulty: functions on a `View`, which REST handlers, the CLI and the dashboard share.

Answers name the measure and which way it points. An unscored sample has nulls and the status `unscored`, never 0.
"""

import base64
import binascii
import dataclasses
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services import suspects
from services.answers import Answer, Column, of_table
from services.difficulty import DEFAULT_MEASURE, FRESH, STALE, STATUSES, UNSCORED, Moment, View, seconds
from shared.attempts import attempts
from shared.catalogue import Run
from shared.checkpoints import stable
from shared.errors import ConfigError, DataError, NoSuchVersion
from shared.events import last_events
from shared.freshness import ABANDONED
from shared.measures import MEASURES, find_measure
from shared.score_store import ScoreReader
from shared.store_view import column_array

AGE_QUANTILES = (0.5, 0.95)
VALUE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
OF_ONE_ROW = {name: rule.show for name, rule in MEASURES.items() if rule.of_one_row}
OUTCOME = ("predicted", "correct", "robust")

_UNSCORED: dict[str, Any] = {
    "value": None,
    "percentile": None,
    "status": STATUSES[UNSCORED],
    "age_versions": None,
    "age_steps": None,
    "age_s": None,
    "model_version": None,
    "step": None,
    "measures": None,
} | dict.fromkeys(OUTCOME)

Ids = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


Natural = Annotated[int, Field(ge=0, lt=2**63)]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How old a score may be; an older one is refused: it is stale, and its value and percentile are null.

    `max_age_versions` counts checkpoints of the surviving line, `max_age_s` seconds since the scoring, at `now`.
    """

    max_age_versions: int | None = None
    max_age_s: float | None = None
    now: float = dataclasses.field(default_factory=time.time)

    @property
    def is_set(self) -> bool:
        return self.max_age_versions is not None or self.max_age_s is not None

    def refuses(self, age: Any, age_s: Any) -> Any:
        """Of ages in versions and seconds, arrays or numbers; unscored ones (-1, NaN) are not refused."""
        refused = age > (np.iinfo(np.int64).max if self.max_age_versions is None else self.max_age_versions)
        if self.max_age_s is not None:
            refused = refused | (age_s > self.max_age_s)
        return refused


class Selection(BaseModel):
    """Which samples of a view, in which order: by percentile (then id), null ones last."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    measure: str = DEFAULT_MEASURE
    order: Literal["asc", "desc"] = "desc"
    label: int | None = None
    domain: str | None = None
    status: Literal["fresh", "stale", "unscored"] | None = None
    max_age_versions: Natural | None = None
    max_age_s: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None


class Cursor(BaseModel):
    """The rest of a list: of which moment, in which selection, from where on, with ages as of `now`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    store: str
    store_version: Natural
    newest_version: Natural
    newest_step: Natural
    bound: Natural
    abandoned: tuple[tuple[Natural, Natural], ...] = ()
    selection: Selection = Selection()
    start: Natural = 0
    now: Annotated[float, Field(allow_inf_nan=False)]

    @property
    def moment(self) -> Moment:
        return Moment(self.store, self.store_version, self.newest_version, self.newest_step, self.bound, self.abandoned)

    def dump(self) -> str:
        return base64.urlsafe_b64encode(self.model_dump_json(exclude_defaults=True).encode()).decode().rstrip("=")

    def check(self, asked: Mapping[str, Any]) -> None:
        """Raises ConfigError when other parameters stand beside it than those of its first page."""
        own = self.selection.model_dump()
        if unlike := sorted(name for name, value in asked.items() if own[name] != value):
            raise ConfigError(
                f"the cursor was made with another {', '.join(unlike)}",
                fix="give none beside it, or ask without cursor",
                key="cursor",
            )

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """Raises DataError for what is no cursor of this service."""
        try:
            return cls.model_validate_json(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        except (ValidationError, binascii.Error, ValueError) as error:
            raise DataError(
                f"{text[:100]!r} is not a cursor of this service",
                fix="ask without one for the first page",
                key="cursor",
            ) from error


def sample(view: View, sample_id: int, measure: str = DEFAULT_MEASURE, limits: Limits | None = None) -> dict[str, Any]:
    """Everything known of one sample: each measure of its row, status, ages, outcome.

    Raises DataError for an unknown id, ConfigError for an unknown measure.
    """
    limits = limits or Limits()
    row = view.reader.row(sample_id)
    head, about = view.head(measure), view.samples.about(sample_id)
    if row is None:
        return {**head, **about, **_UNSCORED}
    version, step, age_s = row["model_version"], row["step"], limits.now - row["scored_at"] / 1e6
    age = view.age_of(version)
    is_refused = limits.is_set and bool(limits.refuses(age, age_s))
    value_N, percentile_N = view.scores.measured(measure)
    is_dated = view.dated(age)
    with np.errstate(all="ignore"):  # a row may hold infinities
        measures = None if is_refused else {name: show(row) for name, show in OF_ONE_ROW.items()}
    return {
        **head,
        **about,
        "value": None if is_refused else value_N.item(sample_id),
        "percentile": None if is_refused else percentile_N.item(sample_id),
        "status": STATUSES[STALE] if is_refused else view.status_of(version),
        "age_versions": age if is_dated else None,
        "age_steps": max(view.newest_step - step, 0) if is_dated else None,
        "age_s": max(age_s, 0.0),
        "model_version": version,
        "step": step,
        "measures": measures,
        **{name: None if is_refused else row[name] for name in OUTCOME},
    }


def scores(view: View, ids: Any, measure: str = DEFAULT_MEASURE, limits: Limits | None = None) -> Answer:
    """Values, percentiles, statuses and ages of `ids`, in the order asked, repeats included.

    Raises DataError for an unknown id, ConfigError for an unknown measure.
    """
    wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
    return _described(view, wanted, measure, limits or Limits())


def page(view: View, cursor: Cursor, limit: int) -> tuple[Answer, Cursor | None]:
    """At most `limit` samples of a list, and where it goes on; None at its end. Raises ConfigError for a measure."""
    chosen = cursor.selection
    limits = Limits(chosen.max_age_versions, chosen.max_age_s, cursor.now)
    order = view.remembered(
        ("order", chosen, cursor.now if limits.is_set else None), lambda: _order(view, chosen, limits)
    )
    end = min(cursor.start + limit, len(order))
    following = cursor.model_copy(update={"start": end}) if end < len(order) else None
    answer = _described(view, order[cursor.start : end], chosen.measure, limits)
    rest = {"total": len(order), "next_cursor": following.dump() if following else None}
    return Answer({**answer.head, **rest}, answer.columns), following


def first_cursor(view: View, chosen: Selection) -> Cursor:
    """Of a list from its beginning."""
    return Cursor(**view.moment._asdict(), selection=chosen, now=time.time())


def history(view: View, sample_id: int, measure: str = DEFAULT_MEASURE) -> Answer:
    """The rows of one sample that are still kept, one per model_version, oldest first, with the measure's values.

    `abandoned` says that the training went on without that version, `commit` which store version brought the row;
    status and ages are what they would be were there no newer row. The value is null where the measure needs more than
    a row. Raises DataError for an unknown id, ConfigError for an unknown measure.
    """
    rule = find_measure(measure)
    rows = view.reader.history(sample_id)
    version_R, step_R = column_array(rows, "model_version"), column_array(rows, "step")
    age_R, age_s_R = view.ages(version_R), time.time() - seconds(column_array(rows, "scored_at"))
    value_R = np.full(rows.num_rows, np.nan)
    if rule.of_one_row:
        with np.errstate(all="ignore"):
            value_R = rule.show({name: column_array(rows, name) for name in rule.columns})
    named = ("sample_id", "model_version", "step", "store_version")
    columns = {name: rows.column(name) for name in rows.column_names if name not in named}
    return Answer(
        view.head(measure) | {"sample_id": sample_id},
        {
            "value": Column(value_R),
            "abandoned": Column(age_R == ABANDONED),
            "commit": rows.column("store_version"),
            **_aged(view, view.statuses(age_R), age_R, age_s_R, version_R, step_R),
            **columns,
        },
    )


def histogram(
    view: View,
    measure: str = DEFAULT_MEASURE,
    bins: int = 20,
    label: int | None = None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """How the measure's values are spread: counts between `bins` + 1 edges, and quantiles; nothing without values."""
    value_N, *_ = _judged(view, measure, limits or Limits())
    value = value_N[_mask(view, label=label) & np.isfinite(value_N)]
    counts, edges = _bins(value, bins)
    quantiles = np.quantile(value, VALUE_QUANTILES).tolist() if len(value) else [None] * len(VALUE_QUANTILES)
    return view.head(measure) | {
        "samples": len(value),
        "counts": counts.tolist(),
        "edges": edges.tolist(),
        "mean": float(value.mean()) if len(value) else None,
        "quantiles": {str(q): found for q, found in zip(VALUE_QUANTILES, quantiles, strict=True)},
    }


def _bins(value: npt.NDArray[np.float64], bins: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Counts and edges; one bin where the values differ in their last digits at most, none without values."""
    if not len(value):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    try:
        return np.histogram(value, bins)
    except ValueError:
        return np.array([len(value)]), np.array([value.min(), value.max()])


def classes(view: View, measure: str = DEFAULT_MEASURE, limits: Limits | None = None) -> Answer:
    """For each label: samples, how many are scored and fresh, mean and quantiles of the measure, share of errors.

    Scores that the limits refuse count as scored, and no further.
    """
    value_N, _, status_N, refused_N = _judged(view, measure, limits or Limits())
    correct_N = view.reader.dense("correct")
    judged_N = (correct_N >= 0) & ~refused_N
    order = np.argsort(view.samples.label_N, kind="stable")
    labels, first = np.unique(view.samples.label_N[order], return_index=True)
    groups = np.split(order, first[1:])
    values = [value_N[group][np.isfinite(value_N[group])] for group in groups]
    judged = [judged_N[group].sum() for group in groups]

    def each(of: Any) -> Column:
        return Column(np.array([float(of(value)) if len(value) else np.nan for value in values]))

    wrong = [(judged_N[group] & (correct_N[group] == 0)).sum() for group in groups]
    return Answer(
        view.head(measure),
        {
            "label": Column(labels),
            "samples": Column(np.array([len(group) for group in groups])),
            "scored": Column(np.array([(correct_N[group] >= 0).sum() for group in groups])),
            "fresh": Column(np.array([(status_N[group] == FRESH).sum() for group in groups])),
            "mean": each(np.mean),
            **{f"p{round(100 * q):02d}": each(lambda value, q=q: np.quantile(value, q)) for q in VALUE_QUANTILES},
            "error": Column(np.array([w / c if c else np.nan for w, c in zip(wrong, judged, strict=True)])),
        },
    )


def mislabelled(view: View, limit: int, limits: Limits | None = None) -> Answer:
    """The samples that look mislabelled, most suspicious first (`services.suspects`), with the estimated share.

    The value is the loss. Scores that the limits refuse stay listed, as stale.
    """
    table = view.remembered("suspects", lambda: suspects.suspects(view.reader, view.samples.table))
    share = view.remembered("share", lambda: suspects.estimate(view.reader, view.samples.table))
    rows, limits = table.slice(0, limit), limits or Limits()
    id_B = column_array(rows, "sample_id").astype(np.int64)
    scored = _described(view, id_B, "loss", limits)
    about = {name: rows.column(name) for name in ("key", "label", "clean_label") if name in rows.column_names}
    *_, refused_N = _judged(view, "loss", limits)
    refused_B, outcome = pa.array(refused_N[id_B]), {}
    for name in ("predicted", "margin", "adm"):
        column = rows.column(name)
        outcome[name] = pc.if_else(refused_B, pa.scalar(None, column.type), column)
    head = {**scored.head, "total": table.num_rows, "estimated_share": share}
    return Answer(head, {**scored.columns, **about, **outcome})


def stats(view: View, training: dict[str, Any] | None = None) -> dict[str, Any]:
    """Coverage, ages and counts of the whole run; `training` is its last epoch."""
    counted = view.remembered("stats", lambda: _counted(view))
    metadata, committed_at = view.reader.metadata, view.reader.committed_at
    return {
        "run_id": view.run.description["run_id"],
        "num_samples": view.reader.num_samples,
        **counted,
        "store_version": view.reader.version,
        "newest_model_version": view.newest_version,
        "staleness_bound": view.bound,
        "committed_at": committed_at.isoformat() if committed_at else None,
        "scored_rows": view.reader.rows,
        "newest_step": view.newest_step,
        "model_versions_scored": int(metadata.get("model_versions_scored", 0)),
        "quarantined_rows": int(metadata.get("quarantined_rows", 0)),
        "reports": dict(metadata.get("reports", {})),
        "fidelity": metadata.get("fidelity"),
        "attempts": len(attempts(view.run.path)),
        "training": training,
    }


def events(run: Run, limit: int) -> list[dict[str, Any]]:
    """The last `limit` events of the run's diary, in order."""
    return last_events(run.path, limit)


def checkpoints(run: Run) -> list[dict[str, Any]]:
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
        for c in stable(run.path)
    ]


def snapshot(view: View, reader: ScoreReader, since: int = 0) -> Answer:
    """The latest rows by sample_id, or of those samples alone that changed after store version `since`.

    Args:
        reader: the view's, or pinned to an earlier version.
    """
    head = {"store": view.store, "version": reader.version, "since": since}
    return of_table(head, reader.snapshot(since))


def check_since(view: View, reader: ScoreReader, since: int, store: str | None) -> None:
    """Raises NoSuchVersion when `since` is beyond the reader's version, or of another store than the view's."""
    fix = "ask without since for everything"
    if since and store not in (None, view.store):
        raise NoSuchVersion(f"store={store} is not the score store that is there now", fix=fix, key="store")
    if since > reader.version:
        raise NoSuchVersion(f"since={since} is beyond version {reader.version}", fix=fix, key="since")


def _counted(view: View) -> dict[str, Any]:
    dated = view.age_N[view.dated(view.age_N)]
    ages = np.quantile(dated, AGE_QUANTILES).tolist() if len(dated) else [None] * len(AGE_QUANTILES)
    count = np.bincount(view.status_N, minlength=len(STATUSES)).tolist()
    return {
        "coverage": float((view.age_N >= 0).mean()),
        "status": dict(zip(STATUSES, count, strict=True)),
        "age_versions_p50": ages[0],
        "age_versions_p95": ages[1],
    }


def _described(view: View, id_B: Ids, measure: str, limits: Limits) -> Answer:
    head = view.head(measure)
    version_B, step_B, scored_at_B = view.reader.values(id_B, ("model_version", "step", "scored_at"))
    (value_N, percentile_N), age_B = view.scores.measured(measure), view.ages(version_B)
    age_s_B = limits.now - seconds(scored_at_B)
    value_B, percentile_B, status_B = value_N[id_B], percentile_N[id_B], view.statuses(age_B)
    if limits.is_set:
        refused_B = limits.refuses(age_B, age_s_B)
        value_B[refused_B] = percentile_B[refused_B] = np.nan
        status_B[refused_B] = STALE
        head["refused"] = int(refused_B.sum())
    aged = _aged(view, status_B, age_B, age_s_B, version_B, step_B)
    return Answer(
        head, {"sample_id": Column(id_B), "value": Column(value_B), "percentile": Column(percentile_B), **aged}
    )


def _aged(
    view: View,
    status_B: npt.NDArray[np.int8],
    age_B: Ids,
    age_s_B: npt.NDArray[np.float64],
    version_B: Ids,
    step_B: Ids,
) -> dict[str, Column]:
    """Status and ages of scores, and which checkpoint they are of."""
    scored_B, dated_B = version_B >= 0, view.dated(age_B)
    return {
        "status": Column(status_B, names=STATUSES),
        "age_versions": Column(age_B, dated_B),
        "age_steps": Column(np.maximum(view.newest_step - step_B, 0), dated_B),
        "age_s": Column(np.round(np.maximum(age_s_B, 0.0), 3)),
        "model_version": Column(version_B, scored_B),
        "step": Column(step_B, scored_B),
    }


def _judged(view: View, measure: str, limits: Limits) -> tuple[Any, Any, npt.NDArray[np.int8], Bools]:
    """Value, percentile and status of all samples, and which of them the limits refuse."""
    value_N, percentile_N = view.scores.measured(measure)
    if not limits.is_set:
        return value_N, percentile_N, view.status_N, np.zeros(len(value_N), dtype=bool)
    refused_N: Bools = limits.refuses(view.age_N, limits.now - view.scores.scored_at_N)
    return (
        np.where(refused_N, np.nan, value_N),
        np.where(refused_N, np.nan, percentile_N),
        np.where(refused_N, STALE, view.status_N),
        refused_N,
    )


def _order(view: View, chosen: Selection, limits: Limits) -> Ids:
    _, percentile_N, status_N, _ = _judged(view, chosen.measure, limits)
    mask_N = _mask(view, chosen.label, chosen.domain)
    if chosen.status is not None:
        mask_N &= status_N == STATUSES.index(chosen.status)
    ids = np.flatnonzero(mask_N)
    key = percentile_N[ids] if chosen.order == "asc" else -percentile_N[ids]
    return ids[np.argsort(key, kind="stable")]  # NaN goes last


def _mask(view: View, label: int | None = None, domain: str | None = None) -> Bools:
    mask_N = np.ones(view.reader.num_samples, dtype=bool)
    if label is not None:
        mask_N &= view.samples.label_N == label
    if domain is not None:
        mask_N &= view.samples.is_of_domain(domain)
    return mask_N
