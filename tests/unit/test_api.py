"""The REST service through its real application, and the real server on a real socket."""

import io
import json
import math
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from torch import nn

from services import difficulty
from services.api import create_app, is_loopback, routes_of
from services.config import ControllerConfig
from services.controller import Controller
from services.images import Pictures
from services.openapi import FILE
from services.schemas import MAX_IDS
from services.server import Server, bind
from services.web import ARROW, MAX_BODY_BYTES
from shared import datasets
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.config import DataConfig
from shared.datasets import Dataset, Images, load_dataset
from shared.errors import ConfigError, ServiceError
from shared.measures import MEASURES
from shared.score_store import ScoreWriter
from tests.raising import refuses
from tests.rows import make_rows
from tests.waiting import LIMIT_S

SAMPLES = 4
TOKEN = "the-token"  # noqa: S105
BEARER = {"Authorization": f"Bearer {TOKEN}"}
OPEN = ("/livez", "/readyz")


GONE = ServiceError("no answer within 2 s", fix="look into its log")


class GoneFleet:
    """A controller that does not answer."""

    def status(self) -> NoReturn:
        raise GONE

    def set_wanted(self, replicas: int) -> NoReturn:
        raise GONE


@pytest.fixture(autouse=True)
def _looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difficulty, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(difficulty, "WAIT_AFTER_S", 0)


def create_run(folder: Path) -> Run:
    images = Images(np.zeros((SAMPLES, 1, 2, 2), np.uint8), np.arange(SAMPLES) % 2, white=1, num_classes=2)
    return Run.create(folder, dataset_fingerprint="f", train=images, config={}, scoring_id="s")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose store is not there yet."""
    return create_run(tmp_path / "run")


@pytest.fixture
def empty(run: Run) -> Run:
    """A run whose store has no rows."""
    ScoreWriter(run.scores_uri, SAMPLES, scoring_id="s").close()
    return run


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `filled` is a copy of: the syncs of its files take longer than most tests."""
    run = create_run(tmp_path_factory.mktemp("filled") / "run")
    with CheckpointPublisher(run.path) as publisher:
        for version in range(1, 7):
            publisher.publish(nn.Linear(1, 1), 10 * version)
            publisher.flush()
    with ScoreWriter(run.scores_uri, SAMPLES, scoring_id="s") as writer:
        writer.append(make_rows([0, 1], np.array([2, 1]), log_ratio=1.0, margin=-1.0))
        writer.append(make_rows([2], 2, log_ratio=math.nan, margin=math.inf, grad_norm=-math.inf))
    return run.path


@pytest.fixture(scope="module")
def asked(filled_once: Path) -> TestClient:
    """A service of `filled` for many questions that change nothing."""
    return client_of(Run(filled_once))


