"""A real run behind the real REST service, and requests made from its own description."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from torch import nn

from services.api import create_app
from services.config import ControllerConfig
from services.controller import Controller
from services.server import Server
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.config import DataConfig
from shared.datasets import load_dataset
from shared.score_store import ScoreWriter
from tests.rows import make_rows

SAMPLES = 60
TOKEN = "the-token"  # noqa: S105
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
PROBLEM = {"type", "title", "status", "detail"}


def make_run(folder: Path) -> Run:
    """Of digits, with images; nothing is scored."""
    config = {"data": {"name": "digits", "subset": SAMPLES}}
    dataset = load_dataset(DataConfig(**config["data"]))
    return Run.create(
        folder, dataset_fingerprint=dataset.fingerprint, train=dataset.train, config=config, scoring_id="s"
    )


def writer_of(run: Run, **settings: Any) -> ScoreWriter:
    return ScoreWriter(run.scores_uri, SAMPLES, scoring_id="s", **settings)


def score_some(run: Run) -> None:
    """Three checkpoints; most samples scored at the second, one with values that are not finite."""
    with CheckpointPublisher(run.path) as publisher:
        for version in (1, 2, 3):
            publisher.publish(nn.Linear(1, 1), 10 * version)
            publisher.flush()
    chance = np.random.default_rng(0)
    with writer_of(run) as writer:
        for version in (1, 2):
            ids = np.arange(SAMPLES - 10)
            writer.append(make_rows(ids, version, log_ratio=chance.normal(size=50), margin=chance.normal(size=50)))
            writer.commit()
        writer.append(make_rows([0], 3, log_ratio=np.nan, margin=np.inf))


@contextlib.contextmanager
def serving(run: Run, **settings: Any) -> Iterator[str]:
    """The service on a real socket; gives its URL."""
    server = Server(create_app(run, token=TOKEN, **settings), "127.0.0.1", 0)
    try:
        yield server.start()
    finally:
        server.stop()


@contextlib.contextmanager
def controller_of(run: Run) -> Iterator[Controller]:
    controller = Controller(str(run.path), SAMPLES, "s", ControllerConfig(audit_share=0), wanted=0)
    try:
        yield controller
    finally:
        controller.close()


@contextlib.contextmanager
def committing(run: Run, share: float = 1.0) -> Iterator[None]:
    """A writer that commits and compacts without pause; with each commit this share of the samples changes."""
    stop, failures = threading.Event(), []
    chance = np.random.default_rng(0)

    def work() -> None:
        try:
            with writer_of(run, grace_s=1.0) as writer:
                version = 3
                while not stop.is_set():
                    version += 1
                    ids = np.flatnonzero(chance.random(SAMPLES) < share)
                    writer.append(make_rows(ids, version, margin=float(version)))
                    writer.commit()
                    if version % 7 == 0:
                        writer.compact()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failures


def ask(url: str, count: int, *, is_well: bool = True) -> Counter[str]:
    """About `count` requests, good and bad ones, over all that the service describes; the answers' kinds by status.

    Each is as described, every error a problem, and nothing but 503 (where the run is not well) is the server's fault.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    takes = [bool([*operation.iter_parameters()] or operation.body) for operation in operations]
    each = max(count // (2 * sum(takes)), 1)
    seen: Counter[str] = Counter()
    with requests.Session() as session:
        for operation, takes_something in zip(operations, takes, strict=True):
            _ask_one(operation, GenerationMode.POSITIVE, each, session, seen, is_well)
            if takes_something:  # else it cannot be asked wrongly
                _ask_one(operation, GenerationMode.NEGATIVE, each, session, seen, is_well)
    return seen


def _ask_one(
    operation: Any, mode: GenerationMode, count: int, session: requests.Session, seen: Counter[str], is_well: bool
) -> None:
    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        answer = case.call(session=session, headers=BEARER)
        seen[str(answer.status_code)] += 1
        seen[operation.label] += 1
        is_waiting = not is_well or operation.path == "/readyz"
        assert answer.status_code < 500 or (answer.status_code == 503 and is_waiting), answer.text
        case.validate_response(answer, checks=CHECKS)
        if answer.status_code >= 400 and operation.path != "/readyz":
            assert answer.headers["content-type"] == ["application/problem+json"], answer.text
            body = answer.json()
            assert set(body) - {"errors", "fix", "key"} == PROBLEM
            assert (body["status"], bool(body["detail"])) == (answer.status_code, True)
            assert answer.status_code >= 500 or body["fix"], answer.text

    check()
