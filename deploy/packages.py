"""Our five packages: are they those that Python finds, and how they get to the hosts of a cluster."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import ConfigError

if TYPE_CHECKING:
    from deploy.config import RunConfig

PACKAGES = ("deploy", "scorer", "services", "shared", "trainer")


def check_packages() -> Path:
    """The folder that holds all five packages. A user's folder may hold a `trainer.py` or a `shared/` of its own.

    Raises: ConfigError naming the stranger when one is not ours.
    """
    own = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = spec.origin if spec and spec.origin else f"a folder {name}/"
        if Path(found).resolve().parent != own / name:
            raise ConfigError(
                f"`import {name}` finds {found} instead of steppe's {own / name}",
                fix="start steppe from another folder, or rename yours",
                key=found,
            )
    return own


def stage(folder: Path, working_dir: str | Path | None = None) -> None:
    """Put into the empty `folder` what hosts of a cluster need: the packages, and the files of `working_dir`.

    Of a git checkout these are the files that .gitignore does not name, else all but hidden ones.

    Raises: ConfigError when `working_dir` is no folder, or holds what would hide one of our packages.
    """
    own = check_packages()
    if working_dir is not None:
        source = Path(working_dir).resolve()
        if not source.is_dir():
            raise ConfigError(
                f"--working-dir {working_dir} is not a folder",
                fix="name the one with your modules",
                key="--working-dir",
            )
        if source != own and (strangers := [name for name in _top_names(source) if name in PACKAGES]):
            raise ConfigError(
                f"--working-dir {working_dir} holds {' and '.join(strangers)}, which Python would find in place of "
                "steppe's",
                fix="rename yours, or send another folder",
                key="--working-dir",
            )
        _copy(source, folder)
    for name in PACKAGES:
        shutil.copytree(own / name, folder / name, ignore=_unneeded, dirs_exist_ok=True)


def code_folder(config: "RunConfig") -> Path | None:
    """The current folder, when modules of the user's own that `config` names lie in it; else they are installed."""
    paths = [part.name for part in (config.data, config.model) if part.is_own]
    paths += [path for path in (config.data.adapter, config.data.test) if path]
    here = Path.cwd()
    return here if any(path.partition(":")[0].partition(".")[0] in _top_names(here) for path in paths) else None


def _top_names(folder: Path) -> list[str]:
    """What can be imported from it."""
    return sorted({path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"})


def _copy(source: Path, target: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        capture_output=True,
        check=False,
        text=True,
    )
    if listed.returncode:
        shutil.copytree(source, target, ignore=_unneeded, dirs_exist_ok=True)
        return
    for name in filter(None, listed.stdout.split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def _unneeded(folder: str, names: list[str]) -> set[str]:
    """Hidden files, caches, runs, and the results that the README quotes."""
    is_ours = Path(folder).name == "deploy"
    return {
        name
        for name in names
        if name.startswith(".")
        or name == "__pycache__"
        or (Path(folder) / name / "run.json").exists()
        or (is_ours and name == "results")
    }
