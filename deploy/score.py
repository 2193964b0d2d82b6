"""Scorers without a trainer: for a training of the user's own, in another process or in this one.

The training publishes checkpoints into the run's folder and reads scores from it (`steppe.CheckpointPublisher`,
`steppe.CurriculumSampler`); here controller, scorers and REST service follow it until they are told to stop.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.cluster import LOCAL
from deploy.config import RunConfig
from deploy.driver import check_folder_stays, create, rooted
from deploy.first_batch import check_first_batch
from deploy.interrupts import Interrupts, interrupts
from deploy.logs import logging_to
from deploy.progress import number
from deploy.resume import check_fits, clear_leftovers
from deploy.runtime import RuntimeFile
from deploy.scoring import open_scoring
from services.server import bind
from shared.catalogue import Run, RunState
from shared.config import make_config, read_config
from shared.datasets import load_dataset
from shared.errors import ConfigError, RunError
from shared.storage import local_path

if TYPE_CHECKING:
    from trainer.feed import Scores

LOOK_INTERVAL_S = 0.5

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A run whose samples are being scored: `path` is its folder, `scores` are for a sampler in this process."""

    run: Run
    scores: "Scores"
    url: str
    status: Callable[[], Mapping[str, Any]]

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def num_samples(self) -> int:
        return self.run.num_samples


@contextlib.contextmanager
def score(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    *,
    address: str = LOCAL,
    say: Say = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Scored]:
    """Inside, scorers score the samples of `config` with the newest checkpoint of its run. All end on the way out.

    It begins when the first scorer is up, or after `train.startup_wait_s`.

    The run is that of `run.folder` when there is one, else a new one. The training may publish from this process or
    from another; `train` settings are none of its business, but for `train.curriculum.measure`.

    Args:
        config: a TOML file, its content, or a RunConfig.
        address: of the Ray cluster; "local" starts one of the run's own.

    Raises: ConfigError for settings that cannot work, RunError when the run is another's or is up already.
    """
    resolved = _resolved(config)
    bind(resolved.rest.host, resolved.rest.port).close()
    check_folder_stays(resolved, in_job=False)
    dataset = load_dataset(resolved.data)
    check_first_batch(resolved, dataset)
    resolved = rooted(resolved)
    run = _open(resolved) or create(resolved, dataset, is_trained_here=False)
    check_fits(run, resolved, dataset)
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(run.path, "driver"))
        stack.enter_context(run.locked())
        clear_leftovers(run)
        runtime = RuntimeFile(run, "score")
        stack.callback(runtime.remove)
        runtime.update()
        run.create_token()
        say(f"run {run.path}")
        scoring = stack.enter_context(open_scoring(resolved, run, dataset, None, runtime, say, stopped, address))
        scoring.await_scorer()
        yield Scored(run, scoring.scores, str((run.runtime() or {}).get("url", "")), scoring.status)


def score_until_stopped(config: str, settings: tuple[str, ...], address: str) -> None:
    """Score until Ctrl-C or SIGTERM, which raise KeyboardInterrupt; says on stderr how far it is."""
    resolved = read_config(RunConfig, config, settings)

    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    with (
        contextlib.redirect_stdout(sys.stderr),
        interrupts() as interrupted,
        score(resolved, address=address, say=say, stopped=interrupted.came) as scored,
    ):
        say(f"ready for steppe.CheckpointPublisher({str(scored.path)!r}); Ctrl-C ends the scoring")
        _tell(scored, resolved.run.progress_interval_s, say, interrupted)


def _tell(scored: Scored, interval_s: float, say: Say, interrupted: Interrupts) -> None:
    said, said_at = "", -float("inf")
    while True:
        interrupted.check()
        view, newest = scored.scores.view(), scored.scores.newest_version()
        fresh, age = view.fresh_share_and_median_age(newest)
        status = scored.status()
        text = (
            f"checkpoint {newest}  fresh {fresh:.0%}  median age {number(age, '.0f')} versions  "
            f"scored {number(status.get('samples_per_second'), ',.0f')}/s"
        )
        if skipped := status.get("reports", {}).get("checkpoint_skipped"):  # such as of a network in a wrapper
            text += f"  checkpoints skipped: {skipped}, see {scored.path / 'events.jsonl'}"
        if text != said and time.monotonic() - said_at >= interval_s:
            say(text)
            said, said_at = text, time.monotonic()
        time.sleep(LOOK_INTERVAL_S)


def _resolved(config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig) -> RunConfig:
    if isinstance(config, RunConfig):
        resolved = config
    elif isinstance(config, Mapping):
        resolved = make_config(RunConfig, dict(config))
    else:
        resolved = read_config(RunConfig, config)
    if resolved.scoring.mode not in ("async", "shadow"):
        raise ConfigError(
            f"scoring.mode is {resolved.scoring.mode!r}, but without a trainer scorers work beside",
            fix='set it to "async"',
            key="scoring.mode",
        )
    if resolved.trainer.num_workers:
        raise ConfigError(
            f"trainer.num_workers is {resolved.trainer.num_workers}, but nothing is trained here",
            fix="leave it out",
            key="trainer.num_workers",
        )
    return resolved


def _open(config: RunConfig) -> Run | None:
    """The run that is there already."""
    if not config.run.folder or not (local_path(config.run.folder) / "run.json").exists():
        return None
    run = Run(config.run.folder)
    if run.state() == RunState.RUNNING:
        raise RunError(f"{run.path} is running", fix=f"stop it first: steppe down {run.path}", key=str(run.path))
    return run
