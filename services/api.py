"""The REST service: difficulty from the run's files, scorers from the controller where there is one.

Every error is problem+json (RFC 9457). Changes need the run's bearer token, and off loopback everything does. Handlers
are thin: what they answer is in `services.queries`. Plain ones run in a thread pool and never hold up the event loop.
"""

import asyncio
import importlib.metadata
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, Protocol

import orjson
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from services import queries, schemas
from services.difficulty import DEFAULT_MEASURE, Difficulty, View
from services.images import MAX_SCALE, Pictures
from services.metrics import CONTENT_TYPE, Metrics
from services.openapi import add_documentation, answers, described
from services.web import (
    BodyLimit,
    Guard,
    Json,
    Message,
    Receive,
    Scope,
    Send,
    add_error_handlers,
    is_loopback,
    json_of,
    respond,
    wants_arrow,
)
from shared.catalogue import Run
from shared.errors import ConfigError, ServiceError, SteppeError
from shared.measures import MEASURES
from shared.schema import SNAPSHOT_SCHEMA
from shared.store_files import FORMAT

__all__ = ["Fleet", "create_app", "is_loopback"]

INLINE_IDS = 4096  # so many are answered at once; more by a thread
FLEET_FACTS = ("samples_per_second", "quarantined_rows", "trouble")
SCORERS_FACTS = (
    *("wanted", "autoscaler", "scorers", "pid", "samples_per_second"),
    *("leases_expired", "leased", "blocks", "waiting", "trouble"),
)
_SAMPLE = re.compile(r"/v1/samples/([0-9]{1,18})")
_SAMPLE_ROUTE, _QUERY_ROUTE = "/v1/samples/{sample_id}", "/v1/scores:query"

Measure = Annotated[str, Query(description="Such as adm, loss, margin; /v1 lists them.")]
MaxAgeVersions = Annotated[schemas.MaxAgeVersions, Query()]
MaxAgeS = Annotated[schemas.MaxAgeS, Query()]
Label = Annotated[int | None, Query(ge=-schemas.INT64, le=schemas.INT64, description="Only samples of this label.")]


class Fleet(Protocol):
    """What REST asks of the controller. Raises ServiceError when it does not answer."""

    def status(self) -> dict[str, Any]: ...

    def set_wanted(self, replicas: int) -> None: ...


class Service(FastAPI):
    """The application; it notes how long each request takes, and answers what is asked most before all routing."""

    metrics: Metrics
    guard: Guard
    shortcut: "Shortcut | None" = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        began, status, is_head = time.perf_counter(), 500, scope["method"] == "HEAD"
        if (refusal := self.guard.refusal(scope)) is not None:
            await refusal(scope, receive, send)
            self.metrics.observe("any", "refused", refusal.status_code, time.perf_counter() - began)
            return
        if self.shortcut is not None:
            short, receive = await self.shortcut.answer(scope, receive)
            if short is not None:
                await send(short.start)
                await send(short.body)
                self.metrics.observe(scope["method"], short.route, 200, time.perf_counter() - began)
                return

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        if is_head:  # as GET, without the body
            scope = {**scope, "method": "GET"}
        try:
            await super().__call__(scope, receive, noted)
        finally:
            route = scope.get("route")
            pattern = route.path if isinstance(route, APIRoute) else "none"
            self.metrics.observe(scope["method"] if route else "any", pattern, status, time.perf_counter() - began)


class Short:
    """An answer in JSON as two ASGI messages."""

    def __init__(self, route: str, content: Any) -> None:
        body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", b"application/json"),
            (b"vary", b"Accept, Accept-Encoding"),
        ]
        self.route = route
        self.start = {"type": "http.response.start", "status": 200, "headers": headers}
        self.body = {"type": "http.response.body", "body": body}


