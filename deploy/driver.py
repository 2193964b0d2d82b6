"""The driver: one run from start, or resume, to summary. It owns every actor; the parts speak through files.

loop                      consumes                  produces              waits for           unblocked by
------------------------  ------------------------  --------------------  ------------------  -----------------
trainer step (here, or    ids                       weights               nothing of ours     -
  Ray Train's workers)
publisher thread (there)  a copy of the weights     a checkpoint          a publish request   every k steps
score feed thread (there) new store versions        an immutable view     refresh interval    time
scorer (actor, 0..n)      newest checkpoint, lease  score rows            a checkpoint;       publish
                                                                          a block to score
commit thread             score rows                a store version       rows; interval      submit; time
  (controller actor)
fleet thread (here)       the controller's          started and drained   tick                time
                          decisions                 scorers
rest keeper (here)        the REST actor's end      a new one             tick                time
state saver (there)       a copy of the state       train/state-*         a save request      each epoch
REST (actor)              store, checkpoints,       answers               -                   -
                          controller
"""

import contextlib
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.cluster import IN_JOB, LOCAL, end_processes, remove_ray_folder
from deploy.config import RunConfig
from deploy.first_batch import check_first_batch
from deploy.interrupts import Interrupts, interrupts
from deploy.logs import logging_to
from deploy.plan import check_batches
from deploy.progress import Display
from deploy.resume import check_fits, clear_leftovers
from deploy.runtime import RuntimeFile
from deploy.scoring import Scoring, open_scoring
from deploy.summary import summarise
from deploy.tensorboard import Board, check_tensorboard
from services.server import bind
from shared.attempts import count
from shared.catalogue import Run
from shared.datasets import Dataset, load_dataset
from shared.errors import ConfigError, TrainingDiverged
from shared.events import Events
from shared.storage import local_path

if TYPE_CHECKING:
    from deploy.training import Outcome, TrainerHere, TrainerOnRay
    from trainer.loop import Progress


def run(config: RunConfig, resumed: Run | None = None, address: str = LOCAL) -> dict[str, Any]:
    """Train to the end with scorers beside; returns the summary. All processes are ended on the way out.

    Args:
        resumed: an unfinished run to go on with from its last saved state; else a new one begins.
        address: of the Ray cluster; LOCAL starts one of the run's own.
    """
    began = time.perf_counter()
    if resumed is None:  # else its port may be held by what a killed driver left
        bind(config.rest.host, config.rest.port).close()
    if config.run.tensorboard:
        check_tensorboard()
    check_folder_stays(config, in_job=IN_JOB in os.environ)
    dataset = load_dataset(config.data)
    _check_trainable(config, dataset)
    if config.run.replay is not None:
        Run(config.run.replay).check_dataset(dataset.fingerprint)
    check_first_batch(config, dataset)
    config = rooted(config)
    opened = resumed or create(config, dataset)
    check_fits(opened, config, dataset)
    with (
        # Ray prints what it hears of dead workers; stdout is for results.
        contextlib.redirect_stdout(sys.stderr),
        logging_to(opened.path, "driver"),
        interrupts() as interrupted,
        contextlib.ExitStack() as to_the_end,
        _Session(config, opened, dataset, interrupted, to_the_end, address, is_resumed=resumed is not None) as session,
    ):
        return session.train(began)


