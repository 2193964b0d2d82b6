"""The client against a server that answers as it is told; against the real one: system tests."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import pytest

from services.answers import Answer, Column, arrow_stream
from services.client import Client, facts
from services.web import ARROW
from shared.catalogue import Run
from shared.errors import ConfigError, DataError, RunError, ServiceError, SteppeError
from tests.raising import refuses
from tests.rest import make_run


class Told(http.server.ThreadingHTTPServer):
    """Gives `answers` one after the other, the last one again and again; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, str, bytes]] = []
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Told

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, headers, body))
        status, kind, content = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = answer

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def told() -> Iterator[Told]:
    with Told() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def good(content: Any) -> tuple[int, str, bytes]:
    return 200, "application/json", json.dumps(content).encode()


def bad(status: int, **more: str) -> tuple[int, str, bytes]:
    body = {"status": status, "detail": "epsilon is -1", **more}
    return status, "application/problem+json", json.dumps(body).encode()


def arrow(answer: Answer) -> tuple[int, str, bytes]:
    return 200, ARROW, b"".join(arrow_stream(answer.table()))


SCORES = Answer({"measure": "adm", "next_cursor": None}, {"value": Column(np.array([0.5, np.nan]))})


@pytest.mark.parametrize(
    ("status", "error", "asked"),
    [
        (503, ServiceError, 3),
        (502, ServiceError, 3),
        (500, ServiceError, 1),
        (401, ServiceError, 1),
        (404, DataError, 1),
        (406, ConfigError, 1),
        (413, ConfigError, 1),
        (422, ConfigError, 1),
    ],
)
def test_a_refusal_says_why_and_what_may_pass_is_asked_again(told, status, error, asked):
    told.answers = [bad(status, fix="set it to 0 or more", key="epsilon")]
    with pytest.raises(error) as caught:
        Client(told.url, retries=2).stats()

    refusal = caught.value
    assert (refusal.problem, refusal.fix, refusal.key) == ("epsilon is -1", "set it to 0 or more", "epsilon")
    assert asked == len(told.asked)


@pytest.mark.parametrize("status", [422, 503])
def test_a_refusal_without_a_fix_and_a_key_has_none(told, status):
    told.answers = [bad(status)]
    with pytest.raises(SteppeError) as caught:
        Client(told.url, retries=0).stats()

    assert (caught.value.problem, caught.value.fix, caught.value.key) == ("epsilon is -1", "", "")


def test_what_passed_is_answered(told):
    told.answers = [bad(503), bad(503), good({"coverage": 1.0})]

    assert Client(told.url).stats() == {"coverage": 1.0}
    assert len(told.asked) == 3


def test_changes_are_not_repeated(told):
    told.answers = [bad(503)]
    with pytest.raises(ServiceError):
        Client(told.url, token="t").scale(2)  # noqa: S106

    ((method, path, headers, body),) = told.asked
    assert (method, path, json.loads(body)) == ("PATCH", "/v1/scorers", {"replicas": 2})
    assert (headers["authorization"], headers["content-type"]) == ("Bearer t", "application/json")


def test_a_service_that_is_gone(told):
    client = Client(told.url, retries=1)
    told.server_close()
    told.shutdown()

    with refuses(ServiceError, told.url, told.url) as caught:
        client.stats()
    assert isinstance(caught.value.__cause__, httpx2.HTTPError)


def test_a_service_that_answers_too_late(told, monkeypatch):
    gave_up = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: gave_up.wait())
    with refuses(ServiceError, told.url):
        Client(told.url, timeout_s=0.05, retries=1).stats()
    gave_up.set()


@pytest.mark.parametrize("content", [b"<html>", b"\xff"])
def test_something_else_at_that_address(told, content):
    told.answers = [(200, "text/html", content)]
    client = Client(told.url)
    with refuses(ServiceError, f"{told.url}/v1/stats", "JSON"):
        client.stats()
    with refuses(ServiceError, f"{told.url}/v1/scores:query", "Arrow"):
        client.scores([1])
    told.answers = [(404, "text/html", content)]
    with refuses(DataError, f"{told.url}/v1/stats", 404):
        client.stats()


def test_tables_and_arrays(told):
    told.answers = [arrow(SCORES)]
    client = Client(told.url)
    table = client.scores(np.array([3, 14]), "loss", max_age_s=2.5)

    assert table.column("value").to_pylist() == [0.5, None]
    assert facts(table)["measure"] == "adm"
    assert json.loads(told.asked[0][3]) == {"ids": [3, 14], "measure": "loss", "max_age_s": 2.5}
    assert told.asked[0][2]["accept"] == ARROW
    np.testing.assert_array_equal(client.values(3), [0.5, np.nan])
    assert json.loads(told.asked[1][3])["ids"] == [3]
    assert facts(pa.table({})) == {}


def test_pages_go_by_the_cursor(told):
    told.answers = [arrow(Answer({"next_cursor": "a/b"}, SCORES.columns)), arrow(SCORES)]
    pages = list(Client(told.url).pages(label=3, measure="loss", limit=2))

    assert [page.num_rows for page in pages] == [2, 2]
    assert [path for _, path, *_ in told.asked] == [
        "/v1/scores?limit=2&label=3&measure=loss",
        "/v1/scores?limit=2&cursor=a%2Fb",
    ]


def test_what_is_not_given_is_not_sent(told):
    told.answers = [arrow(SCORES)]
    Client(told.url).snapshot(version=7)

    assert told.asked[0][1] == "/v1/scores/snapshot?version=7&since=0"


def test_the_token_is_that_of_the_run_or_of_the_environment(told, tmp_path, monkeypatch):
    monkeypatch.delenv("STEPPE_TOKEN", raising=False)
    told.answers = [good({})]
    run = make_run(tmp_path / "run")
    token = run.create_token()
    monkeypatch.setattr(Run, "runtime", lambda self: {"url": told.url})
    monkeypatch.setattr(Run, "state", lambda self: "served")
    Client.of_run(run.path).stats()
    monkeypatch.setenv("STEPPE_TOKEN", "of-mine")
    Client.of_run(run).stats()
    Client(told.url).stats()
    monkeypatch.delenv("STEPPE_TOKEN")
    Client(told.url).stats()

    given = [headers.get("authorization") for _, _, headers, _ in told.asked]
    assert given == [f"Bearer {token}", "Bearer of-mine", "Bearer of-mine", None]


def test_a_run_that_is_not_up(tmp_path):
    run = make_run(tmp_path / "run")
    with refuses(RunError, str(run.path)) as caught:
        Client.of_run(run)
    assert f"steppe serve {run.path}" in caught.value.fix