class Shortcut:
    """Plain requests for one sample or for many, as their routes answer them, in a fraction of the time.

    What is not plain, or goes wrong, is left to the routes.
    """

    def __init__(self, difficulty: Difficulty) -> None:
        self._difficulty = difficulty

    async def answer(self, scope: Scope, receive: Receive) -> tuple[Short | None, Receive]:
        """The answer, or None; and what is to be received by the one who answers then."""
        path: str = scope["path"]
        if scope["query_string"]:
            return None, receive
        if scope["method"] == "GET" and (found := _SAMPLE.fullmatch(path)):
            return await self._sample(int(found[1])), receive
        if scope["method"] == "POST" and path == _QUERY_ROUTE and _is_plain(scope["headers"]):
            message = await receive()
            short = None if message.get("more_body") else await self._scores(message.get("body", b""))
            return short, receive if short else _received_again(message, receive)
        return None, receive

    async def _sample(self, sample_id: int) -> Short | None:
        try:
            return Short(_SAMPLE_ROUTE, queries.sample(await _view_of(self._difficulty), sample_id))
        except Exception:  # its route says what is wrong
            return None

    async def _scores(self, body: bytes) -> Short | None:
        try:
            query = schemas.ScoresQuery.model_validate_json(body)
            view = await _view_of(self._difficulty)
            if len(query.ids) > INLINE_IDS or not view.scores.is_prepared(query.measure):
                return None
            limits = queries.Limits(query.max_age_versions, query.max_age_s)
            return Short(_QUERY_ROUTE, queries.scores(view, query.ids, query.measure, limits).json())
        except Exception:  # its route says what is wrong
            return None


async def _check_parameters(request: Request) -> None:
    """Raises ConfigError for parameters that the route does not have: a misspelt limit would be none."""
    known = sorted(field.alias for field in request.scope["route"].dependant.query_params)
    if unknown := sorted(request.query_params.keys() - set(known)):
        raise ConfigError(
            f"query.{unknown[0]}: there is no such parameter here",
            fix=f"choose one of {', '.join(known)}" if known else "give none",
            key=unknown[0],
        )


async def _view_of(difficulty: Difficulty) -> View:
    """The view to answer from, of which one request at a time waits for the next."""
    view = difficulty.at_hand()
    return await asyncio.to_thread(difficulty.follow) if view is None else view


async def _about(view: View, measure: str, size: int, answer: Callable[[], Response]) -> Response:
    """The answer: at once where that is quick, else by a thread."""
    is_quick = size <= INLINE_IDS and view.scores.is_prepared(measure)
    return answer() if is_quick else await asyncio.to_thread(answer)