class _Session:
    """One attempt of a run: what is opened around the training, and closed on every way out."""

    def __init__(
        self,
        config: RunConfig,
        opened: Run,
        dataset: Dataset,
        interrupted: Interrupts,
        to_the_end: contextlib.ExitStack,
        address: str,
        *,
        is_resumed: bool,
    ) -> None:
        """`to_the_end` holds what must last longer than the session."""
        self._config, self._run, self._dataset, self._interrupted = config, opened, dataset, interrupted
        self._to_the_end, self._address = to_the_end, address
        self._is_resumed = is_resumed
        self._events = Events(opened.path)
        self._news = _News()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Session":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._run.locked())
            self._display = stack.enter_context(Display(self._news.describe, self._config.run.progress_interval_s))
            self._say = self._display.say
            if self._is_resumed and (left := clear_leftovers(self._run)):
                self._say(f"ended {left} processes that the killed driver had left")
            bind(self._config.rest.host, self._config.rest.port).close()
            self._runtime = RuntimeFile(self._run, "run")
            stack.callback(self._runtime.remove)
            self._runtime.update()
            self._run.create_token()
            self._interrupted.at_once = self._end_at_once
            self._trainer = self._open_trainer()
            stack.callback(self._trainer.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        attempt = count(self._run.path)
        if isinstance(error, KeyboardInterrupt):
            self._events.append("interrupted", attempt=attempt)
        elif isinstance(error, TrainingDiverged):
            self._events.append("diverged", attempt=attempt, reason=str(error))
        elif error is not None:
            self._events.append("failed", attempt=attempt, reason=f"{type(error).__name__}: {error}")
        self._stack.close()

    def train(self, began: float) -> dict[str, Any]:
        """The summary of the whole run, which `began` so long ago (time.perf_counter); it is written, too."""
        with open_scoring(
            self._config,
            self._run,
            self._dataset,
            self._trainer.publisher,
            self._runtime,
            self._say,
            self._interrupted.came,
            self._address,
        ) as scoring:
            outcome = self._train(scoring)
            self._news.pause()
            self._trainer.close()
        summary = summarise(self._run, outcome, scoring.status(), self._config.scoring)
        summary["seconds"] = round(time.perf_counter() - began, 3)
        self._run.write("summary.json", summary)
        self._events.append("finished", step=summary["steps"], test_accuracy=summary["test_accuracy"])
        return summary

    def _open_trainer(self) -> "TrainerHere | TrainerOnRay":
        from deploy.training import TrainerHere, TrainerOnRay  # torch before Ray: the other way round MKL may not load

        if self._config.trainer.num_workers:
            return TrainerOnRay(self._config, self._run, self._say)
        return TrainerHere(self._config, self._run, self._dataset, self._say)

    def _train(self, scoring: Scoring) -> "Outcome":
        self._interrupted.check()
        scoring.await_scorer()
        self._news.connect(scoring)
        with contextlib.ExitStack() as stack:
            show = self._watchers(stack)
            # From here on, the clean-up included, a signal raises nothing: the training stops between two steps.
            self._to_the_end.enter_context(self._interrupted.deferred())
            outcome = self._trainer.train(scoring, show, self._interrupted.came)
        if not outcome.result.finished:
            raise KeyboardInterrupt
        return outcome

    def _watchers(self, stack: contextlib.ExitStack) -> "Callable[[Progress], None]":
        """What is told how the training goes: the display, the diary, and where wanted TensorBoard."""
        if self._config.run.tensorboard:
            stack.enter_context(Board(self._run.path / "tensorboard", self._news.describe, self._say))

        def show(progress: "Progress") -> None:
            self._news.update(progress)
            if progress.evaluated:
                facts = dataclasses.asdict(progress)
                self._events.append(
                    "epoch", **{key: facts[key] for key in ("epoch", "step", "steps", "loss", "accuracy")}
                )

        return show

    def _end_at_once(self) -> None:
        """On a second Ctrl-C, from the signal handler: no lock is taken, nobody is waited for."""
        end_processes(self._run.path, 0)
        remove_ray_folder((self._run.runtime() or {}).get("ray_folder"))
        self._run.remove("runtime.json")


class _News:
    """What the display shows, put together from the trainer's and the scoring's last words."""

    def __init__(self) -> None:
        self._scoring: Scoring | None = None
        self._progress: Progress | None = None

    def connect(self, scoring: Scoring) -> None:
        self._scoring = scoring

    def update(self, progress: "Progress") -> None:
        self._progress = progress

    def pause(self) -> None:
        self._scoring = None

    def describe(self) -> dict[str, Any] | None:
        progress, scoring = self._progress, self._scoring
        if progress is None or scoring is None:
            return None
        scores = scoring.scores
        fresh, median_age = scores.view().fresh_share_and_median_age(scores.newest_version())
        status = scoring.status()
        return dataclasses.asdict(progress) | {
            "fresh": fresh,
            "median_age": median_age,
            "samples_per_second": status.get("samples_per_second"),
            "fidelity": (status.get("fidelity") or {}).get("latest"),
        }


def rooted(config: RunConfig) -> RunConfig:
    """`config` with an absolute data.root: scorers start in another folder."""
    if config.data.root is None:
        return config
    data = config.data.model_copy(update={"root": str(Path(config.data.root).expanduser().absolute())})
    return config.model_copy(update={"data": data})


def create(config: RunConfig, dataset: Dataset, *, is_trained_here: bool = True) -> Run:
    """The folder of a new run."""
    return Run.create(
        _folder(config),
        dataset_fingerprint=dataset.fingerprint,
        train=dataset.train,
        config=config.model_dump(mode="json"),
        scoring_id=config.scoring.scoring_id,
        is_trained_here=is_trained_here,
    )


def check_folder_stays(config: RunConfig, *, in_job: bool) -> None:
    """Raises ConfigError for a run folder that would go with a job's temporary folder."""
    name, folder = ("run.folder", config.run.folder) if config.run.folder else ("run.root", config.run.root)
    if in_job and not Path(folder).is_absolute() and "://" not in folder:
        raise ConfigError(
            f"{name} is {folder!r}, which a cluster job takes as a part of its temporary folder",
            fix="set it to an absolute path that all hosts share",
            key=name,
        )


def _check_trainable(config: RunConfig, dataset: Dataset) -> None:
    """What the training would only refuse after everything else was started. Raises ConfigError."""
    check_batches(config, len(dataset.train))
    if config.train.device != "auto":
        from trainer.loop import pick_device

        pick_device(config.train.device)


def _folder(config: RunConfig) -> Path:
    if config.run.folder:
        return local_path(config.run.folder)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return local_path(config.run.root) / f"{config.data.name.replace(':', '.')}-{stamp}-{os.getpid()}"
