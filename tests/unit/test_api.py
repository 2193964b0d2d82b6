"""The REST service through its real application, and the real server on a real socket."""

import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from torch import nn

from services.api import MAX_IDS, create_app, is_loopback
from services.config import ControllerConfig
from services.controller import Controller
from services.server import Server, bind
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import Images
from shared.errors import ConfigError, ServiceError
from shared.measures import MEASURES
from shared.score_store import ScoreWriter
from tests.rows import make_rows

SAMPLES = 4
TOKEN = "the-token"  # noqa: S105
BEARER = {"Authorization": f"Bearer {TOKEN}"}
OPEN = ("/livez", "/readyz")


class GoneFleet:
    """A controller that does not answer."""

    def status(self) -> NoReturn:
        raise ServiceError("no answer within 2 s")

    def set_wanted(self, replicas: int) -> NoReturn:
        raise ServiceError(f"no answer within 2 s to {replicas}")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose store is not there yet."""
    images = Images(np.zeros((SAMPLES, 1, 2, 2), np.uint8), np.arange(SAMPLES) % 2, white=1, num_classes=2)
    return Run.create(tmp_path / "run", dataset_fingerprint="f", train=images, config={}, scoring_id="s")


@pytest.fixture
def empty(run: Run) -> Run:
    """A run whose store has no rows."""
    ScoreWriter(run.scores_uri, SAMPLES, scoring_id="s").close()
    return run


@pytest.fixture
def filled(empty: Run) -> Run:
    """Sample 0 at version 2 (fresh), 1 at version 1 (stale), 2 with a NaN, 3 unscored; the newest version is 6."""
    with CheckpointPublisher(empty.path) as publisher:
        for version in range(1, 7):
            publisher.publish(nn.Linear(1, 1), 10 * version)
            publisher.flush()
    with ScoreWriter(empty.scores_uri, SAMPLES, scoring_id="s") as writer:
        writer.append(make_rows([0, 1], np.array([2, 1]), log_ratio=1.0, margin=-1.0))
        writer.append(make_rows([2], 2, log_ratio=math.nan, margin=math.inf, grad_norm=-math.inf))
    return empty


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


def check_problem(answer: httpx.Response, status: int, detail: str) -> None:
    assert status == answer.status_code
    assert answer.headers["content-type"] == "application/problem+json"
    body = strict(answer)
    assert {"type", "title", "status", "detail"} == set(body)
    assert ("about:blank", status) == (body["type"], body["status"])
    assert detail in body["detail"]


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
    assert "no score store" in strict(answers[0])["reason"]
    assert strict(answers[1])["reason"] == "no scores are committed yet"
    assert strict(answers[2]) == {"status": "ok"}


@pytest.mark.parametrize("path", ["/v1/samples/0", "/v1/stats"])
def test_without_a_store_difficulty_is_unavailable(run, path):
    check_problem(client_of(run).get(path), 503, "no score store")


def test_without_a_store_a_query_is_unavailable(run):
    check_problem(client_of(run).post("/v1/scores:query", json={"ids": [0]}), 503, "no score store")


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
    assert set(MEASURES) == set(sample["measures"])
    assert sample["measures"]["instability"] is None  # the first time that it is asked for
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


def test_the_api_describes_itself(empty):
    paths = strict(client_of(empty).get("/openapi.json"))["paths"]

    assert {
        "/livez",
        "/readyz",
        "/v1/samples/{sample_id}",
        "/v1/scores:query",
        "/v1/stats",
        "/v1/checkpoints",
        "/v1/scorers",
    } <= set(paths)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "detail"),
    [
        ("GET", "/v1/samples/4", None, 404, "sample_id 4 is outside 0..3"),
        ("GET", "/v1/samples/-1", None, 404, "sample_id -1 is outside 0..3"),
        ("GET", f"/v1/samples/{2**63}", None, 404, "outside 0..3"),
        ("GET", "/v1/samples/one", None, 422, "sample_id"),
        ("POST", "/v1/scores:query", {"ids": [0, 9]}, 404, "sample_id 9 is outside 0..3"),
        ("POST", "/v1/scores:query", {"ids": [-1]}, 422, "body.ids.0"),
        ("POST", "/v1/scores:query", {"ids": [2**63]}, 422, "body.ids.0"),
        ("POST", "/v1/scores:query", {"ids": ["x"]}, 422, "body.ids.0"),
        ("POST", "/v1/scores:query", {"ids": 1}, 422, "body.ids"),
        ("POST", "/v1/scores:query", {}, 422, "body.ids"),
        ("POST", "/v1/scores:query", {"ids": [0], "metric": "adm"}, 422, "body.metric"),
        ("POST", "/v1/scores:query", {"ids": [0] * (MAX_IDS + 1)}, 422, "100000"),
        ("POST", "/v1/scores:query", {"ids": [0], "measure": "nice"}, 422, "known: adm, log_ratio"),
        ("POST", "/v1/scores:query", None, 422, "body"),
        ("GET", "/v1/nothing", None, 404, "Not Found"),
        ("GET", "/", None, 404, "Not Found"),
        ("DELETE", "/v1/stats", None, 405, "Method Not Allowed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_are_problems(filled, method, path, body, status, detail):
    check_problem(client_of(filled).request(method, path, json=body), status, detail)


def test_a_body_that_is_not_json_is_a_problem(filled):
    headers = {"Content-Type": "application/json"}
    check_problem(client_of(filled).post("/v1/scores:query", content=b"{ids", headers=headers), 422, "JSON")


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
    ("body", "detail"),
    [
        ({"replicas": -1}, "0..1024"),
        ({"replicas": 1025}, "0..1024"),
        ({"replicas": 1.5}, "replicas"),
        ({"replicas": None}, "replicas"),
        ({}, "replicas"),
        ({"replicas": 1, "now": True}, "body.now"),
    ],
    ids=str,
)
def test_a_wanted_number_that_makes_no_sense_is_a_problem(filled, controller, body, detail):
    check_problem(client_of(filled, fleet=controller).patch("/v1/scorers", json=body, headers=BEARER), 422, detail)
    assert controller.status()["wanted"] == 3


def test_without_a_fleet_the_scorers_routes_are_unavailable(filled):
    client = client_of(filled)
    check_problem(client.get("/v1/scorers"), 503, "without scorers")
    check_problem(client.patch("/v1/scorers", json={"replicas": 1}, headers=BEARER), 503, "without scorers")


def test_a_controller_that_does_not_answer_takes_only_its_own_numbers_away(filled):
    client = client_of(filled, fleet=GoneFleet())
    stats = strict(client.get("/v1/stats"))

    assert (stats["controller"], stats["coverage"]) == ("no answer within 2 s", 0.75)
    check_problem(client.get("/v1/scorers"), 503, "no answer")
    check_problem(client.patch("/v1/scorers", json={"replicas": 1}, headers=BEARER), 503, "no answer")
    assert client.get("/v1/samples/0").status_code == 200


def requests_of(app: FastAPI) -> list[tuple[str, str, dict[str, Any] | None]]:
    """One good request for every route."""
    bodies = {"/v1/scores:query": {"ids": [0]}, "/v1/scorers": {"replicas": 2}}
    return [
        (method, route.path.format(sample_id=0), bodies.get(route.path) if method != "GET" else None)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods)
    ]


def test_off_loopback_everything_needs_the_token_but_the_probes(filled, controller):
    app = create_app(filled, fleet=controller, token=TOKEN, loopback=False)
    client = TestClient(app)
    requests = requests_of(app)

    assert len(requests) >= 8
    for method, path, body in requests:
        given = [{}, {"Authorization": "Bearer other"}, BEARER]
        statuses = [client.request(method, path, json=body, headers=headers).status_code for headers in given]

        assert (path, [200, 200, 200] if path in OPEN else [401, 403, 200]) == (path, statuses)


def test_off_loopback_a_stranger_learns_nothing_from_a_bad_body(filled):
    check_problem(client_of(filled, loopback=False).post("/v1/scores:query", json={"id": 1}), 401, "token")


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/redoc"])
def test_off_loopback_there_is_no_description(filled, path):
    """A browser cannot send the token, and without it nothing may be told."""
    assert client_of(filled, loopback=False).get(path).status_code == 404


def test_on_loopback_reading_needs_no_token(filled, controller):
    app = create_app(filled, fleet=controller, token=TOKEN)
    client = TestClient(app)

    assert {"PATCH"} == {
        method for method, path, body in requests_of(app) if client.request(method, path, json=body).status_code != 200
    }


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
        assert strict(httpx.get(f"{url}/v1/stats"))["coverage"] == 0.75
        check_problem(httpx.get(f"{url}/v1/nothing"), 404, "Not Found")
    finally:
        server.stop()

    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_taken_port_is_refused_by_name(empty):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*rest\.port"):
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
        assert httpx.get(f"{url}/livez").status_code == 200
    finally:
        server.stop()
