"""The training in workers of Ray Train, as the driver starts it."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.config import RunConfig
from deploy.scoring import Scoring
from deploy.training import Desk, Outcome, TrainerOnRay
from shared.attempts import attempts
from shared.catalogue import Run
from shared.checkpoints import stable
from shared.datasets import load_dataset
from shared.errors import ConfigError, TrainingDiverged
from shared.events import read_events
from tests.raising import refuses
from tests.waiting import wait_for
from trainer.feed import NoScores
from trainer.loop import Progress


def make_config(num_workers: int = 2, **train: Any) -> RunConfig:
    """6 steps an epoch."""
    settings = {"epochs": 2, "batch_size": 20, "device": "cpu", "threads": 1, "save_every_steps": 2} | train
    return RunConfig.model_validate(
        {
            "data": {"name": "digits", "subset": 120},
            "model": {"width": 8},
            "train": settings,
            "trainer": {"num_workers": num_workers, "cpus": 0.5, "max_failures": 1},
            "scoring": {"mode": "off"},
        }
    )


def make_run(folder: Path, config: RunConfig) -> Run:
    dataset = load_dataset(config.data)
    return Run.create(
        folder,
        dataset_fingerprint=dataset.fingerprint,
        train=dataset.train,
        config=config.model_dump(mode="json"),
        scoring_id=config.scoring.scoring_id,
    )


class Watcher:
    """The driver's part: hears the news, and may wish to stop."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.news: list[Progress] = []
        self.said: list[str] = []
        self.stop_at = stop_at

    def stopped(self) -> bool:
        return self.stop_at is not None and any(one.step >= self.stop_at for one in self.news)

    def train(self, config: RunConfig, run: Run) -> Outcome:
        scoring = Scoring(NoScores(run.num_samples), {}, dict)
        return TrainerOnRay(config, run, self.said.append).train(scoring, self.news.append, self.stopped)


def test_workers_train_to_the_end_and_rank_0_publishes(ray_cluster: None, run_folder: Path) -> None:
    config = make_config(warmup_steps=4, publish_every_steps=4)
    watcher, run = Watcher(), make_run(run_folder, config)
    outcome = watcher.train(config, run)

    assert (outcome.result.steps, outcome.result.finished, outcome.result.draws.total) == (12, True, 240)
    assert [one.step for one in stable(run.path)] == [12, 8, 4]
    assert sorted(outcome.published_at) == [1, 2, 3]
    assert [one.epoch for one in watcher.news if one.evaluated] == [0, 1]
    assert watcher.news[-1].accuracy == outcome.result.test_accuracy
    assert {path.name for path in (run.path / "logs").glob("trainer-*")} == {"trainer-0.log", "trainer-1.log"}


@pytest.mark.slow
def test_stopped_in_order_it_goes_on_with_another_number_of_workers(ray_cluster: None, run_folder: Path) -> None:
    config = make_config(epochs=100000)
    run = make_run(run_folder, config)
    first = Watcher(stop_at=1).train(config, run)
    config = make_config(1, epochs=100000)
    second = Watcher(stop_at=first.result.steps + 1).train(config, run)

    assert (first.result.finished, second.result.finished) == (False, False)
    assert [one.fork_step for one in attempts(run.path)] == [0, first.result.steps]
    assert second.result.steps > first.result.steps
    assert next(stable(run.path)).step == second.result.steps
    assert second.result.draws.total == second.result.draws.unscored > first.result.draws.total


@pytest.mark.slow
def test_a_killed_worker_begins_all_again_from_the_last_saved_state(ray_cluster: None, run_folder: Path) -> None:
    config = make_config(epochs=100000)
    run = make_run(run_folder, config)
    watcher, outcomes = Watcher(), []
    training = threading.Thread(target=lambda: outcomes.append(watcher.train(config, run)))
    training.start()
    wait_for(lambda: any(event["event"] == "state_saved" for event in read_events(run.path)), what="a saved state")
    kill(one_of_ours(is_rank_1_of(run)))
    wait_for(lambda: len(attempts(run.path)) == 2, what="the second attempt")
    fork_step, heard = attempts(run.path)[1].fork_step, len(watcher.news)
    wait_for(lambda: any(one.step > fork_step for one in watcher.news[heard:]), what="training after it")
    watcher.stop_at = 0
    training.join()

    assert fork_step > 0
    assert outcomes[0].result.finished is False
    assert outcomes[0].result.steps > fork_step
    assert f"run {run.path}, resumed at step {attempts(run.path)[1].fork_step}" in watcher.said


