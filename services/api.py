"""The REST service: difficulty from the run's files, scorers from the controller where there is one.

Every error is problem+json (RFC 9457). Changes need the run's bearer token, and off loopback everything does.
Handlers are plain functions: they run in a thread pool and never hold up the event loop.
"""

import dataclasses
import ipaddress
import secrets
from http import HTTPStatus
from typing import Annotated, Any, Protocol

import orjson
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from services.queries import Difficulty
from shared.catalogue import Run
from shared.errors import ConfigError, DataError, ServiceError, SteppeError, StoreError

MAX_IDS = 100_000
MAX_EVENTS = 1000
STATUS_OF_ERROR: list[tuple[type[SteppeError], int]] = [  # the first that fits
    (DataError, 404),
    (ConfigError, 422),
    (StoreError, 503),
    (ServiceError, 503),
]


class Fleet(Protocol):
    """What REST asks of the controller. Raises ServiceError when it does not answer."""

    def status(self) -> dict[str, Any]: ...

    def set_wanted(self, replicas: int) -> None: ...


class ScoresQuery(BaseModel):
    """Which samples, by which measure."""

    model_config = ConfigDict(extra="forbid")
    ids: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(max_length=MAX_IDS)
    measure: str = "adm"


class Replicas(BaseModel):
    """The wanted number of scorers."""

    model_config = ConfigDict(extra="forbid")
    replicas: int


def create_app(run: Run, *, fleet: Fleet | None = None, token: str | None = None, loopback: bool = True) -> FastAPI:
    """The application for one run.

    Args:
        fleet: the controller; without one the scorers' routes answer 503.
        token: bearer token for changes; None refuses every change.
        loopback: whether only this machine can connect; else the token is needed for everything.
    """
    # Off loopback everything needs the token, the documentation included; browsers cannot send it, so there is none.
    documented: dict[str, Any] = {} if loopback else {"openapi_url": None, "docs_url": None, "redoc_url": None}
    app = FastAPI(
        title="steppe", description="Difficulty of training samples, live.", default_response_class=Json, **documented
    )
    guard, difficulty = Guard(token, loopback), Difficulty(run)
    _add_probes(app, difficulty)
    _add_difficulty(app, difficulty, fleet, guard)
    _add_scorers(app, fleet, guard)
    _add_error_handlers(app)
    return app


@dataclasses.dataclass(frozen=True)
class Guard:
    """Who may do what: on loopback everyone reads; changes, and everything off loopback, need the run's token."""

    token: str | None
    loopback: bool

    def may_read(self, request: Request) -> None:
        if not self.loopback:
            self.may_change(request)

    def may_change(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise HTTPException(
                401, "send the run's token, which is in its file `token`: Authorization: Bearer <token>"
            )
        if self.token is None or not secrets.compare_digest(given.encode(), self.token.encode()):
            raise HTTPException(403, "this is not the run's token; it is in the run folder's file `token`")


def _add_probes(app: FastAPI, difficulty: Difficulty) -> None:
    @app.get("/livez")
    def livez() -> dict[str, Any]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    def readyz(response: Response) -> dict[str, Any]:
        """Scores can be asked for; 503 with the reason before that."""
        missing = difficulty.ready()
        response.status_code = 503 if missing else 200
        return {"status": "waiting", "reason": missing} if missing else {"status": "ok"}


def _add_difficulty(app: FastAPI, difficulty: Difficulty, fleet: Fleet | None, guard: Guard) -> None:
    reading = [Depends(guard.may_read)]

    @app.get("/v1/samples/{sample_id}", dependencies=reading)
    def get_sample(sample_id: int) -> dict[str, Any]:
        """All measures, status and ages of one sample."""
        return difficulty.sample(sample_id)

    @app.post("/v1/scores:query", dependencies=reading)
    def query_scores(query: ScoresQuery) -> dict[str, Any]:
        """Values, percentiles, statuses and ages of many samples, as columns. Changes nothing."""
        return difficulty.scores(query.ids, query.measure)

    @app.get("/v1/stats", dependencies=reading)
    def get_stats() -> dict[str, Any]:
        """Coverage, ages, counts; with a fleet also rates and quarantine."""
        stats = difficulty.stats()
        if fleet is not None:
            try:
                status = fleet.status()
            except ServiceError as error:
                return stats | {"controller": str(error)}
            stats |= {key: status[key] for key in ("samples_per_second", "quarantined_rows", "trouble")}
        return stats

    @app.get("/v1/events", dependencies=reading)
    def get_events(limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 100) -> dict[str, Any]:
        """What happened last, in order: published, committed, scorers up and down, quarantine, resumes."""
        return {"events": difficulty.events(limit)}

    @app.get("/v1/checkpoints", dependencies=reading)
    def get_checkpoints() -> dict[str, Any]:
        """Stable checkpoints, newest first."""
        return {"checkpoints": difficulty.checkpoints()}


def _add_scorers(app: FastAPI, fleet: Fleet | None, guard: Guard) -> None:
    def the_fleet() -> Fleet:
        if fleet is None:
            raise ServiceError(
                "this service runs without scorers: the run is not up, or it is scored inside its training"
            )
        return fleet

    @app.get("/v1/scorers", dependencies=[Depends(guard.may_read)])
    def get_scorers() -> dict[str, Any]:
        """Wanted and registered scorers."""
        return _describe_fleet(the_fleet())

    @app.patch("/v1/scorers", dependencies=[Depends(guard.may_change)])
    def scale_scorers(wanted: Replicas) -> dict[str, Any]:
        """Set the wanted number of scorers; the driver starts or drains them within a second or so."""
        the_fleet().set_wanted(wanted.replicas)
        return _describe_fleet(the_fleet())


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(SteppeError)
    def on_steppe_error(_: Request, error: SteppeError) -> Response:
        status = next((status for kind, status in STATUS_OF_ERROR if isinstance(error, kind)), 500)
        return problem(status, str(error))

    @app.exception_handler(Exception)
    def on_unexpected_error(_: Request, error: Exception) -> Response:
        return problem(500, f"{type(error).__name__}: {error}; the service's log has more")

    @app.exception_handler(HTTPException)
    def on_http_error(_: Request, error: HTTPException) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else {}
        return problem(error.status_code, str(error.detail), headers | dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    def on_invalid_request(_: Request, error: RequestValidationError) -> Response:
        findings = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        return problem(422, "; ".join(findings))


class Json(JSONResponse):
    """JSON in which NaN, which JSON does not know, is null."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """An RFC 9457 answer."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return Json(body, status, headers, media_type="application/problem+json")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _describe_fleet(fleet: Fleet) -> dict[str, Any]:
    status = fleet.status()
    keys = ("wanted", "scorers", "pid", "samples_per_second", "leases_expired", "leased", "blocks", "trouble")
    return {key: status[key] for key in keys} | {"alive": len(status["scorers"])}