def _is_plain(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether JSON comes and JSON is to go, as it is."""
    named = dict(headers)
    return (
        named.get(b"content-type") == b"application/json"
        and named.get(b"accept", b"*/*") in (b"*/*", b"application/json")
        and b"gzip" not in named.get(b"accept-encoding", b"")
    )


def _received_again(message: Message, receive: Receive) -> Receive:
    """Gives `message` first, and then what comes."""
    pending = [message]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again


def create_app(
    run: Run,
    *,
    fleet: Fleet | None = None,
    token: str | None = None,
    loopback: bool = True,
    cors_origins: Sequence[str] = (),
) -> Service:
    """The application for one run.

    Args:
        fleet: the controller; without one the scorers' routes answer 503.
        token: bearer token for changes; None refuses every change.
        loopback: whether only this machine can connect; else the token is needed for everything.
        cors_origins: of web pages that may ask, such as http://localhost:3000; none by default.
    """
    # Off loopback everything needs the token, the documentation included; browsers cannot send it, so there is none.
    app = Service(
        title="steppe",
        version="1",
        description="Difficulty of training samples, live.",
        default_response_class=Json,
        openapi_url="/openapi.json" if loopback else None,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    difficulty = Difficulty(run)
    app.guard = Guard(token, loopback)
    app.metrics = Metrics(lambda: _stats_for_metrics(difficulty, fleet))
    if not cors_origins:
        app.shortcut = Shortcut(difficulty)
    app.include_router(_probes(difficulty, app.guard))
    for router in (
        _samples(difficulty),
        _lists(difficulty),
        _run(difficulty, fleet, app),
        _scorers(fleet),
    ):
        app.include_router(router, dependencies=[Depends(_check_parameters)])
    add_error_handlers(app)
    app.add_middleware(BodyLimit)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST", "PATCH"],
            allow_headers=["Authorization", "Content-Type", "If-None-Match"],
            expose_headers=["ETag", "Link", "Retry-After", "WWW-Authenticate"],
        )
    if loopback:
        add_documentation(app)
    app.openapi = lambda: described(app)  # type: ignore[method-assign]
    return app


def _probes(difficulty: Difficulty, guard: Guard) -> APIRouter:
    router = APIRouter(tags=["probes"])

    @router.get("/livez", responses=answers(schemas.Probe))
    async def livez() -> Response:
        """The process answers."""
        return Json({"status": "ok"})

    @router.get("/readyz", responses=answers(schemas.Probe) | {503: {"model": schemas.Probe}})
    def readyz(request: Request) -> Response:
        """Scores can be asked for; 503 with the reason before that."""
        missing = difficulty.missing()
        if missing is None:
            return Json({"status": "ok"})
        reason = (
            missing if guard.trusts(request.scope) else "no scores can be asked for; with the token /v1/stats says why"
        )
        return Json({"status": "waiting", "reason": reason}, 503)

    return router


def _samples(difficulty: Difficulty) -> APIRouter:
    router, pictures = APIRouter(tags=["samples"]), Pictures(difficulty.run)

    @router.get(_SAMPLE_ROUTE, responses=answers(schemas.Sample, 404))
    async def get_sample(
        sample_id: int,
        measure: Measure = DEFAULT_MEASURE,
        max_age_versions: MaxAgeVersions = None,
        max_age_s: MaxAgeS = None,
    ) -> Response:
        """All measures of its row, percentile, status and ages of one sample."""
        limits = queries.Limits(max_age_versions, max_age_s)
        view = await _view_of(difficulty)
        return await _about(view, measure, 1, lambda: Json(queries.sample(view, sample_id, measure, limits)))

    @router.get("/v1/samples/{sample_id}/history", responses=answers(schemas.History, 404, arrow=True))
    def get_history(request: Request, sample_id: int, measure: Measure = DEFAULT_MEASURE) -> Response:
        """The kept rows of one sample, one per model_version, oldest first."""
        return respond(request, queries.history(difficulty.view(), sample_id, measure))

    @router.get(
        "/v1/samples/{sample_id}/image", response_class=Response, responses=answers(None, 304, 404, media="image/png")
    )
    def get_image(request: Request, sample_id: int, scale: Annotated[int, Query(ge=1, le=MAX_SCALE)] = 1) -> Response:
        """The image as PNG, each pixel `scale` times as large."""
        difficulty.samples.check(sample_id)
        tag = f'"{difficulty.run.description["dataset_fingerprint"]}-{sample_id}-{scale}"'
        headers = {"ETag": tag, "Cache-Control": "private, max-age=86400"}
        if _has(request, tag):
            return Response(status_code=304, headers=headers)
        return Response(pictures.png(sample_id, scale), media_type="image/png", headers=headers)

    return router


def _lists(difficulty: Difficulty) -> APIRouter:
    router = APIRouter(tags=["scores"])

    @router.post(_QUERY_ROUTE, responses=answers(schemas.ScoreColumns, 404, 413, arrow=True))
    async def query_scores(request: Request, query: schemas.ScoresQuery) -> Response:
        """Values, percentiles, statuses and ages of many samples, as columns. Changes nothing."""
        limits = queries.Limits(query.max_age_versions, query.max_age_s)
        view = await _view_of(difficulty)

        def answer() -> Response:
            return respond(request, queries.scores(view, query.ids, query.measure, limits))

        return await _about(view, query.measure, len(query.ids), answer)

    @router.get("/v1/scores", responses=answers(schemas.Page, 404, arrow=True))
    def list_scores(
        request: Request,
        measure: Annotated[str | None, Query(description="Such as adm, loss, margin; /v1 lists them.")] = None,
        order: Annotated[Literal["asc", "desc"] | None, Query(description="By percentile; desc by default.")] = None,
        label: Label = None,
        domain: Annotated[str | None, Query(description="Only samples of this domain.")] = None,
        status: Annotated[schemas.Status | None, Query(description="Only samples of this status.")] = None,
        max_age_versions: MaxAgeVersions = None,
        max_age_s: MaxAgeS = None,
        limit: Annotated[int, Query(ge=1, le=schemas.MAX_PAGE)] = 100,
        cursor: Annotated[
            str | None,
            Query(
                max_length=schemas.MAX_CURSOR, description="`next_cursor` of the page before; it says all but limit."
            ),
        ] = None,
    ) -> Response:
        """Samples by percentile, hardest first, in pages that belong to one store version; null ones come last."""
        asked = {
            "measure": measure,
            "order": order,
            "label": label,
            "domain": domain,
            "status": status,
            "max_age_versions": max_age_versions,
            "max_age_s": max_age_s,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        if cursor is None:
            view = difficulty.view()
            at = queries.first_cursor(view, queries.Selection.model_validate(asked))
        else:
            at = queries.Cursor.parse(cursor)
            at.check(asked)
            view = difficulty.view_at(at.moment)
        answer, following = queries.page(view, at, limit)
        response = respond(request, answer)
        if following is not None:
            difficulty.keep(view)
            url = request.url.replace(query="").include_query_params(cursor=following.dump(), limit=limit)
            response.headers["Link"] = f'<{url}>; rel="next"'
        return response

    @router.get("/v1/scores/snapshot", responses=answers(schemas.Snapshot, 304, 404, arrow=True))
    def get_snapshot(
        request: Request,
        version: Annotated[int | None, Query(ge=0, le=schemas.INT64, description="Default: the newest.")] = None,
        since: Annotated[int, Query(ge=0, le=schemas.INT64, description="Only what came after this version.")] = 0,
        store: Annotated[str | None, Query(description="Whose version `since` is; 404 when another is there.")] = None,
        compression: Annotated[Literal["lz4", "zstd"] | None, Query(description="Of the Arrow buffers.")] = None,
    ) -> Response:
        """The latest row of each scored sample by sample_id; `since` a version only those that changed after it."""
        view = difficulty.view()
        reader = view.reader.pinned(version)
        queries.check_since(view, reader, since, store)
        form = f"arrow-{compression}" if wants_arrow(request) else "json"
        at = reader.committed_at if reader.version == view.reader.version else ""  # an earlier one is what it is
        tag = f'W/"{view.moment.store}-{reader.version}-{at}-{since}-{form}"'.replace(" ", "T")
        headers = {"ETag": tag, "Cache-Control": "no-cache", "Vary": "Accept, Accept-Encoding"}
        if _has(request, tag):
            return Response(status_code=304, headers=headers)
        response = respond(request, queries.snapshot(view, reader, since), compression)
        response.headers.update(headers)
        return response

    @router.get("/v1/suspects", responses=answers(schemas.Suspects, arrow=True))
    def get_suspects(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=schemas.MAX_PAGE)] = 100,
        max_age_versions: MaxAgeVersions = None,
        max_age_s: MaxAgeS = None,
    ) -> Response:
        """Samples that look mislabelled, most suspicious first."""
        limits = queries.Limits(max_age_versions, max_age_s)
        return respond(request, queries.mislabelled(difficulty.view(), limit, limits))

    @router.get("/v1/histogram", responses=answers(schemas.Histogram))
    def get_histogram(
        request: Request,
        measure: Measure = DEFAULT_MEASURE,
        bins: Annotated[int, Query(ge=1, le=schemas.MAX_BINS)] = 20,
        label: Label = None,
        max_age_versions: MaxAgeVersions = None,
        max_age_s: MaxAgeS = None,
    ) -> Response:
        """How a measure's values are spread, with quantiles."""
        limits = queries.Limits(max_age_versions, max_age_s)
        return json_of(request, queries.histogram(difficulty.view(), measure, bins, label, limits))

    @router.get("/v1/classes", responses=answers(schemas.Classes, arrow=True))
    def get_classes(
        request: Request,
        measure: Measure = DEFAULT_MEASURE,
        max_age_versions: MaxAgeVersions = None,
        max_age_s: MaxAgeS = None,
    ) -> Response:
        """Figures of each label."""
        limits = queries.Limits(max_age_versions, max_age_s)
        return respond(request, queries.classes(difficulty.view(), measure, limits))

    return router


def _run(difficulty: Difficulty, fleet: Fleet | None, app: Service) -> APIRouter:
    router, run = APIRouter(tags=["run"]), difficulty.run

    @router.get("/v1", responses=answers(schemas.About))
    async def get_about() -> Response:
        """Versions, the run, columns, measures and routes."""
        return Json(
            {
                "api": "v1",
                "steppe": importlib.metadata.version("steppe"),
                "store_format": FORMAT,
                **{key: run.description[key] for key in ("run_id", "num_samples", "dataset_fingerprint", "scoring_id")},
                "columns": {field.name: str(field.type) for field in SNAPSHOT_SCHEMA},
                "measures": {
                    name: {"meaning": f"higher is more difficult: {rule.meaning}", "of_one_row": rule.of_one_row}
                    for name, rule in MEASURES.items()
                },
                "routes": routes_of(app),
            }
        )

    @router.get("/v1/stats", responses=answers(schemas.Stats))
    def get_stats() -> Response:
        """Coverage, ages, counts; with a fleet also rates and quarantine."""
        stats = queries.stats(difficulty.view(), difficulty.last_epoch())
        if fleet is not None:
            try:
                status = fleet.status()
            except ServiceError as error:
                return Json(stats | {"controller": str(error)})
            stats |= {key: status[key] for key in FLEET_FACTS}
        return Json(stats)

    @router.get("/v1/events", responses=answers(schemas.Events))
    def get_events(limit: Annotated[int, Query(ge=1, le=schemas.MAX_EVENTS)] = 100) -> Response:
        """What happened last, in order: published, committed, scorers up and down, quarantine, resumes."""
        return Json({"events": queries.events(run, limit)})

    @router.get("/v1/checkpoints", responses=answers(schemas.Checkpoints))
    def get_checkpoints() -> Response:
        """Stable checkpoints, newest first."""
        return Json({"checkpoints": queries.checkpoints(run)})

    @router.get("/metrics", response_class=Response, responses=answers(None, media="text/plain"))
    def get_metrics() -> Response:
        """For Prometheus."""
        return Response(app.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


def _scorers(fleet: Fleet | None) -> APIRouter:
    router = APIRouter(tags=["scorers"])

    def the_fleet() -> Fleet:
        if fleet is None:
            raise ServiceError(
                "this service runs without scorers: the run is not up, or it is scored inside its training",
                fix="ask that of a run that is up and scored beside its training",
            )
        return fleet

    @router.get("/v1/scorers", responses=answers(schemas.Scorers))
    def get_scorers() -> Response:
        """Wanted and registered scorers, and what autoscaling decided last."""
        return Json(_describe_fleet(the_fleet()))

    @router.patch("/v1/scorers", responses=answers(schemas.Scorers, 401, 403, 413))
    def scale_scorers(wanted: schemas.Replicas) -> Response:
        """Set the wanted number of scorers; the driver starts or drains them within a second or so.

        That ends autoscaling until this attempt ends.
        """
        the_fleet().set_wanted(wanted.replicas)
        return Json(_describe_fleet(the_fleet()))

    return router


def routes_of(app: FastAPI) -> list[str]:
    """Method and path of all that the API answers; the documentation's pages do not count."""
    return [f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods]


def _describe_fleet(fleet: Fleet) -> dict[str, Any]:
    status = fleet.status()
    return {key: status[key] for key in SCORERS_FACTS} | {"alive": len(status["scorers"])}


def _stats_for_metrics(difficulty: Difficulty, fleet: Fleet | None) -> dict[str, Any] | None:
    try:
        stats = queries.stats(difficulty.view())
        if fleet is not None:
            stats |= _describe_fleet(fleet)
    except ServiceError:
        return stats
    except (SteppeError, OSError):
        return None
    return stats


def _has(request: Request, tag: str) -> bool:
    """Whether the client has it already (If-None-Match, RFC 9110, 13.1.2)."""
    given = request.headers.get("if-none-match", "")
    known = [one.strip().removeprefix("W/") for one in given.split(",")]
    return given.strip() == "*" or tag.removeprefix("W/") in known
