"""The driver: one run from start to summary. It owns every actor; what they say to each other goes through files.

loop                      consumes                  produces              waits for           unblocked by
------------------------  ------------------------  --------------------  ------------------  -----------------
trainer step (here)       ids                       weights               nothing of ours     -
publisher thread (here)   a copy of the weights     a checkpoint          a publish request   every k steps
score feed thread (here)  new store versions        an immutable view     refresh interval    time
scorer (actor, 0..n)      newest checkpoint, lease  score rows            a checkpoint;       publish
                                                                          a block to score
commit thread             score rows                a store version       rows; interval      submit; time
  (controller actor)
fleet thread (here)       the controller's          started and drained   tick                time
                          decisions                 scorers
REST (actor)              store, checkpoints,       answers               -                   -
                          controller
"""

import contextlib
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from deploy.cluster import local_cluster
from deploy.config import RunConfig
from deploy.interrupts import Interrupts, interrupts
from deploy.progress import Display
from services.server import bind
from shared.catalogue import Run
from shared.datasets import Dataset, load_dataset
from shared.errors import CheckpointError, ServiceError
from shared.freshness import staleness_bound
from shared.score_store import ScoreReader

if TYPE_CHECKING:
    from deploy.actors import Handle
    from deploy.fleet import Fleet
    from trainer.feed import ScoreFeed
    from trainer.loop import Progress, TrainResult

ACTOR_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0


def run(config: RunConfig) -> dict[str, Any]:
    """Train to the end with scorers beside; returns the summary. All processes are ended on the way out."""
    began = time.perf_counter()
    bind(config.rest.host, config.rest.port).close()
    dataset = load_dataset(config.data)
    opened = Run.create(
        _folder(config),
        dataset_fingerprint=dataset.fingerprint,
        train=dataset.train,
        config=config.model_dump(mode="json"),
        scoring_id=config.scoring.scoring_id,
    )
    news = _News()
    with (
        # Ray prints what it hears of dead workers; stdout is for results.
        contextlib.redirect_stdout(sys.stderr),
        interrupts() as interrupted,
        Display(news.describe, config.run.progress_interval_s) as display,
    ):
        display.say(f"run {opened.path}")
        with local_cluster(opened.path, opened.description["run_id"]) as ray_folder:
            interrupted.check()
            with _services(config, opened, display) as actors:
                opened.write("runtime.json", _runtime(actors, ray_folder))
                display.say(f"REST {actors.url}")
                try:
                    result, published = _train(config, opened, dataset, actors, news, display, interrupted)
                finally:
                    opened.remove("runtime.json")
    summary = _summary(opened, result, published, actors.fleet.status)
    summary["seconds"] = round(time.perf_counter() - began, 3)
    opened.write("summary.json", summary)
    return summary


@dataclasses.dataclass
class _Actors:
    """The run's other processes."""

    controller: "Handle"
    controller_pid: int
    fleet: "Fleet"
    url: str
    rest_pid: int


@contextlib.contextmanager
def _services(config: RunConfig, opened: Run, display: Display) -> "Iterator[_Actors]":
    """Controller, scorers and REST service as actors; drained, committed and ended on the way out."""
    import ray

    from deploy.actors import ControllerActor, RestActor, ScorerActor, ask
    from deploy.fleet import Fleet

    uri = str(opened.path)
    opened.create_token()
    remote: Any = ray.remote  # its stubs do not know every option
    controller = remote(num_cpus=0, max_restarts=-1)(ControllerActor).remote(
        uri, opened.num_samples, config.scoring.scoring_id, config.controller, wanted=config.scoring.replicas
    )
    scorer = remote(num_cpus=config.scoring.cpus, num_gpus=config.scoring.gpus, max_concurrency=3)(ScorerActor)
    rest = remote(num_cpus=0)(RestActor).remote(uri, config.rest, controller)
    fleet = Fleet(controller, lambda scorer_id: scorer.remote(scorer_id, uri, config, controller), display.say)
    try:
        controller_pid = ask(controller.status.remote(), ACTOR_TIMEOUT_S)["pid"]
        url, rest_pid = ask(rest.start.remote(), ACTOR_TIMEOUT_S)
        yield _Actors(controller, controller_pid, fleet, url, rest_pid)
    finally:
        fleet.stop()
        # What does not answer any more is ended with its cluster; committed rows are safe either way.
        for name, closing in (("controller", controller.close.remote()), ("REST service", rest.stop.remote())):
            try:
                ask(closing, END_TIMEOUT_S)
            except ServiceError as error:
                display.say(f"the {name} did not end in order: {error}")


