"""How a run's samples are scored: beside the training by actors, or inside it at each epoch.

Both ways open the same for the trainer (`Scoring`) and leave the same files; the driver does not tell them apart.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.cluster import LOCAL, joined_cluster, local_cluster, new_ray_folder
from deploy.config import RunConfig
from deploy.packages import code_folder
from deploy.runtime import RuntimeFile
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import Dataset
from shared.errors import ConfigError, ServiceError
from shared.events import Events

if TYPE_CHECKING:
    from deploy.actors import Handle
    from deploy.fleet import Fleet
    from trainer.feed import Scores
    from trainer.loop import EpochScorer

ACTOR_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What the driver and the trainer see of it.

    `status` tells the controller's last numbers; `unreadable` counts refreshes of the sampler's
    view that failed; `first_seen` when each model_version was first the newest that the
    sampler could see (time.monotonic); `await_scorer` returns when training may begin.
    """

    scores: "Scores"
    first_seen: Mapping[int, float]
    status: Callable[[], Mapping[str, Any]]
    unreadable: Callable[[], int] = lambda: 0
    await_scorer: Callable[[], None] = lambda: None
    epoch_scorer: "EpochScorer | None" = None


@contextlib.contextmanager
def open_scoring(
    config: RunConfig,
    run: Run,
    dataset: Dataset,
    publisher: CheckpointPublisher | None,
    runtime: RuntimeFile,
    say: Say,
    stopped: Callable[[], bool],
    address: str = LOCAL,
) -> Iterator[Scoring]:
    """Scoring as `scoring.mode` says, with a REST service beside it; `runtime` is told where its processes are.

    Ray is up inside when scorers or trainer run under it: a cluster of the run's own, or the one at `address`.
    `publisher` is that of a trainer in this process.
    """
    mode = config.scoring.mode
    with contextlib.ExitStack() as stack:
        if mode in ("async", "shadow") or config.trainer.num_workers:
            stack.enter_context(_cluster(address, run, runtime, code_folder(config)))
        if mode == "off":
            from trainer.feed import NoScores

            yield Scoring(NoScores(run.num_samples), {}, dict)
        elif mode == "every_epoch":
            if publisher is None:
                raise ConfigError(
                    "scoring.mode every_epoch needs the trainer in this process",
                    fix="set trainer.num_workers to 0",
                    key="scoring.mode",
                )
            yield stack.enter_context(_inside_training(config, run, dataset, publisher, runtime, say, stopped))
        else:
            yield stack.enter_context(_beside_training(config, run, publisher, runtime, say))


@contextlib.contextmanager
def _cluster(address: str, run: Run, runtime: RuntimeFile, code: Path | None) -> Iterator[None]:
    if address != LOCAL:
        runtime.update(ray_address=address)
        with joined_cluster(address, run, code):
            yield
        return
    ray_folder = new_ray_folder()
    runtime.update(ray_folder=str(ray_folder))  # before anything is there that a kill could leave behind
    with local_cluster(ray_folder, run.path, run.description["run_id"]):
        yield


@contextlib.contextmanager
def _inside_training(
    config: RunConfig,
    run: Run,
    dataset: Dataset,
    publisher: CheckpointPublisher,
    runtime: RuntimeFile,
    say: Say,
    stopped: Callable[[], bool],
) -> Iterator[Scoring]:
    """Without Ray: scorer, controller and REST service are threads and objects of this process."""
    from deploy.every_epoch import EveryEpoch
    from deploy.serve import service

    server = service(run, config.rest)
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        url = server.start()
        runtime.update(url=url, pids={})
        say(f"REST {url}")
        scorer = stack.enter_context(EveryEpoch(config, run, dataset, publisher, say, stopped))
        yield Scoring(scorer, scorer.first_seen, scorer.status, epoch_scorer=scorer)


@contextlib.contextmanager
def _beside_training(
    config: RunConfig, run: Run, publisher: CheckpointPublisher | None, runtime: RuntimeFile, say: Say
) -> Iterator[Scoring]:
    """Controller, scorers and REST service as actors; all ended on the way out."""
    from trainer.feed import ScoreFeed

    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(_actors(config, run, runtime, say))
        feed = stack.enter_context(
            ScoreFeed(
                run.path,
                run.num_samples,
                config.train.curriculum.measure,
                memory=config.train.curriculum.memory,
                refresh_interval_s=config.train.curriculum.refresh_interval_s,
                newest_version=(lambda: publisher.newest_version) if publisher else None,
            )
        )
        yield Scoring(
            feed,
            feed.first_seen,
            lambda: fleet.status,
            unreadable=lambda: feed.failures,
            await_scorer=lambda: _await_scorer(config, fleet, say),
        )


@contextlib.contextmanager
def _actors(config: RunConfig, run: Run, runtime: RuntimeFile, say: Say) -> "Iterator[Fleet]":
    """Controller, scorers and REST service; drained, committed and ended on the way out."""
    import ray

    from deploy.actors import ControllerActor, RestActor, ScorerActor, ask
    from deploy.fleet import Fleet
    from deploy.placement import ON_HEAD, scorer_options
    from deploy.rest import RestKeeper

    uri, scoring, events = str(run.path), config.scoring, Events(run.path)
    remote: Any = ray.remote  # its stubs do not know every option
    controller: Handle = remote(max_restarts=-1, **ON_HEAD)(ControllerActor).remote(
        uri,
        run.num_samples,
        scoring.scoring_id,
        config.controller,
        wanted=scoring.replicas,
        measure=config.train.curriculum.measure,
    )
    scorer = remote(max_concurrency=3, **scorer_options(scoring))(ScorerActor)
    rest = remote(max_concurrency=4, **ON_HEAD)(RestActor)
    with contextlib.ExitStack() as stack:
        stack.callback(_end, "controller", lambda: ask(controller.close.remote(), END_TIMEOUT_S), say)
        fleet = Fleet(controller, lambda name: scorer.remote(name, uri, config, controller), scoring, say, events)
        stack.callback(fleet.stop)
        ask(controller.status.remote(), ACTOR_TIMEOUT_S)  # raises what keeps it from opening the score store

        def start_rest(port: int) -> "Handle":
            return rest.remote(uri, config.rest.model_copy(update={"port": port}), controller)

        keeper = RestKeeper(start_rest, config.rest.port, say, events)
        stack.callback(_end, "REST service", keeper.stop, say)

        def write_runtime() -> None:
            runtime.update(url=keeper.url, pids={"controller": fleet.controller_pid, "rest": keeper.pid})

        keeper.on_change = fleet.on_change = write_runtime
        write_runtime()
        say(f"REST {keeper.url}")
        yield fleet


def _end(name: str, end: Callable[[], object], say: Say) -> None:
    """What does not answer any more is ended with its cluster; committed rows are safe either way."""
    try:
        end()
    except ServiceError as error:
        say(f"the {name} did not end in order: {error}")


def _await_scorer(config: RunConfig, fleet: "Fleet", say: Say) -> None:
    """Wait for a scorer up to `startup_wait_s`; not at all for one that this cluster can never place."""
    wait_s = config.train.startup_wait_s
    if not config.scoring.replicas:
        return
    if lacking := fleet.lacking():
        say(f"no scorer can be placed: one needs {lacking}; training starts without")
        return
    say(f"waiting for the first scorer, at most {wait_s:g} s")
    if not fleet.first_scorer.wait(wait_s):
        say(f"no scorer was up within {wait_s:g} s; training starts without")
