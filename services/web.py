"""What every route of the REST service shares: errors as problem+json, tokens, formats, limits on bodies.

Nothing here knows of difficulty.
"""

import dataclasses
import functools
import gzip
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any

import orjson
import pyarrow as pa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from services.answers import Answer, arrow_stream
from shared.errors import ConfigError, DataError, NoSuchVersion, RunError, ServiceError, SteppeError, StoreError

JSON, ARROW, PROBLEM = "application/json", "application/vnd.apache.arrow.stream", "application/problem+json"
MAX_BODY_BYTES = 4 << 20
GZIP_FROM_BYTES = 4096
PROBES = ("/livez", "/readyz")
STATUS_OF_ERROR: list[tuple[type[SteppeError], int]] = [  # the first that fits
    (DataError, 404),
    (NoSuchVersion, 404),
    (ConfigError, 422),
    (StoreError, 503),
    (RunError, 503),
    (ServiceError, 503),
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Json(JSONResponse):
    """JSON in which NaN, which JSON does not know, is null; numpy's arrays are written as they are."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def problem(
    status: int, detail: str, fix: str = "", headers: Mapping[str, str] | None = None, *, key: str = "", **more: Any
) -> Response:
    """Make an RFC 9457 answer; `fix` and `key`, where there are such, and `more` are its extension members."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    told = {name: text for name, text in (("fix", fix), ("key", key)) if text}
    return Json(body | told | more, status, headers, media_type=PROBLEM)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the application is a problem."""

    @app.exception_handler(SteppeError)
    def on_steppe_error(_: Request, error: SteppeError) -> Response:
        status = next((status for kind, status in STATUS_OF_ERROR if isinstance(error, kind)), 500)
        headers = {"Retry-After": "1"} if status == 503 else None
        return problem(status, error.problem, error.fix, headers, key=error.key)

    @app.exception_handler(Exception)
    def on_unexpected_error(_: Request, error: Exception) -> Response:
        return problem(500, f"{type(error).__name__}: {error}", "look into the service's log for more")

    @app.exception_handler(HTTPException)
    def on_http_error(_: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's of a body that is no text
            return problem(422, "body: it is not JSON", f"send UTF-8 text with Content-Type: {JSON}")
        fix = "see what /v1 lists" if error.status_code in (404, 405) else getattr(error, "fix", "")
        return problem(error.status_code, str(error.detail), fix, error.headers)

    @app.exception_handler(RequestValidationError)
    def on_invalid_request(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "none").partition(";")[0]
        if kind != JSON and any(item["loc"] == ("body",) for item in error.errors()):
            return problem(422, f"body: its Content-Type is {kind[:100]}", f"send Content-Type: {JSON}")
        findings = [{"loc": ".".join(str(part) for part in item["loc"]), "msg": item["msg"]} for item in error.errors()]
        detail = "; ".join("{loc}: {msg}".format_map(one) for one in findings[:8])
        fix = f"correct {', '.join(dict.fromkeys(one['loc'] for one in findings[:8]))}"
        return problem(422, detail, fix, errors=findings[:100])


@dataclasses.dataclass(frozen=True)
class Guard:
    """Who may do what: on loopback everyone reads; changes, and everything off loopback, need the run's token.

    A web page anywhere can have its own name mean 127.0.0.1 (DNS rebinding), and a browser then takes it for the origin
    of what is answered here. Such a request has that name as its Host, and needs the token too.
    """

    token: str | None
    loopback: bool

    def trusts(self, scope: Scope) -> bool:
        """Whether everything may be told to a request without the token."""
        return self.loopback and not can_be_rebound(dict(scope["headers"]).get(b"host", b""))

    def refusal(self, scope: Scope) -> Response | None:
        """What a request gets that lacks the token; None when it may pass. Before anything of it is read."""
        if scope["method"] == "OPTIONS" or scope["path"] in PROBES:
            return None  # nothing of the run is told
        is_trusted = self.trusts(scope)
        if is_trusted and scope["method"] != "PATCH":
            return None
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            fix = "send it as Authorization: Bearer <token>; it is in the run folder's file `token`"
            if self.loopback and not is_trusted:
                fix += "; or read without it at http://localhost or http://127.0.0.1"
            return problem(401, "the run's token is missing", fix, {"WWW-Authenticate": "Bearer"})
        if self.token is None or not secrets.compare_digest(given, self.token.encode()):
            return problem(403, "this is not the run's token", "send the one in the run folder's file `token`")
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@functools.lru_cache(64)
def can_be_rebound(host: bytes) -> bool:
    """Whether a Host header, with a port or without, is a name that a stranger can own: a domain, no address."""
    if host.startswith(b"["):
        return False
    name = host.decode("latin-1").partition(":")[0].rstrip(".")
    return "." in name and not name.endswith(".localhost") and not _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def respond(request: Request, answer: Answer, compression: str | None = None) -> Response:
    """The answer in the format that the request accepts: JSON, gzipped where accepted, or an Arrow stream."""
    if wants_arrow(request):
        return stream(answer.table(), compression)
    return json_of(request, answer.json())


def json_of(request: Request, content: Any) -> Response:
    """JSON, gzipped where it is long and the request accepts that."""
    response = Json(content, headers={"Vary": "Accept, Accept-Encoding"})
    if len(response.body) >= GZIP_FROM_BYTES and _quality(request.headers.get("accept-encoding", ""), "gzip"):
        response.body = gzip.compress(response.body, compresslevel=1)
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Content-Length"] = str(len(response.body))
    return response


def stream(table: pa.Table, compression: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """An Arrow stream; it is never compressed again."""
    pieces: Iterator[bytes] = arrow_stream(table, compression)
    return StreamingResponse(pieces, media_type=ARROW, headers={"Vary": "Accept"} | dict(headers or {}))


def wants_arrow(request: Request) -> bool:
    """By Accept; JSON where both are as welcome. Raises Refused (406) when neither is accepted."""
    accept = request.headers.get("accept", "*/*")
    if accept in ("*/*", JSON):
        return False
    quality = {JSON: _quality(accept, JSON), ARROW: _quality(accept, ARROW)}
    if not any(quality.values()):
        raise Refused(406, f"Accept: {accept[:200]} names neither {JSON} nor {ARROW}", "accept one of them")
    return quality[ARROW] > quality[JSON]


def _quality(accept: str, kind: str) -> float:
    """RFC 9110, 12.5.1: of the ranges that match, the most exact counts."""
    ranks = {kind: 3, f"{kind.partition('/')[0]}/*": 2, "*/*": 1}
    best, quality = 0, 0.0
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        if ranks.get(name, 0) > best:
            best = ranks[name]
            weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
            try:
                quality = float(weight)
            except ValueError:
                quality = 0.0
    return quality


class Refused(HTTPException):
    """A request that cannot be answered, with what to do about it."""

    def __init__(self, status: int, detail: str, fix: str) -> None:
        super().__init__(status, detail)
        self.fix = fix


class TooLong(Refused):
    """A body beyond the limit."""

    def __init__(self) -> None:
        super().__init__(413, f"the body is longer than {MAX_BODY_BYTES} bytes", "ask in several requests")


class BodyLimit:
    """Refuses a body beyond `MAX_BODY_BYTES`, by its stated length or as it comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stated = next((value for name, value in scope.get("headers", ()) if name == b"content-length"), b"0")
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        if not stated.isdigit() or int(stated) > MAX_BODY_BYTES:
            error = TooLong()
            await problem(413, error.detail, error.fix)(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > MAX_BODY_BYTES:
                raise TooLong
            return message

        await self._app(scope, counted, send)
