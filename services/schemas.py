"""Requests and answers of the REST service as pydantic models. Of answers they are the description alone."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from services.difficulty import DEFAULT_MEASURE
from shared.leases import MAX_REPLICAS

MAX_IDS = 100_000
MAX_PAGE = 10_000
MAX_EVENTS = 1000
MAX_BINS = 1000
MAX_CURSOR = 4096  # characters; it lists what resumes abandoned
INT64 = 2**63 - 1

MaxAgeVersions = Annotated[int | None, Field(ge=0, le=INT64, description="Refuse scores that are older.")]
MaxAgeS = Annotated[float | None, Field(ge=0, allow_inf_nan=False, description="Refuse scores that are older.")]
Status = Literal["fresh", "stale", "unscored"]


class ScoresQuery(BaseModel):
    """Which samples, by which measure; older scores than the limits are refused: stale, with nulls."""

    model_config = ConfigDict(extra="forbid")
    ids: list[Annotated[StrictInt, Field(ge=0, le=INT64)]] = Field(max_length=MAX_IDS)
    measure: str = DEFAULT_MEASURE
    max_age_versions: MaxAgeVersions = None
    max_age_s: MaxAgeS = None


class Replicas(BaseModel):
    """The wanted number of scorers."""

    model_config = ConfigDict(extra="forbid")
    replicas: Annotated[
        StrictInt, Field(json_schema_extra={"minimum": 0, "maximum": MAX_REPLICAS})
    ]  # the controller's limits


class Finding(BaseModel):
    """Where a request is wrong, and how."""

    loc: str
    msg: str


class Problem(BaseModel):
    """RFC 9457: what went wrong, what to do about it, where something can be done, and what it is about: the parameter,
    setting or file, where there is one.
    """

    type: str
    title: str
    status: int
    detail: str
    fix: str | None = None
    key: str | None = None
    errors: list[Finding] | None = None


class Head(BaseModel):
    """Which measure and which way it points; which store version; what counts as stale."""

    measure: str
    meaning: str
    store_version: int
    newest_model_version: int
    staleness_bound: int


class Sample(Head):
    """One sample."""

    sample_id: int
    key: str | None
    label: int
    clean_label: int | None
    domain: str | None
    value: float | None
    percentile: float | None
    status: Status
    age_versions: int | None
    age_steps: int | None
    age_s: float | None
    model_version: int | None
    step: int | None
    measures: dict[str, float | None] | None
    predicted: int | None
    correct: bool | None
    robust: bool | None


class Aged(BaseModel):
    """Status and ages: in checkpoints and steps of the trainer, and in seconds since the scoring."""

    status: list[Status]
    age_versions: list[int | None]
    age_steps: list[int | None]
    age_s: list[float | None]
    model_version: list[int | None]
    step: list[int | None]


class ScoreColumns(Head, Aged):
    """Columns, side by side in the order asked."""

    sample_id: list[int]
    value: list[float | None]
    percentile: list[float | None]
    refused: int | None = None


class Page(ScoreColumns):
    """A part of a list; `next_cursor` leads on, null at the end."""

    total: int
    next_cursor: str | None


class Measured(BaseModel):
    """What a scoring measured."""

    scored_at: list[str]
    margin: list[float | None]
    adversarial_margin: list[float | None]
    log_ratio: list[float | None]
    grad_norm: list[float | None]
    el2n: list[float | None]
    predicted: list[int]
    correct: list[bool]
    robust: list[bool]


class History(Head, Aged, Measured):
    """The kept rows of a sample, oldest first, each with the store version that brought it."""

    sample_id: int
    commit: list[int]
    value: list[float | None]
    abandoned: list[bool]


class Snapshot(Measured):
    """The latest rows, by sample_id. To ask for what came after: `since`, this `version`, and this `store`."""

    store: str
    version: int
    since: int
    sample_id: list[int]
    model_version: list[int]
    step: list[int]
    store_version: list[int]


class Suspects(ScoreColumns):
    """Samples that look mislabelled, most suspicious first; the value is the loss."""

    total: int
    estimated_share: float | None
    key: list[str | None]
    label: list[int]
    clean_label: list[int | None] | None = None
    predicted: list[int | None]
    margin: list[float | None]
    adm: list[float | None]


class Classes(Head):
    """Figures of each label: quantiles of the measure, share of wrong predictions among the scored."""

    label: list[int]
    samples: list[int]
    scored: list[int]
    fresh: list[int]
    mean: list[float | None]
    p05: list[float | None]
    p25: list[float | None]
    p50: list[float | None]
    p75: list[float | None]
    p95: list[float | None]
    error: list[float | None]


class Histogram(Head):
    """Counts between edges, one more than counts."""

    samples: int
    counts: list[int]
    edges: list[float]
    mean: float | None
    quantiles: dict[str, float | None]


class Stats(BaseModel):
    """The whole run; with a fleet also rates and quarantine, or why the controller does not tell."""

    run_id: str
    num_samples: int
    coverage: float
    status: dict[str, int]
    age_versions_p50: float | None
    age_versions_p95: float | None
    staleness_bound: int
    store_version: int
    committed_at: str | None
    scored_rows: int
    newest_model_version: int
    newest_step: int
    model_versions_scored: int
    quarantined_rows: int
    reports: dict[str, Any]
    samples_per_second: float | None = None
    trouble: str | None = None
    controller: str | None = None
    fidelity: dict[str, Any] | None
    attempts: int
    training: dict[str, Any] | None


class Events(BaseModel):
    """What happened last, in order."""

    events: list[dict[str, Any]]


class OneCheckpoint(BaseModel):
    """A stable checkpoint."""

    model_version: int
    step: int
    bytes: int
    sha256: str
    age_s: float


class Checkpoints(BaseModel):
    """Newest first."""

    checkpoints: list[OneCheckpoint]


class Autoscaling(BaseModel):
    """What autoscaling decided last, and why; `needed` is before limits and margins, null while rates are unknown.

    Not enabled: by its setting, or, with a reason, since somebody set the number. The rate is that of one scorer at
    work, the interval that between two checkpoints.
    """

    enabled: bool
    needed: float | None
    reason: str | None
    target_age_versions: int
    scorer_samples_per_second: float | None
    publish_interval_s: float | None


class Scorers(BaseModel):
    """Wanted and registered scorers."""

    model_config = ConfigDict(extra="allow")
    wanted: int
    autoscaler: Autoscaling
    alive: int
    scorers: list[dict[str, Any]]
    waiting: str | None


class About(BaseModel):
    """Versions, the run, and what a score row and a measure are."""

    api: str
    steppe: str
    store_format: int
    run_id: str
    num_samples: int
    dataset_fingerprint: str
    scoring_id: str
    columns: dict[str, str]
    measures: dict[str, dict[str, Any]]
    routes: list[str]


class Probe(BaseModel):
    """Whether the service answers."""

    status: Literal["ok", "waiting"]
    reason: str | None = None
