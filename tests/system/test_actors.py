"""Controller, scorers and REST service as real Ray actors, with real files between them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import ray
import torch

from deploy.actors import ControllerActor, RestActor, ScorerActor, ask
from deploy.config import RunConfig
from deploy.fleet import Fleet
from scorer.config import ScoringConfig
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import load_dataset
from shared.events import Events, read_events
from shared.models import build_model
from shared.score_store import ScoreReader
from tests.waiting import LIMIT_S, wait_for

CONFIG = RunConfig.model_validate(
    {
        "data": {"name": "digits", "subset": 600},
        "model": {"width": 8},
        "scoring": {"replicas": 1, "cpus": 0.1, "nice": 1},
        "controller": {"block_size": 100},
        "rest": {"port": 0},
    }
)


class Parts:
    """A run's actors, started as the driver starts them."""

    def __init__(self, folder: Path) -> None:
        self.dataset = load_dataset(CONFIG.data)
        self.run = Run.create(
            folder,
            dataset_fingerprint=self.dataset.fingerprint,
            train=self.dataset.train,
            config=CONFIG.model_dump(mode="json"),
            scoring_id=CONFIG.scoring.scoring_id,
        )
        self.token = self.run.create_token()
        uri = str(self.run.path)
        self.controller: Any = (
            ray.remote(ControllerActor)
            .options(num_cpus=0, max_restarts=-1)  # type: ignore[attr-defined]
            .remote(uri, self.run.num_samples, CONFIG.scoring.scoring_id, CONFIG.controller, wanted=1)
        )
        self.rest: Any = ray.remote(RestActor).options(num_cpus=0).remote(uri, CONFIG.rest, self.controller)  # type: ignore[attr-defined]
        scorer: Any = ray.remote(num_cpus=0.1, max_concurrency=3)(ScorerActor)  # type: ignore[call-overload]
        self.problems: list[str] = []
        start = lambda i: scorer.remote(i, uri, CONFIG, self.controller)  # noqa: E731
        self.fleet = Fleet(self.controller, start, CONFIG.scoring, self.problems.append, Events(uri))

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = ask(self.controller.status.remote(), LIMIT_S)
        return status

    def close(self) -> None:
        self.fleet.stop()
        ray.get([self.controller.close.remote(), self.rest.stop.remote()], timeout=LIMIT_S)
        ray.kill(self.controller)
        ray.kill(self.rest)


@pytest.fixture
def parts(ray_cluster: None, run_folder: Path) -> Iterator[Parts]:
    started = Parts(run_folder)
    yield started
    started.close()


def test_scorers_follow_checkpoints_and_rest_tells(parts: Parts) -> None:
    """Checkpoint in, difficulty out: every sample is scored at the newest version, through real processes."""
    torch.manual_seed(0)
    model = build_model(CONFIG.model, parts.dataset)
    url, *_ = ask(parts.rest.start.remote(), LIMIT_S)
    client = httpx2.Client(base_url=url, trust_env=False, timeout=LIMIT_S)
    assert client.get("/readyz").status_code == 503
    ask(parts.controller.status.remote(), LIMIT_S)  # the store is there: the service may have started before it
    assert client.get("/v1/samples/5").json()["status"] == "unscored"
    assert parts.fleet.first_scorer.wait(LIMIT_S)

    with CheckpointPublisher(parts.run.path) as publisher:
        for step in (10, 20):
            version = publisher.publish(model, step)
            reader = ScoreReader(parts.run.scores_uri)
            wait_for(
                lambda: reader.refresh() and (reader.dense("model_version") == version).all(),  # noqa: B023
                what=f"every sample scored at version {version}",
            )

    sample = client.get("/v1/samples/5").json()
    assert (sample["status"], sample["model_version"], sample["step"], sample["age_versions"]) == ("fresh", 2, 20, 0)
    stats = client.get("/v1/stats").json()
    assert stats["coverage"] == 1.0
    assert stats["model_versions_scored"] == 2
    assert stats["scored_rows"] == 1200
    scorers = client.get("/v1/scorers").json()["scorers"]
    audited = parts.status()["audited_rows"]  # version 2's audit; at version 1 there was nothing older to compare with
    assert audited == 128
    assert [scorer["scored"] for scorer in scorers] == [1200 + audited]


def test_scaling_through_rest_starts_and_drains_scorers(parts: Parts) -> None:
    url, *_ = ask(parts.rest.start.remote(), LIMIT_S)
    client = httpx2.Client(
        base_url=url, trust_env=False, headers={"Authorization": f"Bearer {parts.token}"}, timeout=LIMIT_S
    )
    assert parts.fleet.first_scorer.wait(LIMIT_S)
    pids = {scorer["pid"] for scorer in parts.status()["scorers"]}
    assert {psutil.Process(pid).nice() for pid in pids} == {1}

    refused = client.patch("/v1/scorers", json={"replicas": -1})
    assert (refused.status_code, bool(refused.json()["fix"])) == (422, True)
    assert client.patch("/v1/scorers", json={"replicas": 2}).status_code == 200
    wait_for(lambda: client.get("/v1/scorers").json().get("alive") == 2, what="two scorers alive")
    pids |= {scorer["pid"] for scorer in parts.status()["scorers"]}
    assert len(pids) == 2
    assert client.patch("/v1/scorers", json={"replicas": 0}).json()["wanted"] == 0
    wait_for(lambda: client.get("/v1/scorers").json().get("alive") == 0, what="no scorer alive")
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), what="the drained processes gone")


def test_scorers_that_cannot_be_placed_are_reported_with_what_is_missing(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster has 4 CPUs, and nobody waits: the controller's other scorer goes on."""
    monkeypatch.setattr("deploy.fleet.LONGEST_START_S", 0.5)
    hungry: Any = ray.remote(num_cpus=100, max_concurrency=3)(ScorerActor)  # type: ignore[call-overload]
    problems: list[str] = []
    events = Events(parts.run.path)
    start = lambda i: hungry.remote(i, str(parts.run.path), CONFIG, parts.controller)  # noqa: E731
    fleet = Fleet(parts.controller, start, ScoringConfig(cpus=100), problems.append, events)
    wait_for(lambda: problems, "the report")
    wait_for(lambda: parts.status()["waiting"] == problems[0], what="the controller telling so")
    lacking = fleet.lacking()
    fleet.stop()

    assert not [event for event in happened(parts, "scorer_down") if event["reason"] == "drained"]  # it never was up
    assert lacking == "100 CPU (there are 4)"
    assert problems == [problems[0]]
    assert problems[0] == "1 scorer waits to be placed or to start; one needs 100 CPU (there are 4)"


def test_a_scorer_that_gets_sigterm_hands_in_what_it_has_and_is_replaced(parts: Parts) -> None:
    assert parts.fleet.first_scorer.wait(LIMIT_S)
    with CheckpointPublisher(parts.run.path) as publisher:
        publisher.publish(build_model(CONFIG.model, parts.dataset), 10)
        (scorer,) = wait_for(lambda: [one for one in parts.status()["scorers"] if one["scored"]], what="scores")
        psutil.Process(scorer["pid"]).terminate()
        wait_for(lambda: happened(parts, "scorer_down"), what="its end")
        wait_for(lambda: len(happened(parts, "scorer_up")) == 2, what="its successor")

    assert [event["reason"] for event in happened(parts, "scorer_down")] == ["it ended by itself"]
    assert parts.status()["leases_expired"] == 0


def happened(parts: Parts, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(parts.run.path) if event["event"] == name]
