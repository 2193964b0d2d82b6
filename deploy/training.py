"""One attempt of the training: in the driver's own process, or in workers of Ray Train. Both run `trainer.loop.train`.

In the driver's process there is no Ray for it. With workers, rank 0 does what the driver does else: it begins the
attempt, publishes, reads scores and saves; the driver looks on, and asks it to stop, by a desk between them.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch

from deploy.config import RunConfig
from deploy.logs import log_to
from deploy.packages import check_packages
from deploy.placement import ON_HEAD, draining_nodes
from deploy.scoring import Scoring
from shared.attempts import Attempt, begin, count
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.datasets import Dataset, load_dataset
from shared.errors import CheckpointError, ServiceError, SteppeError, TrainingDiverged
from shared.events import Events
from shared.models import build_model
from trainer.comm import Alone, Comm, Ranks
from trainer.config import TrainConfig
from trainer.draws import DrawLog, Recorded
from trainer.feed import NoScores, ScoreFeed
from trainer.loop import Progress, TrainResult, train
from trainer.state import SavedState, StateSaver, load_newest_state

if TYPE_CHECKING:
    from deploy.actors import Handle

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.2
DESK_TIMEOUT_S = 10.0
START_TRIES = 3
STORAGE = "ray_train"  # below the run's train/

Say = Callable[[str], None]
Show = Callable[[Progress], None]
Stopped = Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an attempt. Times are of one process's time.monotonic.

    `published_at`: when each model_version was handed to the publisher; `first_seen`: when scores of it were first the
    newest that the sampler could see.
    """

    result: TrainResult
    published_at: Mapping[int, float]
    first_seen: Mapping[int, float]
    checkpoints_failed: int = 0
    checkpoints_superseded: int = 0
    scores_unreadable: int = 0


class TrainerHere:
    """The trainer in this process: opening it begins the attempt."""

    def __init__(self, config: RunConfig, run: Run, dataset: Dataset, say: Say) -> None:
        self._config, self._run, self._dataset, self._say = config, run, dataset, say
        self.publisher = CheckpointPublisher(run.path, keep_last=config.train.keep_checkpoints)
        try:
            self._recorded = recorded(config)
            self._state, self._attempt = begin_attempt(config, run, dataset, self.publisher, say)
        except BaseException:
            self.close()
            raise

    def train(self, scoring: Scoring, show: Show, stopped: Stopped) -> Outcome:
        """To the end, or until `stopped`."""
        with logged_draws(self._run, self._attempt, self._say) as draw_log:
            result = train(
                train_config(self._config),
                Alone(),
                seeded_model(self._config, self._dataset),
                self._dataset.for_training(),
                self.publisher,
                scoring.scores,
                show,
                stopped,
                epoch_scorer=scoring.epoch_scorer,
                saver=StateSaver(self._run.path, self._attempt.attempt),
                resumed=self._state,
                draw_log=draw_log,
                recorded=self._recorded,
            )
        self.close()
        return outcome_of(result, self.publisher, scoring.first_seen, scoring.unreadable())

    def close(self) -> None:
        close_publisher(self.publisher, self._say)


def begin_attempt(
    config: RunConfig, run: Run, dataset: Dataset, publisher: CheckpointPublisher, say: Say
) -> tuple[SavedState | None, Attempt]:
    """The state to go on from, None at a fresh start, and this attempt, recorded.

    The weights of a resumed state are published at once: scorers and readers go on from them, and never back.
    """
    is_resumed = count(run.path) > 0
    state = load_newest_state(run.path) if is_resumed else None
    attempt = begin(
        run.path,
        fork_step=state.step if state else 0,
        last_valid_version=state.model_version if state else 0,
        first_version=publisher.next_version,
    )
    Events(run.path).append("resumed" if is_resumed else "started", **dataclasses.asdict(attempt))
    say(f"run {run.path}" + (f", resumed at step {attempt.fork_step}" if is_resumed else ""))
    if state is not None and config.scoring.mode != "every_epoch":
        model = seeded_model(config, dataset)
        model.load_state_dict(state.content["model"])
        publisher.publish(model, state.step)
        publisher.flush()
    return state, attempt


def seeded_model(config: RunConfig, dataset: Dataset) -> torch.nn.Module:
    """The network as the training begins with it; torch's random numbers go on from there."""
    torch.manual_seed(config.train.seed)
    return build_model(config.model, dataset)


def train_config(config: RunConfig) -> TrainConfig:
    """In shadow mode scores are made and shown, and every sample is drawn alike."""
    if config.scoring.mode != "shadow":
        return config.train
    curriculum = config.train.curriculum.model_copy(update={"name": "uniform", "guard": "none"})
    return config.train.model_copy(update={"curriculum": curriculum})


def recorded(config: RunConfig) -> Recorded | None:
    """The draws of `run.replay`. Raises StateError when it has none."""
    return Recorded(config.run.replay) if config.run.replay is not None else None