@pytest.mark.slow
def test_a_killed_desk_is_replaced_and_the_training_goes_on(ray_cluster: None, run_folder: Path) -> None:
    config = make_config(epochs=100000)
    run = make_run(run_folder, config)
    watcher, outcomes = Watcher(), []
    training = threading.Thread(target=lambda: outcomes.append(watcher.train(config, run)))
    training.start()
    wait_for(lambda: watcher.news, what="news of the training")
    kill(one_of_ours(is_actor("Desk")))
    heard = len(watcher.news)
    wait_for(lambda: len(watcher.news) > heard + 1, what="news after that")
    watcher.stop_at = 0
    training.join()

    assert len(attempts(run.path)) == 1
    assert outcomes[0].result.finished is False
    assert watcher.news[-1].step > watcher.news[heard].step
    assert not [line for line in watcher.said if "failed" in line]


@pytest.mark.slow
def test_ray_train_that_ends_before_the_training_has_begun_is_started_again(
    ray_cluster: None, run_folder: Path
) -> None:
    config = make_config()
    run = make_run(run_folder, config)
    outcomes: list[Outcome] = []
    training = threading.Thread(target=lambda: outcomes.append(Watcher().train(config, run)))
    training.start()
    kill(one_of_ours(is_actor("TrainController")))
    training.join()

    assert outcomes[0].result.finished
    assert len(attempts(run.path)) == 1


Matches = Callable[[psutil.Process], bool]


def one_of_ours(matches: Matches) -> psutil.Process:
    """The first such process of this test's own cluster, as soon as it is there."""

    def find() -> psutil.Process | None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if matches(process):
                    return process
        return None

    found = wait_for(find, what="the process")
    assert found is not None
    return found


def is_actor(name: str) -> Matches:
    return lambda process: process.cmdline()[:1] == [f"ray::{name}"]


def is_rank_1_of(run: Run) -> Matches:
    """The trainer worker that has this log of the run open."""
    log = str(run.path / "logs" / "trainer-1.log")
    return lambda process: any(file.path == log for file in process.open_files())


def kill(process: psutil.Process) -> None:
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_training_that_diverges_is_not_tried_again(ray_cluster: None, run_folder: Path) -> None:
    config = make_config(learning_rate=1e30, momentum=0.0)
    run = make_run(run_folder, config)

    with pytest.raises(TrainingDiverged):
        Watcher().train(config, run)
    assert len(attempts(run.path)) == 1


@pytest.mark.slow
def test_what_fails_again_and_again_is_raised_as_it_is(ray_cluster: None, run_folder: Path) -> None:
    """Of 120 samples 3 workers cannot share batches of 20."""
    config = make_config(3)
    run = make_run(run_folder, config)

    with refuses(ConfigError, "train.batch_size", 20):
        Watcher().train(config, run)
    assert len(attempts(run.path)) == 2


def test_the_desk_keeps_news_until_they_are_heard_and_a_new_one_goes_on() -> None:
    desk = Desk()
    desk.tell("a")
    desk.tell("b")
    assert desk.look(0, False) == (["a", "b"], {})
    assert desk.look(0, False) == (["a", "b"], {})
    desk.join(1, "host")
    desk.tell("c")
    assert desk.look(2, True) == (["c"], {1: "host"})
    assert desk.is_stopped()
    assert desk.look(0, True)[0] == ["c"]  # asked before, answered late

    after_a_kill = Desk()
    after_a_kill.tell("d")
    assert after_a_kill.look(3, True) == (["d"], {})
    assert after_a_kill.look(4, True) == ([], {})
    assert after_a_kill.is_stopped()
