"""Which run `--resume` goes on with, and whether the settings allow it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.cluster import end_processes, remove_ray_folder
from deploy.config import RunConfig
from shared.attempts import attempts
from shared.catalogue import Run, RunState, all_runs
from shared.config import make_config, read_config
from shared.datasets import Dataset
from shared.errors import ConfigError, RunError

MAY_CHANGE = (  # they do not decide what is trained
    "run.",
    "rest.",
    "controller.",
    "data.root",
    "data.download",
    "trainer.",
    "train.device",
    "train.threads",
    "train.startup_wait_s",
    "train.keep_checkpoints",
    "train.save_every_steps",
    "train.save_interval_s",
    "scoring.replicas",
    "scoring.cpus",
    "scoring.gpus",
    "scoring.labels",
    "scoring.fallback_labels",
    "scoring.resources",
    "scoring.nice",
    "scoring.threads",
    "scoring.batch_size",
    "scoring.poll_interval_s",
)


@dataclasses.dataclass(frozen=True)
class Resumable:
    """A run that is not finished, and the settings to go on with."""

    run: Run
    config: RunConfig


def find_resumable(path: str, settings: Sequence[str] = ()) -> Resumable:
    """What to resume for `path`: a run folder; or a configuration file, whose `run.folder`, or newest run, is meant.

    Raises RunError when there is none, when it is finished or still runs; ConfigError when the settings differ.
    """
    if Path(path).is_dir():
        run = Run(path)
        config = make_config(RunConfig, _known_settings(run), settings)
    else:
        config = read_config(RunConfig, path, settings)
        run = Run(config.run.folder) if config.run.folder else _newest_unfinished(config.run.root)
    if not run.is_trained_here:
        raise RunError(
            f"{run.path} is trained by a loop of your own, which goes on with its own script",
            fix="score for it: steppe score CONFIG",
            key=str(run.path),
        )
    state = run.state()
    if state == RunState.RUNNING:
        raise RunError(f"{run.path} is running", fix=f"stop it first: steppe down {run.path}", key=str(run.path))
    if state == RunState.FINISHED or (run.path / "summary.json").exists():
        raise RunError(
            f"{run.path} is finished, its results are in summary.json", fix="start a new run", key=str(run.path)
        )
    _check_settings(config, run)
    return Resumable(run, config)


def check_fits(run: Run, config: RunConfig, dataset: Dataset) -> None:
    """Raises RunError when the data are others, or the scores would not be comparable."""
    run.check_dataset(dataset.fingerprint)
    attempts(run.path)  # raises for a damaged one
    if (found := run.description["scoring_id"]) != config.scoring.scoring_id:
        raise RunError(
            f"{run.path} holds scores with scoring_id {found}, these settings make {config.scoring.scoring_id}: the "
            "attack is another",
            fix="resume with the same, or start a new run",
            key="scoring.attack",
        )


def settings_to_replay(folder: str) -> dict[str, Any]:
    """Those of the run in `folder`, for a new one beside it. Raises RunError when they are not understood."""
    settings = _known_settings(Run(folder))
    place = {key: value for key, value in settings.get("run", {}).items() if key != "folder"}
    return settings | {"run": place, "scoring": settings.get("scoring", {}) | {"delay_versions": 0}}


def clear_leftovers(run: Run) -> int:
    """End what a killed driver left behind; returns how many processes that were."""
    runtime = run.runtime() or {}
    left = end_processes(run.path)
    remove_ray_folder(runtime.get("ray_folder"))
    return left


def _known_settings(run: Run) -> dict[str, Any]:
    """Those that the run was started with. Raises RunError when this steppe does not understand them."""
    settings: dict[str, Any] = run.description["config"]
    try:
        make_config(RunConfig, settings)
    except ConfigError as error:
        raise RunError(
            f"{run.path / 'run.json'} is of another version of steppe ({error.problem})",
            fix="resume with that version",
            key=str(run.path / "run.json"),
        ) from error
    return settings


def _newest_unfinished(root: str) -> Run:
    for run in reversed(all_runs(root)):
        if run.is_trained_here and run.state() != RunState.RUNNING and not (run.path / "summary.json").exists():
            return run
    raise RunError(
        f"no unfinished run in {Path(root).absolute()}",
        fix="name its folder: steppe run FOLDER --resume",
        key=str(Path(root).absolute()),
    )


def _check_settings(config: RunConfig, run: Run) -> None:
    now, then = (_flat(one.model_dump(mode="json")) for one in (config, make_config(RunConfig, _known_settings(run))))
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) != then.get(key) and not key.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{key} is {now.get(key)!r}, but {run.path} was started with {then.get(key)!r}",
                fix="resume with the same, or start a new run",
                key=key,
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
