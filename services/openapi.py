"""The service's description of itself: `python -m services.openapi` writes it to services/openapi.json anew.

Answers are not made by the models that describe them; tests compare the two.
"""

import importlib.resources
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from services.schemas import Problem
from services.web import ARROW, JSON, PROBES, PROBLEM

FILE = Path(__file__).with_name("openapi.json")
_WRONG = (401, 403, 503)  # of every other route
_PROBLEM = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_REASONS = {
    304: "The client has it already.",
    401: "The token is missing.",
    403: "Not the run's token.",
    404: "No such sample, version or cursor.",
    406: "Neither JSON nor Arrow is accepted.",
    413: "The body is too long.",
    422: "The request is wrong; the answer says where.",
    503: "The store, the run or the controller does not answer now.",
}


def answers(
    model: type[BaseModel] | None, *further: int, arrow: bool = False, media: str = JSON
) -> dict[int | str, dict[str, Any]]:
    """How a route answers: with this model, as an Arrow stream too, or a file of another type; and with what else."""
    good: dict[str, Any] = {"description": "The answer."}
    if model is not None:
        good["model"] = model
    if arrow:
        good["content"] = {ARROW: {"schema": {"type": "string", "format": "binary"}}}
    if media != JSON:
        good["content"] = {media: {"schema": {"type": "string", "format": "binary"}}}
    wrong: dict[int | str, dict[str, Any]] = {
        status: {"description": _REASONS[status]} | ({"model": Problem} if status >= 400 else {})
        for status in sorted({*further, *((406,) if arrow else ())})
    }
    return {200: good, **wrong}


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: errors are problems, and the token is the one way in."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _correct(operation, is_probe=path in PROBES, is_change=method == "patch")
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema


def _correct(operation: dict[str, Any], *, is_probe: bool, is_change: bool) -> None:
    """What FastAPI cannot know of it."""
    found = operation["responses"]
    if is_probe:
        found.pop("422", None)
        return
    operation["security"] = [{"token": []}] if is_change else [{}, {"token": []}]
    for status in _WRONG:
        found.setdefault(str(status), {})
    for status in found:
        if status == "304":
            found[status] = {"description": _REASONS[304]}
        elif int(status) >= 400:
            found[status] = {"description": _REASONS[int(status)], "content": _PROBLEM}


def add_documentation(app: FastAPI) -> None:
    """`/docs`, with scripts that come from this service and not from elsewhere."""
    static = importlib.resources.files("fastapi_offline") / "static"
    app.mount("/static", StaticFiles(directory=str(static)), name="static")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=str(app.openapi_url),
            title="steppe",
            swagger_js_url="/static/swagger-ui-bundle.js",
            swagger_css_url="/static/swagger-ui.css",
            swagger_favicon_url="/static/favicon.png",
        )


def main() -> None:
    """Write the document anew."""
    from services.api import create_app
    from shared.catalogue import Run
    from shared.samples import Images

    with tempfile.TemporaryDirectory() as place:
        one = Images(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int64), white=1, num_classes=1)
        run = Run.create(Path(place) / "run", dataset_fingerprint="", train=one, config={}, scoring_id="")
        document = create_app(run).openapi()
    FILE.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


if __name__ == "__main__":
    main()
