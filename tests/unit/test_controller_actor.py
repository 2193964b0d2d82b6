"""The controller's actor as the plain class that it is: opened by whoever asks first, and again after a failure."""

import os
from pathlib import Path

import pytest

import deploy.actors
from deploy.actors import ControllerActor
from services.config import ControllerConfig
from shared.errors import ServiceError, SteppeError, StoreMismatch
from shared.events import read_events
from shared.schema import arrow_file
from shared.score_store import ScoreReader, ScoreWriter
from shared.storage import Folder
from tests.raising import refuses
from tests.rows import make_rows

SAMPLES = 6


@pytest.fixture(autouse=True)
def logs_stay_pytests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.actors, "log_to", lambda *_: None)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt to open need not wait."""
    monkeypatch.setattr(deploy.actors, "REOPEN_INTERVAL_S", 0.0)


@pytest.fixture
def never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.actors, "REOPEN_INTERVAL_S", 3600.0)


def make_actor(run: Path, scoring_id: str = "id") -> ControllerActor:
    config = ControllerConfig(block_size=2, commit_interval_s=0.01)
    return ControllerActor(str(run), SAMPLES, scoring_id, config, wanted=2)


def ups(run: Path) -> list[int]:
    return [event["pid"] for event in read_events(run) if event["event"] == "controller_up"]


def test_nothing_is_opened_before_somebody_asks(tmp_path: Path) -> None:
    actor = make_actor(tmp_path)
    actor.close()

    assert not (tmp_path / "scores").exists()
    assert ups(tmp_path) == []


def test_first_call_opens_it_and_close_commits(tmp_path: Path) -> None:
    actor = make_actor(tmp_path)
    actor.register("a", 7)
    lease = actor.lease("a", 1, 7)
    assert lease is not None
    actor.submit("a", lease.lease_id, arrow_file(make_rows(lease.sample_ids, 1)), {})
    actor.report("a", "batch_halved", "x")
    actor.set_wanted(3)
    status, decisions, released = actor.status(), actor.decide(("a",)), actor.release("a")
    actor.close()
    reader = ScoreReader(tmp_path / "scores")

    assert (status["wanted"], status["reports"], status["scorers"][0]["pid"]) == (3, {"batch_halved": 1}, 7)
    assert ([decision.count for decision in decisions], released) == ([2], 0)
    assert reader.rows == 2
    assert reader.metadata["wanted"] == 3
    assert ups(tmp_path) == [os.getpid()]


@pytest.mark.usefixtures("at_once")
def test_store_that_cannot_be_opened_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    scores.write_text("a file, such as a full disk leaves none")
    actor = make_actor(tmp_path)
    calls = [
        lambda: actor.register("a", 7),
        lambda: actor.lease("a", 1, 7),
        lambda: actor.decide(()),
        lambda: actor.set_wanted(1),
        lambda: actor.report("a", "batch_halved", ""),
        lambda: actor.release("a"),
        actor.status,
    ]
    for call in calls:
        with refuses(ServiceError, value=scores):
            call()
    actor.close()
    events = list(read_events(tmp_path))
    scores.unlink()

    assert events == []
    assert actor.status()["wanted"] == 2
    assert actor.status()["store_version"] == 0
    assert ups(tmp_path) == [os.getpid()]
    actor.close()


@pytest.mark.usefixtures("never_again")
def test_between_two_attempts_the_trouble_is_told_without_a_look_at_the_disk(tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    scores.write_text("")
    actor = make_actor(tmp_path)
    with pytest.raises(ServiceError) as first:
        actor.status()
    scores.unlink()
    with pytest.raises(ServiceError) as second:
        actor.status()

    assert str(first.value) == str(second.value)
    assert not scores.exists()


@pytest.mark.usefixtures("at_once")
def test_damaged_store_is_reopened_once_it_is_repaired(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "scores", SAMPLES, scoring_id="id") as writer:
        writer.append(make_rows([0, 1, 2], 4))
    description = tmp_path / "scores" / "store.json"
    whole = description.read_bytes()
    description.write_bytes(whole[:-4])
    actor = make_actor(tmp_path)
    with refuses(ServiceError, str(description), description) as caught:
        actor.status()
    assert "restore it" in caught.value.fix
    assert "restore it" not in caught.value.problem
    description.write_bytes(whole)

    assert actor.status()["store_version"] == 1
    actor.close()


@pytest.mark.usefixtures("at_once")
def test_store_of_another_attack_is_a_mismatch(tmp_path: Path) -> None:
    ScoreWriter(tmp_path / "scores", SAMPLES, scoring_id="other").close()
    actor = make_actor(tmp_path)
    for _ in range(2):
        with refuses(StoreMismatch, value="scoring_id"):
            actor.status()

    assert ups(tmp_path) == []


@pytest.mark.usefixtures("never_again")
def test_store_of_another_attack_is_a_mismatch_between_two_attempts_too(tmp_path: Path) -> None:
    """Whoever asks second must not take it for a trouble that passes."""
    ScoreWriter(tmp_path / "scores", SAMPLES, scoring_id="other").close()
    actor = make_actor(tmp_path)
    for _ in range(2):
        with refuses(StoreMismatch, value="scoring_id"):
            actor.status()


@pytest.mark.usefixtures("never_again")
@pytest.mark.parametrize("damaged", ["train/attempt-0001.json", "quarantine.arrow"])
def test_every_failure_to_open_is_paced(tmp_path: Path, damaged: str) -> None:
    """Each takeover leaves a manifest that is kept for ever, and scorers ask many times a second: none is made."""
    (tmp_path / damaged).parent.mkdir(exist_ok=True)
    (tmp_path / damaged).write_text("{")
    actor = make_actor(tmp_path)
    for _ in range(5):
        with pytest.raises((SteppeError, ValueError)):
            actor.status()

    assert Folder(tmp_path / "scores" / "manifests").names() == []