def _train(
    config: RunConfig,
    opened: Run,
    dataset: Dataset,
    actors: _Actors,
    news: "_News",
    display: Display,
    interrupted: Interrupts,
) -> "tuple[TrainResult, int]":
    """The trainer, in this process; its result and how many checkpoints it published."""
    import torch

    from shared.checkpoints import CheckpointPublisher
    from shared.models import build_model
    from trainer.feed import ScoreFeed
    from trainer.loop import train

    torch.manual_seed(config.train.seed)
    model = build_model(config.model, dataset)
    interrupted.check()
    _await_scorer(config, actors.fleet, display)
    with contextlib.ExitStack() as stack:
        publisher = stack.enter_context(CheckpointPublisher(opened.path, keep_last=config.train.keep_checkpoints))
        feed = stack.enter_context(
            ScoreFeed(
                opened.path,
                opened.num_samples,
                refresh_interval_s=config.train.curriculum.refresh_interval_s,
                newest_version=lambda: publisher.newest_version,
            )
        )
        news.connect(feed, actors.fleet)
        result = train(config.train, model, dataset, publisher, feed, news.update, interrupted.came)
        interrupted.check()
        news.pause()
        try:
            publisher.close()
        except CheckpointError as error:
            display.say(f"the last checkpoint is missing: {error}")
        return result, publisher.published


def _await_scorer(config: RunConfig, fleet: "Fleet", display: Display) -> None:
    """Wait for a scorer up to `startup_wait_s`; not at all for one that this cluster can never place."""
    import ray

    scoring = config.scoring
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    needs = {"CPU": scoring.cpus, "GPU": scoring.gpus}
    lacking = [
        f"{n:g} {name} (there are {there.get(name, 0):g})" for name, n in needs.items() if n > there.get(name, 0)
    ]
    if not scoring.replicas:
        return
    if lacking:
        display.say(f"no scorer can be placed: one needs {' and '.join(lacking)}; training starts without")
        return
    display.say(f"waiting for the first scorer, at most {config.train.startup_wait_s:g} s")
    if not fleet.first_scorer.wait(config.train.startup_wait_s):
        display.say(f"no scorer was up within {config.train.startup_wait_s:g} s; training starts without")


class _News:
    """What the display shows, put together from the trainer's, the feed's and the fleet's last words."""

    def __init__(self) -> None:
        self._parts: tuple[ScoreFeed, Fleet] | None = None
        self._progress: Progress | None = None

    def connect(self, feed: "ScoreFeed", fleet: "Fleet") -> None:
        self._parts = (feed, fleet)

    def update(self, progress: "Progress") -> None:
        self._progress = progress

    def pause(self) -> None:
        self._parts = None

    def describe(self) -> dict[str, Any] | None:
        progress, parts = self._progress, self._parts
        if progress is None or parts is None:
            return None
        feed, fleet = parts
        fresh, median_age = feed.view().fresh_share_and_median_age(feed.newest_version())
        return dataclasses.asdict(progress) | {
            "fresh": fresh,
            "median_age": median_age,
            "samples_per_second": fleet.status.get("samples_per_second"),
        }


def _summary(opened: Run, result: "TrainResult", published: int, status: dict[str, Any]) -> dict[str, Any]:
    """What summary.json holds. Shares are of all draws; ages are those of the draws, in versions."""
    reader = ScoreReader(opened.scores_uri)
    draws = result.sampler.draws
    version_N = reader.dense("model_version")
    return {
        "test_accuracy": result.test_accuracy,
        "steps": result.steps,
        "model_versions_published": published,
        "model_versions_scored": int(reader.metadata.get("model_versions_scored", 0)),
        "scored_rows": reader.rows,
        "coverage": float((version_N >= 0).mean()),
        "age_versions_p50": draws.age_quantile(0.5),
        "age_versions_p95": draws.age_quantile(0.95),
        "draws_fresh": draws.fresh / max(draws.total, 1),
        "draws_stale": draws.stale / max(draws.total, 1),
        "draws_unscored": draws.unscored / max(draws.total, 1),
        "staleness_bound": staleness_bound(reader.metadata),
        "scorer_samples_per_second": status.get("samples_per_second_mean"),
        "trainer_seconds_in_publish": round(result.seconds_in_publish, 6),
        "trainer_seconds_in_sampler": round(result.seconds_in_sampler, 6),
        "trainer_seconds_total": round(result.seconds, 6),
        "quarantined_rows": int(reader.metadata.get("quarantined_rows", 0)),
        "run_folder": str(opened.path),
    }


def _runtime(actors: _Actors, ray_folder: Path) -> dict[str, Any]:
    return {
        "url": actors.url,
        "pid": os.getpid(),
        "pid_started": psutil.Process().create_time(),
        "pids": {"controller": actors.controller_pid, "rest": actors.rest_pid},
        "ray_folder": str(ray_folder),
    }


def _folder(config: RunConfig) -> Path:
    if config.run.folder:
        return Path(config.run.folder).absolute()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return (Path(config.run.root) / f"{config.data.name}-{stamp}-{os.getpid()}").absolute()