@contextlib.contextmanager
def logged_draws(run: Run, attempt: Attempt, say: Say) -> Iterator[DrawLog]:
    """The log of this attempt's draws; it is said when it could not be written."""
    log = DrawLog(run.path, attempt.attempt)
    try:
        yield log
    finally:
        log.close()
        if log.failed is not None:
            say(f"the draws could not be logged, so the run cannot be replayed: {log.failed}")


def outcome_of(
    result: TrainResult, publisher: CheckpointPublisher, first_seen: Mapping[int, float], unreadable: int
) -> Outcome:
    return Outcome(result, publisher.published_at, first_seen, publisher.failed, publisher.skipped, unreadable)


def close_publisher(publisher: CheckpointPublisher, say: Say) -> None:
    """The last checkpoint is there, or it is said why not."""
    try:
        publisher.close()
    except CheckpointError as error:
        say(f"the last checkpoint is missing: {error}")


# -- workers of Ray Train ----------------------------------------------------------------------------------------------


class Desk:
    """Between the workers and the driver, an actor: what the training says, where it is, and whether it is to stop.

    Ray starts it anew when its process is gone; what the driver knows by then, it says again with each look.
    """

    def __init__(self) -> None:
        self._said: list[Progress | str] = []
        self._heard = 0  # and forgotten
        self._node_of: dict[int, str] = {}
        self._is_stopped = False

    def join(self, rank: int, node_id: str) -> None:
        self._node_of[rank] = node_id

    def tell(self, news: Progress | str) -> None:
        self._said.append(news)

    def look(self, heard: int, is_stopped: bool) -> tuple[list[Progress | str], dict[int, str]]:
        """What was told after the first `heard` news, and the host of each rank. `is_stopped`: workers are to stop.

        News are kept until they are heard: an answer may get lost.
        """
        newly_heard = heard - self._heard
        if 0 < newly_heard <= len(self._said):  # more were told to an earlier process: none of these was heard
            del self._said[:newly_heard]
        self._heard, self._is_stopped = max(heard, self._heard), is_stopped
        return list(self._said), dict(self._node_of)

    def is_stopped(self) -> bool:
        return self._is_stopped


class TrainerOnRay:
    """The trainer in `trainer.num_workers` workers of Ray Train. Each life of theirs begins an attempt."""

    publisher = None  # rank 0 has it

    def __init__(self, config: RunConfig, run: Run, say: Say) -> None:
        self._config, self._run, self._say = config, run, say

    def train(self, scoring: Scoring, show: Show, stopped: Stopped) -> Outcome:
        """To the end, or until `stopped`. Ray must be up; scores are read by rank 0.

        Workers whose host is about to go, by an announced preemption, stop in order, and all begin again elsewhere.

        Raises: TrainingDiverged; else what ended the workers more than `trainer.max_failures` times, as it is when it
            is ours, or as ServiceError.
        """
        self._say(f"training in {self._config.trainer.num_workers} workers of Ray Train")
        while True:
            outcome, is_moving = _train_in_one_place(self._config, self._run, show, stopped, self._say)
            if outcome.result.finished or stopped() or not is_moving:
                return outcome

    def close(self) -> None: ...


def _train_in_one_place(config: RunConfig, run: Run, show: Show, stopped: Stopped, say: Say) -> tuple[Outcome, bool]:
    """To the end, until `stopped`, or until a host of the workers is about to go: then the second answer is True."""
    import ray

    from deploy.actors import ask

    remote: Any = ray.remote
    desk: Handle = remote(max_restarts=-1, max_task_retries=-1, **ON_HEAD)(Desk).remote()
    heard, is_moving, is_told = 0, False, False
    node_of: dict[int, str] = {}

    def look() -> None:
        """Pass on what is new, and tell the desk to stop where that is due."""
        nonlocal heard, is_moving, is_told
        said, nodes = ask(desk.look.remote(heard, is_told), DESK_TIMEOUT_S)
        heard += len(said)
        node_of.update(nodes)
        for news in said:
            if isinstance(news, str):
                say(news)
            else:
                show(news)
        if not is_told and (stopped() or draining_nodes() & set(node_of.values())):
            is_told, is_moving = True, not stopped()
            if is_moving:
                say("a host of the trainer is about to go: the training stops there and begins again elsewhere")

    try:
        with ThreadPoolExecutor(1, "ray train") as pool:  # not this thread: Ray Train would take Ctrl-C over
            fitting = pool.submit(_fit, config, run, desk)
            is_done = False
            while not is_done:
                is_done = bool(wait([fitting], timeout=LOOK_INTERVAL_S).done)
                try:
                    look()
                except ServiceError as error:  # it is asked again; what ends the training is the training's to say
                    logger.warning("the desk does not answer now: %s", error)
            answer = fitting.result()
    finally:
        ray.kill(desk)
    if isinstance(answer, SteppeError):
        raise answer
    return answer, is_moving