@pytest.fixture
def filled(filled_once: Path, tmp_path: Path) -> Run:
    """Sample 0 at version 2 (fresh), 1 at version 1 (stale), 2 with a NaN, 3 unscored; the newest version is 6."""
    shutil.copytree(filled_once, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture
def controller(filled: Run) -> Iterator[Controller]:
    controller = Controller(str(filled.path), SAMPLES, "s", ControllerConfig(block_size=2, audit_share=0), wanted=3)
    controller.register("scorer-1", 4711)
    yield controller
    controller.close()


def client_of(run: Run, **settings: Any) -> TestClient:
    return TestClient(create_app(run, token=TOKEN, **settings))


def strict(answer: httpx.Response) -> Any:
    """The body as JSON without NaN and infinities, which JSON does not know."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(answer.text, parse_constant=refuse)


def check_problem(answer: httpx.Response, status: int, named: object = "") -> str:
    """Check that the answer is a problem whose detail names `named`; return its fix."""
    assert status == answer.status_code
    assert answer.headers["content-type"] == "application/problem+json"
    body = strict(answer)
    assert {"type", "title", "status", "detail", "fix"} == set(body) - {"errors", "key"}
    assert ("about:blank", HTTPStatus(status).phrase, status) == (body["type"], body["title"], body["status"])
    assert str(named) in body["detail"]
    assert body["fix"]
    return body["fix"]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_livez_answers_without_a_store(run):
    assert strict(client_of(run).get("/livez")) == {"status": "ok"}


def test_readyz_names_what_is_missing(run):
    client = client_of(run)
    answers = [client.get("/readyz")]
    with ScoreWriter(run.scores_uri, SAMPLES, scoring_id="s") as writer:
        answers.append(client.get("/readyz"))
        writer.append(make_rows([0]))
    answers.append(client.get("/readyz"))

    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert str(run.scores_uri) in strict(answers[0])["reason"]
    assert strict(answers[1])["reason"] == "no scores are committed yet"
    assert strict(answers[2]) == {"status": "ok"}


@pytest.mark.parametrize("path", ["/v1/samples/0", "/v1/stats"])
def test_without_a_store_difficulty_is_unavailable(run, path):
    check_problem(client_of(run).get(path), 503, run.scores_uri)


def test_without_a_store_a_query_is_unavailable(run):
    check_problem(client_of(run).post("/v1/scores:query", json={"ids": [0]}), 503, run.scores_uri)


def test_an_empty_store_answers_unscored_and_null(empty):
    client = client_of(empty)
    columns = strict(client.post("/v1/scores:query", json={"ids": [3, 0]}))
    sample = strict(client.get("/v1/samples/1"))
    stats = strict(client.get("/v1/stats"))

    assert (columns["status"], columns["sample_id"]) == (["unscored"] * 2, [3, 0])
    for name in ("value", "percentile", "age_versions", "age_steps", "model_version", "step"):
        assert columns[name] == [None, None]
        assert sample[name] is None
    assert (sample["status"], sample["measures"], sample["label"]) == ("unscored", None, 1)
    assert (stats["coverage"], stats["status"]) == (0, {"fresh": 0, "stale": 0, "unscored": SAMPLES})
    assert strict(client.get("/v1/checkpoints")) == {"checkpoints": []}


def test_a_query_answers_in_the_order_asked(filled):
    columns = strict(client_of(filled).post("/v1/scores:query", json={"ids": [3, 1, 0, 1], "measure": "margin"}))

    assert columns["sample_id"] == [3, 1, 0, 1]
    assert columns["status"] == ["unscored", "stale", "fresh", "stale"]
    assert columns["value"] == [None, -1.0, -1.0, -1.0]
    assert columns["age_versions"] == [None, 5, 4, 5]
    assert columns["age_steps"] == [None, 50, 40, 50]
    assert (columns["measure"], columns["staleness_bound"], columns["newest_model_version"]) == ("margin", 4, 6)


def test_a_query_by_default_is_by_adm(filled):
    columns = strict(client_of(filled).post("/v1/scores:query", json={"ids": [0]}))

    assert ("adm", pytest.approx([math.tanh(0.5)])) == (columns["measure"], columns["value"])


def test_a_sample_answers_with_all_that_is_known(filled):
    sample = strict(client_of(filled).get("/v1/samples/1"))

    assert tuple(sample[name] for name in ("status", "age_versions", "age_steps", "model_version", "step")) == (
        "stale",
        5,
        50,
        1,
        10,
    )
    assert {name for name, rule in MEASURES.items() if rule.of_one_row} == set(sample["measures"])
    assert math.log1p(math.exp(-1)) == pytest.approx(sample["measures"]["loss"])


def test_values_that_are_not_finite_are_null(filled):
    client = client_of(filled)
    for measure in ("adm", "loss", "margin", "grad_norm"):
        columns = strict(client.post("/v1/scores:query", json={"ids": [2, 0], "measure": measure}))

        assert columns["value"][0] is None
        assert columns["value"][1] is not None
    measures = strict(client.get("/v1/samples/2"))["measures"]

    assert [measures[name] for name in ("adm", "margin", "grad_norm")] == [None] * 3
    assert pytest.approx(measures["el2n"]) == 0.3


def test_stats_and_checkpoints_of_a_filled_store(filled):
    client = client_of(filled)
    stats = strict(client.get("/v1/stats"))
    checkpoints = strict(client.get("/v1/checkpoints"))["checkpoints"]

    assert (stats["coverage"], stats["status"]) == (0.75, {"fresh": 2, "stale": 1, "unscored": 1})
    assert tuple(stats[name] for name in ("store_version", "scored_rows", "newest_model_version", "newest_step")) == (
        1,
        3,
        6,
        60,
    )
    assert "controller" not in stats
    assert [(c["model_version"], c["step"]) for c in checkpoints] == [(6, 60), (5, 50), (4, 40), (3, 30)]


def test_the_api_describes_itself_as_the_checked_in_document_does(empty):
    """To write that anew: python -m services.openapi."""
    document = strict(client_of(empty).get("/openapi.json"))

    assert document == json.loads(FILE.read_bytes())


def test_the_documentation_needs_nothing_from_elsewhere(empty):
    client = client_of(empty)
    page = client.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)

    assert len(links) >= 3
    for link in links:
        assert link.startswith("/static/")
        assert client.get(link).status_code == 200
    assert "openapi.json" in page


def test_v1_tells_versions_columns_measures_and_routes(asked):
    about = strict(asked.get("/v1"))

    assert (about["api"], about["store_format"], about["run_id"], about["num_samples"]) == ("v1", 2, "run", SAMPLES)
    assert set(MEASURES) == set(about["measures"])
    assert about["columns"]["log_ratio"] == "float"
    assert {"GET /v1/samples/{sample_id}", "PATCH /v1/scorers", "GET /metrics"} <= set(about["routes"])


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "named"),
    [
        ("GET", "/v1/samples/4", None, 404, "4 is outside 0..3"),
        ("GET", "/v1/samples/-1", None, 404, "-1 is outside 0..3"),
        ("GET", f"/v1/samples/{2**63}", None, 404, f"{2**63} is outside 0..3"),
        ("GET", "/v1/samples/one", None, 422, "sample_id"),
        ("POST", "/v1/scores:query", {"ids": [0, 9]}, 404, "9 is outside 0..3"),
        ("POST", "/v1/scores:query", {"ids": [-1]}, 422, "body.ids.0"),
        ("POST", "/v1/scores:query", {"ids": [2**63]}, 422, "body.ids.0"),
        ("POST", "/v1/scores:query", {"ids": ["x"]}, 422, "body.ids.0"),
        ("POST", "/v1/scores:query", {"ids": 1}, 422, "body.ids"),
        ("POST", "/v1/scores:query", {}, 422, "body.ids"),
        ("POST", "/v1/scores:query", {"ids": [0], "metric": "adm"}, 422, "body.metric"),
        ("POST", "/v1/scores:query", {"ids": [0] * (MAX_IDS + 1)}, 422, "100000"),
        ("POST", "/v1/scores:query", {"ids": [0], "measure": "nice"}, 422, "'nice'"),
        ("POST", "/v1/scores:query", None, 422, "body"),
        ("GET", "/v1/samples/0?max_age_s=-1", None, 422, "query.max_age_s"),
        ("GET", "/v1/samples/0?max_age_s=nan", None, 422, "query.max_age_s"),
        ("GET", "/v1/samples/0?measure=nice", None, 422, "'nice'"),
        ("GET", "/v1/samples/4/history", None, 404, "4 is outside 0..3"),
        ("GET", "/v1/samples/4/image", None, 404, "4 is outside 0..3"),
        ("GET", "/v1/samples/0/image", None, 404, "data set"),
        ("GET", "/v1/samples/0/image?scale=17", None, 422, "query.scale"),
        ("GET", "/v1/samples/99999999999999999999", None, 404, "99999999999999999999 is outside 0..3"),
        ("GET", "/v1/scores?limit=10001", None, 422, "query.limit"),
        ("GET", "/v1/scores?order=up", None, 422, "query.order"),
        ("GET", "/v1/scores?cursor=nonsense", None, 404, "'nonsense'"),
        ("GET", "/v1/scores/snapshot?version=9", None, 404, "version 9"),
        ("GET", "/v1/scores/snapshot?since=9", None, 404, "since=9 is beyond version 1"),
        ("GET", "/v1/scores/snapshot?compression=gzip", None, 422, "query.compression"),
        ("GET", "/v1/histogram?bins=0", None, 422, "query.bins"),
        ("GET", "/v1/nothing", None, 404, ""),
        ("GET", "/", None, 404, ""),
        ("DELETE", "/v1/stats", None, 405, ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_are_problems(asked, method, path, body, status, named):
    check_problem(asked.request(method, path, json=body), status, named)


@pytest.mark.parametrize(
    ("path", "key"), [("/v1/samples/4", "sample_id"), ("/v1/scores?cursor=nonsense", "cursor"), ("/v1/nothing", None)]
)
def test_a_problem_names_what_it_is_about_where_the_error_does(asked, path, key):
    assert strict(asked.get(path)).get("key") == key


@pytest.mark.parametrize(
    ("path", "named", "known"),
    [
        ("/v1/samples/0?max_age=3", "query.max_age:", ["max_age_s", "max_age_versions", "measure"]),
        ("/v1/scores?sort=loss&limit=2", "query.sort:", ["cursor", "order"]),
        ("/v1/stats?since=1", "query.since:", []),
    ],
)
def test_an_unknown_parameter_is_refused_with_those_that_there_are(asked, path, named, known):
    fix = check_problem(asked.get(path), 422, named)
    assert all(name in fix for name in known)


@pytest.mark.parametrize(("content", "named"), [(b"{ids", "body.1: JSON"), (b"\xff", "body: ")])
def test_a_body_that_is_not_json_is_a_problem(filled, content, named):
    headers = {"Content-Type": "application/json"}
    check_problem(client_of(filled).post("/v1/scores:query", content=content, headers=headers), 422, named)


# -- formats -----------------------------------------------------------------------------------------------------------


def test_errors_of_a_body_are_listed(filled):
    answer = client_of(filled).post("/v1/scores:query", json={"ids": [True, 1], "metric": "adm"})

    assert {error["loc"] for error in strict(answer)["errors"]} == {"body.ids.0", "body.metric"}


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("application/*", "application/json"),
        (ARROW, ARROW),
        (f"{ARROW}, */*;q=0.1", ARROW),
        (f"application/json;q=0.5, {ARROW};q=0.4", "application/json"),
        (f"application/json;q=0, {ARROW};q=0.4", ARROW),
        (f"{ARROW.upper()}", ARROW),
        ("text/html, application/*;q=0.2", "application/json"),
    ],
)
def test_accept_decides_between_json_and_arrow(asked, accept, kind):
    answers = [
        asked.get(path, headers={"Accept": accept})
        for path in ("/v1/scores", "/v1/scores/snapshot", "/v1/classes", "/v1/suspects", "/v1/samples/0/history")
    ]

    assert {answer.headers["content-type"] for answer in answers} == {kind}


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "*/*;q=0", "application/json;q=x"])
def test_what_can_not_be_accepted_is_a_problem(asked, accept):
    check_problem(asked.get("/v1/scores", headers={"Accept": accept}), 406, accept)


def table_of(answer: httpx.Response) -> pa.Table:
    assert answer.headers["content-type"] == ARROW
    return pa.ipc.open_stream(answer.content).read_all()


@pytest.mark.parametrize("path", ["/v1/scores", "/v1/scores/snapshot", "/v1/classes", "/v1/suspects"])
def test_arrow_tells_what_json_tells(filled, path):
    client = client_of(filled)
    table, content = table_of(client.get(path, headers={"Accept": ARROW})), strict(client.get(path))
    head = json.loads(table.schema.metadata[b"steppe"])

    assert set(head) | set(table.column_names) == set(content)
    assert head == {name: content[name] for name in head}
    for name in set(table.column_names) - {"age_s", "scored_at"}:
        assert single(table.column(name).to_pylist()) == single(content[name])


def single(values: list[Any]) -> list[Any]:
    """Floats in single precision, None where not finite."""
    return [
        (float(np.float32(value)) if math.isfinite(value) else None) if isinstance(value, float) else value
        for value in values
    ]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_snapshot_may_be_compressed_by_arrow_and_never_twice(filled, compression):
    headers = {"Accept": ARROW, "Accept-Encoding": "gzip"}
    answer = client_of(filled).get(f"/v1/scores/snapshot?compression={compression}", headers=headers)

    assert "content-encoding" not in answer.headers
    assert table_of(answer).column("sample_id").to_pylist() == [0, 1, 2]


def test_long_json_is_compressed_where_that_is_accepted(filled):
    body = {"ids": [0, 1] * 500}
    for encoding, is_compressed in (("br, gzip;q=0.5", True), ("gzip;q=0", False), ("identity", False)):
        answer = client_of(filled).post("/v1/scores:query", json=body, headers={"Accept-Encoding": encoding})

        assert ("content-encoding" in answer.headers) == is_compressed
        assert strict(answer)["sample_id"] == body["ids"]
        assert not is_compressed or "Accept-Encoding" in answer.headers["vary"]


def test_a_snapshot_that_the_client_has_is_not_sent_again(filled):
    client = client_of(filled)
    first = client.get("/v1/scores/snapshot", headers={"Accept": ARROW})
    tag = first.headers["etag"]

    def ask(path: str = "/v1/scores/snapshot", accept: str = ARROW, known: str = tag) -> httpx.Response:
        return client.get(path, headers={"Accept": accept, "If-None-Match": known})

    again = ask()
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    for name in ("vary", "cache-control"):
        assert again.headers[name] == first.headers[name]
    check_problem(ask("/v1/scores/snapshot?since=9", known="*"), 404, "since=9")
    assert [ask(known=known).status_code for known in (f'"other", {tag}', "*", '"other"')] == [304, 304, 200]
    assert ask(accept="application/json").status_code == 200
    assert ask("/v1/scores/snapshot?since=1").status_code == 200
    assert ask("/v1/scores/snapshot?compression=zstd").status_code == 200
    with ScoreWriter(filled.scores_uri, SAMPLES, scoring_id="s") as writer:
        writer.append(make_rows([3], 6))
    newer = ask()
    earlier = client.get("/v1/scores/snapshot?version=1").headers["etag"]
    with ScoreWriter(filled.scores_uri, SAMPLES, scoring_id="s") as writer:
        writer.append(make_rows([3], 7))
        writer.commit()
        assert ask("/v1/scores/snapshot?version=1", "application/json", earlier).status_code == 304
        writer.compact()

    assert ask("/v1/scores/snapshot?version=1", "application/json", earlier).status_code == 304
    assert (newer.status_code, table_of(newer).num_rows) == (200, 4)
    assert table_of(client.get("/v1/scores/snapshot?since=1", headers={"Accept": ARROW}))["sample_id"].to_pylist() == [
        3
    ]


def test_what_came_since_a_version_of_another_store_is_not_told(filled):
    """Else whoever follows would keep scores of the store that was."""
    client = client_of(filled)
    first = strict(client.get("/v1/scores/snapshot"))
    after = f"/v1/scores/snapshot?since={first['version']}&store={first['store']}"
    assert strict(client.get(after))["sample_id"] == []
    shutil.rmtree(filled.scores_uri)
    with ScoreWriter(filled.scores_uri, SAMPLES, scoring_id="s") as writer:
        for version in (1, 2):
            writer.append(make_rows([3], version))
            writer.commit()

    check_problem(client.get(after), 404, f"store={first['store']}")


def test_pages_link_to_the_next(filled):
    client = client_of(filled)
    first = client.get("/v1/scores?limit=3")
    rest = client.get(re.fullmatch('<(.*)>; rel="next"', first.headers["link"])[1])

    assert strict(first)["sample_id"] + strict(rest)["sample_id"] == [0, 1, 2, 3]
    assert strict(first)["next_cursor"] in first.headers["link"]
    assert (strict(rest)["next_cursor"], "link" in rest.headers) == (None, False)
    cursor = strict(first)["next_cursor"]
    check_problem(client.get(f"/v1/scores?cursor={cursor}&label=1"), 422, "cursor was made with another label")
    check_problem(client.get(f"/v1/scores?cursor={'A' * 4097}"), 422, "query.cursor")


def test_a_body_without_its_content_type_is_told_so(filled):
    """As curl -d sends it."""
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = client_of(filled).post("/v1/scores:query", content=b'{"ids": [0]}', headers={"Content-Type": kind})
        assert "application/json" in check_problem(answer, 422, kind)


def test_a_body_beyond_the_limit_is_refused(filled):
    client, much = client_of(filled), b" " * (MAX_BODY_BYTES + 1)
    headers = {"Content-Type": "application/json"}

    def in_pieces() -> Iterator[bytes]:
        yield much

    check_problem(client.post("/v1/scores:query", content=much, headers=headers), 413, MAX_BODY_BYTES)
    check_problem(client.post("/v1/scores:query", content=in_pieces(), headers=headers), 413, MAX_BODY_BYTES)
    check_problem(client.patch("/v1/scorers", content=much, headers=headers | BEARER), 413, MAX_BODY_BYTES)
    fits = b'{"ids": [0]}'.ljust(MAX_BODY_BYTES)
    assert client.post("/v1/scores:query", content=fits, headers=headers).status_code == 200


@pytest.mark.parametrize("sample_id", range(SAMPLES))
def test_the_shortcut_answers_as_the_route_does(filled, sample_id):
    """The route is taken where there are parameters."""
    client = client_of(filled)
    short = client.get(f"/v1/samples/{sample_id}")
    long = client.get(f"/v1/samples/{sample_id}?measure=adm")

    assert strict(short) | {"age_s": 0} == strict(long) | {"age_s": 0}
    assert {"content-type", "content-length"} <= set(short.headers)


@pytest.mark.parametrize(
    "body",
    [
        {"ids": [0, 1, 2, 3, 0]},
        {"ids": []},
        {"ids": [0, 3], "max_age_versions": 4},
        {"ids": [1], "max_age_s": 0.5},
        {"ids": [0], "measure": "loss"},
        {"ids": [9]},
        {"ids": [True]},
        {"ids": [0], "measure": "nice"},
    ],
    ids=str,
)
def test_the_shortcut_for_many_answers_as_the_route_does(filled, body):
    """The route is taken for any other charset, such as this one."""
    client = client_of(filled)

    def ask(kind: str) -> httpx.Response:
        headers = {"Content-Type": kind, "Accept-Encoding": "identity"}
        return client.post("/v1/scores:query", content=json.dumps(body), headers=headers)

    short, long = ask("application/json"), ask("application/json; charset=utf-8")
    assert strict(short) | {"age_s": 0} == strict(long) | {"age_s": 0}
    assert (short.status_code, short.headers["content-type"]) == (long.status_code, long.headers["content-type"])
    assert short.headers.get("vary") == long.headers.get("vary")


def test_what_breaks_in_the_shortcut_is_told_by_the_route(filled):
    client = client_of(filled)
    assert client.get("/v1/samples/0").status_code == 200
    (filled.path / "checkpoints").rename(filled.path / "moved")
    (filled.path / "checkpoints").write_text("")

    check_problem(client.get("/v1/samples/0"), 503, "checkpoints")
    check_problem(client.post("/v1/scores:query", json={"ids": [0]}), 503, "checkpoints")
    assert client.get("/readyz").status_code == 503
    assert "steppe_up 0.0" in client.get("/metrics").text


@pytest.mark.parametrize("path", ["/livez", "/v1/samples/0", "/v1/scores/snapshot", "/v1/nothing"])
def test_head_is_get_without_the_body(filled, path):
    client = client_of(filled)
    get, head = client.get(path), client.head(path)

    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_other_methods_than_get_are_not_short(filled):
    check_problem(client_of(filled).delete("/v1/samples/0"), 405)


def test_pages_of_other_origins_may_ask_only_where_that_is_set(filled):
    origin = {"Origin": "http://localhost:3000"}
    asks = origin | {"Access-Control-Request-Method": "GET"}
    allowed = client_of(filled, cors_origins=["http://localhost:3000"])

    for path in ("/v1/samples/0", "/v1/stats"):
        assert "access-control-allow-origin" not in client_of(filled).get(path, headers=origin).headers
        assert allowed.get(path, headers=origin).headers["access-control-allow-origin"] == "http://localhost:3000"
        assert "access-control-allow-origin" not in allowed.get(path, headers={"Origin": "http://else"}).headers
    assert client_of(filled).options("/v1/stats", headers=asks).status_code == 405
    assert allowed.options("/v1/stats", headers=asks).status_code == 200


def test_metrics_are_those_of_the_run_and_of_the_requests(filled, controller):
    client = client_of(filled, fleet=controller)
    client.get("/v1/samples/0")
    client.get("/v1/samples/9")
    client.get("/nothing")
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    for name, value in {
        "steppe_up": 1,
        "steppe_coverage": 0.75,
        'steppe_samples{status="stale"}': 1,
        'steppe_age_versions{quantile="0.5"}': 4,
        "steppe_store_version": 1,
        "steppe_scorers_wanted": 3,
        "steppe_scorers_alive": 1,
        "steppe_scored_samples_per_second": 0,
        'steppe_http_request_seconds_count{method="GET",route="/v1/samples/{sample_id}",status="200"}': 1,
        'steppe_http_request_seconds_count{method="GET",route="/v1/samples/{sample_id}",status="404"}': 1,
        'steppe_http_request_seconds_count{method="any",route="none",status="404"}': 1,
    }.items():
        assert (name, float(values[name])) == (name, value)
    assert "steppe_fidelity" not in values


@pytest.mark.parametrize("state", ["no store", "controller gone"])
def test_metrics_go_on_without_what_is_not_there(state, request):
    run = request.getfixturevalue("run" if state == "no store" else "filled")
    text = client_of(run, fleet=GoneFleet()).get("/metrics").text

    assert ("steppe_up 0.0" in text) == (state == "no store")
    assert "\nsteppe_scorers_wanted " not in text


def run_of_three_digits(tmp_path: Path) -> tuple[Run, Dataset]:
    config = {"data": {"name": "digits", "subset": 3}}
    dataset = load_dataset(DataConfig(**config["data"]))
    run = Run.create(
        tmp_path / "run", dataset_fingerprint=dataset.fingerprint, train=dataset.train, config=config, scoring_id="s"
    )
    return run, dataset


def test_images_are_png_files_of_the_runs_data_set(tmp_path):
    run, dataset = run_of_three_digits(tmp_path)
    client = client_of(run)
    answer = client.get("/v1/samples/2/image?scale=3")
    image = Image.open(io.BytesIO(answer.content))
    pixels = np.asarray(image)[::3, ::3].astype(float)
    tag = {"If-None-Match": answer.headers["etag"]}

    assert (answer.headers["content-type"], image.size) == ("image/png", (24, 24))
    assert np.abs(pixels / 255 - dataset.train.pixels([2])[0, 0] / dataset.train.white).max() < 1 / 255
    assert client.get("/v1/samples/2/image?scale=3", headers=tag).status_code == 304
    assert client.get("/v1/samples/1/image?scale=3", headers=tag).status_code == 200
    check_problem(client.get("/v1/samples/3/image"), 404, "3 is outside 0..2")


def test_a_page_of_images_loads_the_data_set_once_and_fetches_nothing(tmp_path, monkeypatch):
    run, _ = run_of_three_digits(tmp_path)
    pictures, loaded, together = Pictures(run), [], threading.Barrier(4)

    def load(settings: DataConfig) -> Any:
        loaded.append(settings)
        return load_dataset(settings)

    monkeypatch.setattr(datasets, "local_dataset", load)

    def show(sample_id: int) -> bytes:
        together.wait()
        return pictures.png(sample_id)

    with ThreadPoolExecutor(4) as pool:
        shown = list(pool.map(show, [0, 1, 2, 0]))
    assert (len(loaded), len(set(shown))) == (1, 3)


def test_images_of_another_data_set_are_not_shown(tmp_path):
    config = {"data": {"name": "digits", "subset": 3}}
    train = load_dataset(DataConfig(**config["data"])).train
    run = Run.create(tmp_path / "run", dataset_fingerprint="other", train=train, config=config, scoring_id="s")

    check_problem(client_of(run).get("/v1/samples/0/image"), 503, "other")


# -- scorers and tokens ------------------------------------------------------------------------------------------------


def test_scorers_are_those_of_the_controller(filled, controller):
    answer = strict(client_of(filled, fleet=controller).get("/v1/scorers"))

    assert (answer["wanted"], answer["alive"], answer["blocks"]) == (3, 1, 2)
    assert answer["scorers"] == [{"scorer_id": "scorer-1", "pid": 4711, "scored": 0, "model_version": 0}]


def test_stats_have_the_controllers_numbers(filled, controller):
    lease = controller.lease("scorer-1", 9)
    controller.submit("scorer-1", lease.lease_id, make_rows(lease.sample_ids, 9, log_ratio=np.nan))
    stats = strict(client_of(filled, fleet=controller).get("/v1/stats"))

    assert (stats["quarantined_rows"], stats["coverage"]) == (2, 0.75)
    assert stats["samples_per_second"] > 0


@pytest.mark.parametrize(
    ("headers", "status", "wanted"),
    [
        ({}, 401, 3),
        ({"Authorization": "Basic abc"}, 401, 3),
        ({"Authorization": TOKEN}, 401, 3),
        ({"Authorization": "Bearer other"}, 403, 3),
        ({"Authorization": "Bearer "}, 403, 3),
        (BEARER, 200, 5),
        ({"Authorization": f"bearer {TOKEN}"}, 200, 5),
    ],
    ids=["none", "basic", "no scheme", "wrong", "empty", "right", "lower case"],
)
def test_scaling_needs_the_token(filled, controller, headers, status, wanted):
    answer = client_of(filled, fleet=controller).patch("/v1/scorers", json={"replicas": 5}, headers=headers)

    assert status == answer.status_code
    assert wanted == controller.status()["wanted"]
    if status == 200:
        assert strict(answer)["wanted"] == 5
    else:
        check_problem(answer, status, "token")
        assert (answer.headers.get("www-authenticate") == "Bearer") == (status == 401)


def test_without_a_token_every_change_is_refused(filled, controller):
    client = TestClient(create_app(filled, fleet=controller, token=None))
    for given in ("", "None", TOKEN):
        answer = client.patch("/v1/scorers", json={"replicas": 5}, headers={"Authorization": f"Bearer {given}"})
        check_problem(answer, 403, "token")
    assert controller.status()["wanted"] == 3


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"replicas": -1}, "-1, outside 0..1024"),
        ({"replicas": 1025}, "1025, outside 0..1024"),
        ({"replicas": 2**70}, f"{2**70}, outside 0..1024"),
        ({"replicas": True}, "replicas"),
        ({"replicas": 1.5}, "replicas"),
        ({"replicas": None}, "replicas"),
        ({}, "replicas"),
        ({"replicas": 1, "now": True}, "body.now"),
    ],
    ids=str,
)
def test_a_wanted_number_that_makes_no_sense_is_a_problem(filled, controller, body, named):
    check_problem(client_of(filled, fleet=controller).patch("/v1/scorers", json=body, headers=BEARER), 422, named)
    assert controller.status()["wanted"] == 3


def test_without_a_fleet_the_scorers_routes_are_unavailable(filled):
    client = client_of(filled)
    check_problem(client.get("/v1/scorers"), 503, "scorers")
    check_problem(client.patch("/v1/scorers", json={"replicas": 1}, headers=BEARER), 503, "scorers")


def test_a_controller_that_does_not_answer_takes_only_its_own_numbers_away(filled):
    client = client_of(filled, fleet=GoneFleet())
    stats = strict(client.get("/v1/stats"))

    assert (stats["controller"], stats["coverage"]) == (str(GONE), 0.75)
    check_problem(client.get("/v1/scorers"), 503, GONE.problem)
    check_problem(client.patch("/v1/scorers", json={"replicas": 1}, headers=BEARER), 503, GONE.problem)
    assert client.get("/v1/samples/0").status_code == 200


def requests_of(app: FastAPI) -> list[tuple[str, str, dict[str, Any] | None]]:
    """One good request for every route."""
    bodies = {"/v1/scores:query": {"ids": [0]}, "/v1/scorers": {"replicas": 2}}
    routes = [route.split(" ") for route in routes_of(app)]
    return [
        (method, path.format(sample_id=0), bodies.get(path) if method != "GET" else None) for method, path in routes
    ]


def test_off_loopback_everything_needs_the_token_but_the_probes(filled, controller):
    app = create_app(filled, fleet=controller, token=TOKEN, loopback=False)
    client = TestClient(app)
    requests = requests_of(app)

    assert len(requests) >= 18
    for method, path, body in requests:
        given = [{}, {"Authorization": "Bearer other"}, BEARER]
        statuses = [client.request(method, path, json=body, headers=headers).status_code for headers in given]

        right = 404 if path.endswith("/image") else 200  # this run has no data set
        assert (path, [200, 200, 200] if path in OPEN else [401, 403, right]) == (path, statuses)


def test_off_loopback_a_stranger_learns_nothing_from_a_bad_body(filled):
    client, headers = client_of(filled, loopback=False), {"Content-Type": "application/json"}
    for body in (b'{"id": 1}', b"{bad", b" " * (MAX_BODY_BYTES + 1)):
        check_problem(client.post("/v1/scores:query", content=body, headers=headers), 401, "token")
        check_problem(client.patch("/v1/scorers", content=body, headers=headers), 401, "token")
    for path in ("/v1/nothing", "/v1/stats/", "/docs"):
        check_problem(client.get(path), 401, "token")


def test_the_probe_tells_nobody_else_where_the_run_is(run):
    strangers = client_of(run, loopback=False), client_of(run)
    for client, host in zip(strangers, ("localhost", "evil.example:7471"), strict=True):
        answer = client.get("/readyz", headers={"Host": host})
        assert (answer.status_code, str(run.path) in answer.text) == (503, False)
    assert str(run.path) in client_of(run).get("/readyz").text


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/static/swagger-ui.css"])
def test_off_loopback_there_is_no_description(filled, path):
    """A browser cannot send the token, and without it nothing may be told."""
    assert client_of(filled, loopback=False).get(path, headers=BEARER).status_code == 404


def test_on_loopback_reading_needs_no_token(filled, controller):
    app = create_app(filled, fleet=controller, token=TOKEN)
    client = TestClient(app)

    assert {"PATCH"} == {
        method for method, path, body in requests_of(app) if client.request(method, path, json=body).status_code == 401
    }


@pytest.mark.parametrize(
    ("host", "needed"),
    [
        ("localhost:7471", False),
        ("127.0.0.1:7471", False),
        ("[::1]:7471", False),
        ("10.0.0.7", False),
        ("my-laptop", False),
        ("run.localhost:7471", False),
        ("evil.example:7471", True),
        ("127.0.0.1.evil.example", True),
        ("localhost.evil.example.", True),
    ],
)
def test_who_reads_under_a_domain_name_needs_the_token_on_loopback_too(filled, host, needed):
    """A web page can make its own name mean 127.0.0.1."""
    client = client_of(filled)
    for path in ("/v1/samples/0", "/v1/scores/snapshot", "/docs"):
        answer = client.get(path, headers={"Host": host})
        if needed:
            assert "http://localhost" in check_problem(answer, 401, "token")
        assert (answer.status_code == 401, client.get(path, headers=BEARER | {"Host": host}).status_code) == (
            needed,
            200,
        )


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.8.7", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("128.0.0.1", False),
        ("2001:db8::1", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_is_loopback(host, loopback):
    assert loopback == is_loopback(host)


# -- the server --------------------------------------------------------------------------------------------------------


def test_the_server_answers_on_a_free_port_until_it_is_stopped(filled):
    server = Server(create_app(filled), "127.0.0.1", 0)
    url = server.start()
    try:
        assert url == server.url
        assert not url.endswith(":0")
        assert strict(httpx.get(f"{url}/v1/stats", timeout=LIMIT_S))["coverage"] == 0.75
        check_problem(httpx.get(f"{url}/v1/nothing", timeout=LIMIT_S), 404)
    finally:
        server.stop()

    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_taken_port_is_refused_by_name(empty):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with refuses(ConfigError, "rest.port", f"127.0.0.1:{port}"):
            Server(create_app(empty), "127.0.0.1", port)


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_an_ipv6_address_is_bracketed_in_the_url(empty):
    try:
        server = Server(create_app(empty), "::1", 0)
    except ConfigError:
        pytest.skip("this machine has no ::1")
    url = server.start()
    try:
        assert url.startswith("http://[::1]:")
        assert httpx.get(f"{url}/livez", timeout=LIMIT_S).status_code == 200
    finally:
        server.stop()