def _fit(config: RunConfig, run: Run, desk: "Handle", tries: int = START_TRIES) -> "Outcome | SteppeError":
    """A training by Ray Train, or what ended it. A start is tried again: Ray may place it in a process that ends."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from deploy.actors import first_line

    trainer, begun = config.trainer, count(run.path)
    resources = {"CPU": trainer.cpus, "GPU": trainer.gpus} if trainer.gpus else {"CPU": trainer.cpus}
    work: Any = _work
    training = TorchTrainer(
        work,
        train_loop_config={"config": config, "run_uri": str(run.path), "desk": desk},
        scaling_config=ray.train.ScalingConfig(
            num_workers=trainer.num_workers, use_gpu=trainer.gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=STORAGE,
            storage_path=str(run.path / "train"),
            failure_config=ray.train.FailureConfig(max_failures=trainer.max_failures),
        ),
    )
    try:
        result: Any = training.fit()  # its stubs are those of the first version
    except ray.exceptions.RayActorError as error:  # of Ray Train itself
        if tries == 1 or count(run.path) > begun:
            return _ended(f"the training ended: {first_line(error)}", run)
        logger.warning("Ray Train ended before the training had begun, and is started again: %s", error)
        return _fit(config, run, desk, tries - 1)
    except ray.train.TrainingFailedError as error:
        return _cause(error, run)
    answer: Outcome | SteppeError = result.return_value
    return answer


def _cause(error: Exception, run: Run) -> SteppeError:
    """What ended the lowest of the ranks that failed, as it is when it is ours; else what Ray Train says."""
    from deploy.actors import first_line

    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return _ended(f"the training ended: {first_line(error)}", run)
    rank = min(failures)
    if isinstance(cause := failures[rank], SteppeError):
        return cause
    return _ended(f"the training ended at rank {rank}: {first_line(cause)}", run)


def _ended(problem: str, run: Run) -> ServiceError:
    return ServiceError(problem, fix=f"see {run.path / 'logs'}", key=str(run.path))


def _work(given: Mapping[str, Any]) -> "Outcome | SteppeError":
    """The training as one rank of Ray Train sees it; what is returned counts at rank 0."""
    import ray

    check_packages()
    config: RunConfig = given["config"]
    run, comm = Run(given["run_uri"]), Ranks(sync_batchnorm=config.trainer.sync_batchnorm)
    log_to(run.path, f"trainer-{comm.rank}")
    given["desk"].join.remote(comm.rank, ray.get_runtime_context().get_node_id())
    dataset = load_dataset(config.data)
    run.check_dataset(dataset.fingerprint)
    try:
        with contextlib.ExitStack() as stack:
            if comm.rank == 0:
                return _lead(config, run, dataset, comm, _Line(given["desk"]), stack)
            comm.highest(0)  # rank 0 has begun the attempt
            return _follow(config, run, dataset, comm)
    except TrainingDiverged as error:  # at all ranks; and again, were it tried again
        return error
    except Exception:
        logger.exception("rank %d ends", comm.rank)
        raise


def _lead(
    config: RunConfig, run: Run, dataset: Dataset, comm: Comm, line: "_Line", stack: contextlib.ExitStack
) -> Outcome:
    publisher = CheckpointPublisher(run.path, keep_last=config.train.keep_checkpoints)
    stack.callback(close_publisher, publisher, line.say)
    state, attempt = begin_attempt(config, run, dataset, publisher, line.say)
    comm.highest(0)
    feed = None
    if config.scoring.mode != "off":
        curriculum = config.train.curriculum
        feed = stack.enter_context(
            ScoreFeed(
                run.path,
                run.num_samples,
                curriculum.measure,
                memory=curriculum.memory,
                refresh_interval_s=curriculum.refresh_interval_s,
                newest_version=lambda: publisher.newest_version,
            )
        )
    with logged_draws(run, attempt, line.say) as draw_log:
        result = train(
            train_config(config),
            comm,
            seeded_model(config, dataset),
            dataset.for_training(),
            publisher,
            feed or NoScores(run.num_samples),
            line.show,
            line.stopped,
            saver=StateSaver(run.path, attempt.attempt),
            resumed=state,
            draw_log=draw_log,
            recorded=recorded(config),
        )
    close_publisher(publisher, line.say)
    return outcome_of(result, publisher, feed.first_seen if feed else {}, feed.failures if feed else 0)


def _follow(config: RunConfig, run: Run, dataset: Dataset, comm: Comm) -> Outcome:
    state = load_newest_state(run.path)
    result = train(
        train_config(config),
        comm,
        seeded_model(config, dataset),
        dataset.for_training(),
        None,
        NoScores(run.num_samples),
        lambda _: None,
        resumed=state,
    )
    return Outcome(result, {}, {})


class _Line:
    """Rank 0's end of the desk: news go out without waiting, the wish to stop comes in when it comes."""

    def __init__(self, desk: "Handle") -> None:
        self._desk = desk
        self._asked: Any = None
        self._ask_at = 0.0
        self._is_stopped = False

    def show(self, progress: Progress) -> None:
        self._desk.tell.remote(progress)

    def say(self, text: str) -> None:
        self._desk.tell.remote(text)

    def stopped(self) -> bool:
        import ray

        if self._asked is None and time.monotonic() >= self._ask_at:
            self._asked = self._desk.is_stopped.remote()
            self._ask_at = time.monotonic() + LOOK_INTERVAL_S
        elif self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            self._is_stopped, self._asked = self._is_stopped or ray.get(self._asked), None
        return self._is_stopped
