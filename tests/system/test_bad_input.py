"""What a user's mistakes lead to: an error with its fields, an exit code, and nothing that is lost or left behind.

The entry point is called in this process, each time in a folder of its own; a few commands need a process.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import logging
import os
import select
import signal
import socket
import subprocess
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from deploy.cli import main
from deploy.config import RunConfig
from services.api import create_app
from services.client import Client
from services.config import ControllerConfig
from services.controller import Controller
from services.server import Server
from shared.attempts import begin
from shared.catalogue import Run, process_identity
from shared.config import DataConfig, read_config
from shared.datasets import load_dataset
from shared.errors import (
    ConfigError,
    ConfigErrors,
    DataError,
    DatasetMissing,
    RunError,
    ServiceError,
    SteppeError,
)
from shared.score_store import ScoreWriter
from tests.clusters import namespaces_are_allowed
from tests.raising import refuses
from tests.rows import make_rows
from tests.system.runs import QUICKSTART, STEPPE
from tests.waiting import LIMIT_S, wait_for

SAMPLES = 100
FASHION = "--set=rest.port=0 --set=data.name=fashion_mnist"


# -- what is there when a command begins -------------------------------------------------------------------------------


def make_run(folder: Path, name: str = "run", *, config: dict[str, object] | None = None, scored: int = 10) -> Run:
    """The folder of an interrupted run of the quickstart with SAMPLES samples, of which `scored` have a score."""
    settings = [f"data.subset={SAMPLES}", "rest.port=0"]
    made = read_config(RunConfig, QUICKSTART, settings)
    dataset = load_dataset(DataConfig(name="digits", subset=SAMPLES))
    run = Run.create(
        folder / "runs" / name,
        dataset_fingerprint=dataset.fingerprint,
        train=dataset.train,
        config=made.model_dump(mode="json") | (config or {}),
        scoring_id=made.scoring.scoring_id,
    )
    writer = ScoreWriter(run.scores_uri, SAMPLES, scoring_id=made.scoring.scoring_id)
    writer.append(make_rows(np.arange(scored)))
    writer.commit()
    writer.close()
    begin(run.path, fork_step=0, last_valid_version=0, first_version=1)
    return run


def files(folder: Path) -> dict[str, str]:
    """Everything below `folder`, by content; folders too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        for path in sorted(folder.rglob("*"))
    }


def write_idx(folder: Path, *, images: int = 70, labels: int = 70, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for part in ("train", "t10k"):
        pixels = rng.integers(0, 256, (images, 4, 4)).astype(np.uint8)
        head = bytes([0, 0, 8, 3]) + np.array(pixels.shape, dtype=">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = bytes([0, 0, 8, 1]) + np.array([labels], dtype=">u4").tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(i % 10 for i in range(labels)))


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Puts a file there."""

    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def idx(name: str | None = None, change: Callable[[bytes], bytes] = bytes, **shape: int) -> Callable[[Path], None]:
    """Puts Fashion-MNIST's four files into `images`, the one that is named changed."""

    def prepare(folder: Path) -> None:
        write_idx(folder / "images", **shape)
        if name:
            path = folder / "images" / name
            path.write_bytes(change(path.read_bytes()))

    return prepare


def a_folder(folder: Path) -> None:
    (folder / "folder").mkdir()


def interrupted(folder: Path) -> None:
    make_run(folder)


def finished(folder: Path) -> None:
    make_run(folder).write("summary.json", {"steps": 30, "test_accuracy": 0.5})


def killed(folder: Path) -> None:
    make_run(folder).write("runtime.json", {"role": "run", "pid": 2**22 + 1, "pid_started": 1.0})


def running(folder: Path) -> None:
    """This process, which is up, is said to run it."""
    make_run(folder).write("runtime.json", {"role": "run", **process_identity()})


def of_another_version(folder: Path) -> None:
    make_run(folder, config={"zeal": {"level": 3}})


def of_other_files(folder: Path) -> None:
    """An interrupted run of Fashion-MNIST files, and others beside them."""
    write_idx(folder / "images")
    write_idx(folder / "others", seed=1)
    config = read_config(RunConfig, QUICKSTART, ["data.name=fashion_mnist", f"data.root={folder}/images"])
    dataset = load_dataset(config.data)
    Run.create(
        folder / "runs" / "run",
        dataset_fingerprint=dataset.fingerprint,
        train=dataset.train,
        config=config.model_dump(mode="json"),
        scoring_id=config.scoring.scoring_id,
    )


def changed(name: str, content: str) -> Callable[[Path], None]:
    """An interrupted run with one of its files changed."""

    def prepare(folder: Path) -> None:
        (make_run(folder).path / name).write_text(content)

    return prepare


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A command and the error that it ends in: its type, its key, and what its problem and its fix name.

    {tmp} stands for the working folder, {config} for quickstart.toml; `extra` may come into being below the folder.
    """

    command: str
    kind: type[SteppeError]
    key: str
    value: str
    prepare: Callable[[Path], None] = lambda _: None
    fix: str = ""
    extra: tuple[str, ...] = ()


def setting(given: str, key: str, value: str, kind: type[SteppeError] = ConfigError, *, fix: str = "") -> Case:
    """`steppe run` with a setting that cannot be."""
    return Case(f"run {{config}} --set=rest.port=0 --set={given}", kind, key, value, fix=fix)


def of_run(command: str, value: str, prepare: Callable[[Path], None], fix: str = "") -> Case:
    """A command to a run whose state does not allow it."""
    return Case(command, RunError, "{tmp}/runs/run", value, prepare, fix)


CASES = {
    # keys
    "unknown key": setting("train.epoch=3", "train.epoch", "unknown", fix="train.epochs"),
    "unknown section": setting("trian.epochs=3", "trian", "unknown"),
    "value for a section": setting("train=3", "train", "3", fix="train."),
    "section for a value": setting("train.seed.x=1", "train.seed", "train.seed.x"),
    "below a value": Case(
        "run bad.toml --set=train.epochs=3", ConfigError, "train", "'train.epochs=3'", text("bad.toml", "train = 3")
    ),
    "set without =": setting("train.epochs", "--set", "'train.epochs'", fix="section.key=value"),
    "set without key": setting("=3", "--set", "'=3'"),
    # types
    "not a whole number": setting("train.epochs=many", "train.epochs", "'many'"),
    "a part": setting("train.epochs=1.5", "train.epochs", "1.5"),
    "not a number": setting("train.learning_rate=fast", "train.learning_rate", "'fast'"),
    "not a text": setting("data.root=[1]", "data.root", "[1]"),
    "not true or false": setting("run.tensorboard=3", "run.tensorboard", "3"),
    # ranges
    "at least": setting("train.epochs=0", "train.epochs", "0", fix="1 or more"),
    "at most": setting("rest.port=70000", "rest.port", "70000", fix="65535 or less"),
    "more than": setting("train.learning_rate=-1", "train.learning_rate", "-1", fix="more than 0"),
    "less than": setting("train.momentum=1", "train.momentum", "1", fix="less than 1"),
    "finite": setting("train.learning_rate=nan", "train.learning_rate", "nan", fix="finite"),
    "dry run": Case("run {config} --dry-run --set=train.epochs=0", ConfigError, "train.epochs", "0"),
    # names
    "curriculum": setting("train.curriculum.name=hard", "train.curriculum.name", "'hard'", fix="self_paced"),
    "mode": setting("scoring.mode=sync", "scoring.mode", "'sync'", fix="'every_epoch'"),
    "data": setting("data.name=mnist", "data.name", "'mnist'", fix="'mnist_5k'"),
    "width of resnet18": setting("model.name=resnet18", "model.width", "48", fix="leave it out"),
    # what does not fit the data or the machine
    "subset too large": setting("data.subset=1438", "data.subset", "1438", DataError),
    "batch of one": setting("train.batch_size=359", "train.batch_size", "359"),
    "batch beyond data": setting("train.batch_size=1438", "train.batch_size", "1438", fix="1437"),
    "device unknown": setting("train.device=banana", "train.device", "'banana'", fix="cpu"),
    "device without numbers": setting("train.device=meta", "train.device", "'meta'"),
    "address not ours": setting("rest.host=192.0.2.1", "rest.host", "192.0.2.1:0"),
    "host unknown": setting("rest.host=no.such.host.invalid", "rest.host", "no.such.host.invalid:0"),
    "host empty": setting("rest.host=", "rest.host", "empty", fix="127.0.0.1"),
    # files
    "no file": Case("run no.toml", ConfigError, "no.toml", "'no.toml'", fix="steppe config init"),
    "a folder": Case("run folder", ConfigError, "folder", "'folder'", a_folder),
    "below a file": Case("run file/x.toml", ConfigError, "file/x.toml", "Not a directory", text("file", "")),
    "not TOML": Case("run bad.toml", ConfigError, "bad.toml", "line 1", text("bad.toml", "[train\nepochs = 3")),
    "not UTF-8": Case("run bad.toml", ConfigError, "bad.toml", "0xe4", text("bad.toml", b'[data]\nroot = "\xe4"')),
    "no data": Case(
        f"run {{config}} {FASHION} --set=data.root=nowhere",
        DatasetMissing,
        "data.root",
        "nowhere",
        fix="data.download = true",
    ),
    "data root a file": Case(
        f"run {{config}} {FASHION} --set=data.root=file", DatasetMissing, "data.root", "file", text("file", "")
    ),
    "images cut off": Case(
        f"run {{config}} {FASHION} --set=data.root=images",
        DataError,
        "images/train-images-idx3-ubyte",
        "1119 bytes",
        idx("train-images-idx3-ubyte", lambda data: data[:-1]),
    ),
    "images with another head": Case(
        f"run {{config}} {FASHION} --set=data.root=images",
        DataError,
        "images/t10k-images-idx3-ubyte",
        "IDX",
        idx("t10k-images-idx3-ubyte", lambda _: b"<html>not found</html>"),
    ),
    "labels missing": Case(
        f"run {{config}} {FASHION} --set=data.root=images",
        DataError,
        "images/train-images-idx3-ubyte",
        "69 labels",
        idx(labels=69),
    ),
    "label beyond": Case(
        f"config validate {{config}} {FASHION} --set=data.root=images",
        DataError,
        "images/train-labels-idx1-ubyte",
        "77",
        idx("train-labels-idx1-ubyte", lambda data: data[:-1] + bytes([77])),
    ),
    # the run's folder
    "folder taken": Case(
        "run {config} --set=rest.port=0 --set=run.folder=runs/run", RunError, "{tmp}/runs/run", "already", interrupted
    ),
    "folder below a file": Case(
        "run {config} --set=rest.port=0 --set=run.folder=file/run",
        RunError,
        "{tmp}/file/run",
        "Not a directory",
        text("file", ""),
    ),
    "folder in /proc": setting("run.folder=/proc/run", "/proc/run", "No such file", RunError),
    "folder elsewhere": setting("run.folder=s3://bucket/run", "s3://bucket/run", "file://"),
    # resuming
    "resume nothing": Case(
        "run {config} --resume", RunError, "{tmp}/runs", "no unfinished run", fix="steppe run FOLDER --resume"
    ),
    "resume no run": Case("run folder --resume", RunError, "{tmp}/folder", "run.json", a_folder),
    "resume finished": of_run("run runs/run --resume", "finished", finished),
    "resume running": of_run("run runs/run --resume", "running", running, "steppe down {tmp}/runs/run"),
    "resume otherwise": Case(
        "run runs/run --resume --set=train.momentum=0.5 --set=train.learning_rate=0.2",
        ConfigError,
        "train.learning_rate",
        "0.2",
        interrupted,
    ),
    "resume with other files": Case(
        "run runs/run --resume --set=rest.port=0 --set=data.root=others",
        RunError,
        "{tmp}/runs/run",
        "data set",
        of_other_files,
    ),
    "resume of a torn run": Case(
        "run runs/run --resume",
        RunError,
        "{tmp}/runs/run/run.json",
        "line 1",
        changed("run.json", '{"run_id": ""'),
    ),
    "resume of no object": Case(
        "run runs/run --resume", RunError, "{tmp}/runs/run/run.json", "object", changed("run.json", "[1]")
    ),
    "resume with a damaged attempt": Case(
        "run runs/run --resume",
        RunError,
        "{tmp}/runs/run/train/attempt-0001.json",
        "line 1",
        changed("train/attempt-0001.json", '{"attempt": 1'),
    ),
    "resume of another version": Case(
        "run runs/run --resume", RunError, "{tmp}/runs/run/run.json", "zeal", of_another_version
    ),
    # asking
    **{
        f"no runs, {command.split()[0]}": Case(command, RunError, "{tmp}/runs", "no run", fix="steppe run CONFIG")
        for command in ("query 3", "status", "scale 1", "top", "serve", "down")
    },
    "no run, query": Case("query 3 --run=folder", RunError, "{tmp}/folder", "run.json", a_folder, "steppe runs"),
    "no run, down": Case("down folder", RunError, "{tmp}/folder", "run.json", a_folder),
    "no run, status of a file": Case("status file", RunError, "{tmp}/file", "run.json", text("file", "")),
    "finished, query": of_run("query 3", "finished", finished, "steppe serve {tmp}/runs/run"),
    "finished, scale": of_run("scale 1", "finished", finished),
    "interrupted, top": of_run("top", "interrupted", interrupted, "steppe run {tmp}/runs/run --resume"),
    "killed, status": of_run("status", "killed", killed, "steppe down {tmp}/runs/run"),
    "starting, status": of_run("status", "starting", running),
    "serve, host": Case(
        "serve --host=192.0.2.1 --port=0",
        ConfigError,
        "--host",
        "192.0.2.1:0",
        finished,
        fix="--host",
        extra=("runs/run/token",),
    ),
    # others
    "init over a file": Case("config init mine.toml", ConfigError, "mine.toml", "there", text("mine.toml", "")),
    "init elsewhere": Case("config init nowhere/x.toml", ConfigError, "nowhere/x.toml", "No such file"),
    "template": Case("config init x.toml --template=mnist", ConfigError, "--template", "'mnist'", fix="quickstart"),
    "show": Case("config show no.toml", ConfigError, "no.toml", "'no.toml'"),
    "bench": Case("bench speed", ConfigError, "name", "'speed'", fix="store-crash"),
}

USAGE = {  # a command line that is none: typer's error, and what it names
    "scale many": ("BadParameter", "replicas"),
    "serve --port=70000": ("BadParameter", "--port"),
    "query": ("MissingParameter", "ids"),
    "run": ("UsageError", "config"),
    "nonsense": ("UsageError", "nonsense"),
    "run {config} --fast": ("NoSuchOption", "--fast"),
}


# -- calling it --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a command ended in, and what it printed."""

    error: Any
    code: int
    out: str
    err: str


def call(command: str, folder: Path) -> Ended:
    """As `steppe` in a process of its own that begins in `folder`; it may not get as far as a cluster."""
    arguments = [_filled(part, folder) for part in command.split()]
    out, err = io.StringIO(), io.StringIO()
    with (
        _restored(),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        unittest.mock.patch("sys.argv", [STEPPE, *arguments]),
        unittest.mock.patch("ray.init", side_effect=AssertionError(f"{command!r} was accepted: it starts a cluster")),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = ended.value.code or 0
    assert isinstance(code, int)
    return Ended(ended.value.__context__ if code else None, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Afterwards this process is as it was, and has no more children."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log_handlers, level, threads = logging.root.handlers[:], logging.root.level, torch.get_num_threads()
    children = psutil.Process().children()
    with unittest.mock.patch.dict(os.environ):
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            logging.root.handlers[:] = log_handlers
            logging.root.setLevel(level)
            torch.set_num_threads(threads)
    assert psutil.Process().children() == children


def _filled(text: str, folder: Path) -> str:
    return text.replace("{tmp}", str(folder)).replace("{config}", str(QUICKSTART))


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_told(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.prepare(tmp_path)
    before = files(tmp_path)
    ended = call(case.command, tmp_path)
    after = {path: what for path, what in files(tmp_path).items() if path not in case.extra}

    assert isinstance(ended.error, SteppeError), ended
    assert (type(ended.error), ended.error.key) == (case.kind, _filled(case.key, tmp_path))
    assert case.value in ended.error.problem
    assert ended.error.fix
    assert _filled(case.fix, tmp_path) in ended.error.fix
    assert (ended.code, ended.out, ended.err) == (1, "", f"steppe: {ended.error}\n")
    assert after == before


@pytest.mark.parametrize("command", USAGE)
def test_wrong_usage_is_told(command: str, tmp_path: Path) -> None:
    ended = call(command, tmp_path)
    kind, named = USAGE[command]

    assert type(ended.error).__name__ == kind
    assert named in plain(ended.err)
    assert "--help" in ended.err
    assert (ended.code, ended.out, files(tmp_path)) == (2, "", {})


def test_all_bounds_are_told_at_once(tmp_path: Path) -> None:
    bad = {
        "train.epochs": "9999999999",
        "train.batch_size": "1",
        "train.learning_rate": "0",
        "train.seed": "-1",
        "train.seeds": "seeds",  # unknown
        "train.startup_wait_s": "inf",
        "train.sam.rho": "-1",
        "train.curriculum.strength": "-1",
        "train.curriculum.fade_until": "0",
        "data.subset": "1",
        "model.width": "0",
        "scoring.replicas": "5000",
        "scoring.attack.epsilon": "-0.1",
        "controller.block_size": "0",
    }
    ended = call(f"run {{config}} {' '.join(f'--set={key}={value}' for key, value in bad.items())}", tmp_path)

    assert isinstance(ended.error, ConfigErrors)
    assert {error.key: bad[error.key] in error.problem for error in ended.error.errors} == dict.fromkeys(bad, True)
    assert all(error.fix for error in ended.error.errors)
    assert (ended.code, ended.out, ended.err) == (1, "", f"steppe: {ended.error}\n")
    assert files(tmp_path) == {}


def plain(err: str) -> str:
    """Without the frame around a usage error."""
    return " ".join("".join(" " if letter in "╭╮╰╯─│" else letter for letter in err).split())


@pytest.mark.parametrize("prepare", [interrupted, finished, killed])
def test_down_of_a_run_that_is_not_up_takes_nothing_but_its_address(
    prepare: Callable[[Path], None], tmp_path: Path
) -> None:
    prepare(tmp_path)
    before = files(tmp_path)
    before.pop("runs/run/runtime.json", None)

    assert call("down", tmp_path) == Ended(None, 0, f"{tmp_path}/runs/run was not up\n", "")
    assert files(tmp_path) == before


def test_file_that_the_driver_cannot_write_is_named(tmp_path: Path) -> None:
    """As on a full disk."""
    token = make_run(tmp_path).path / "token"
    token.mkdir()
    ended = call("run runs/run --resume --set=rest.port=0", tmp_path)

    assert isinstance(ended.error, IsADirectoryError)
    assert ended.error.filename == str(token)
    assert (ended.code, ended.out, ended.err) == (1, "", f"steppe: {ended.error.strerror}: {token}\n")
    assert not (tmp_path / "runs/run/runtime.json").exists()


# -- asking a run that is up -------------------------------------------------------------------------------------------


@pytest.fixture
def steered(tmp_path: Path) -> Iterator[Controller]:
    """The controller of a run that is up: its processes are threads of this one."""
    run = make_run(tmp_path)
    controller = Controller(str(run.path), SAMPLES, run.description["scoring_id"], ControllerConfig(), wanted=1)
    server = Server(create_app(run, fleet=controller, token=run.create_token()), "127.0.0.1", 0)
    run.write("runtime.json", {"role": "run", "url": server.start(), **process_identity()})
    yield controller
    server.stop()
    controller.close()


@pytest.mark.parametrize("wanted", [-1, 5000])
def test_number_of_scorers_that_cannot_be_is_refused(wanted: int, steered: Controller, tmp_path: Path) -> None:
    ended = call(f"scale {wanted}", tmp_path)

    assert isinstance(ended.error, ConfigError)
    assert str(wanted) in ended.error.problem
    assert ended.error.fix
    assert (ended.code, ended.out, ended.err) == (1, "", f"steppe: {ended.error}\n")
    assert steered.status()["wanted"] == 1


# -- processes of their own --------------------------------------------------------------------------------------------


def start(arguments: Sequence[str], cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
    )


def end_of(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, stdout, stderr; nothing that it started is left."""
    out, err = process.communicate(timeout=LIMIT_S)

    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode, out, err


@contextlib.contextmanager
def serving(arguments: Sequence[str], cwd: Path) -> "Iterator[tuple[str, Callable[[], str]]]":
    """The address of a `steppe serve`, and what ends it, with SIGTERM, and returns its stderr."""
    process = start(arguments, cwd)

    def stop() -> str:
        process.send_signal(signal.SIGTERM)
        code, _, err = end_of(process)

        assert code == 130
        return err

    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], LIMIT_S)[0]
        yield process.stdout.readline().partition(" is served at ")[2].partition(",")[0], stop
    finally:
        process.kill()
        process.wait()


def test_taken_port_is_told_in_one_line_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        setting = f"rest.port={taken.getsockname()[1]}"
        command = f"run {{config}} --set={setting}"
        here = call(command, tmp_path)
        there = end_of(start([STEPPE, "run", str(QUICKSTART), f"--set={setting}"], tmp_path))

    assert (type(here.error), here.error.key) == (ConfigError, "rest.port")
    assert setting.partition("=")[2] in here.error.problem
    assert here.error.fix
    assert there == (1, "", f"steppe: {here.error}\n")
    assert files(tmp_path) == {}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that is not up and that `steppe serve` answers for."""
    folder = tmp_path_factory.mktemp("served")
    run = make_run(folder)
    with serving([STEPPE, "serve", str(run.path), "--port=0"], folder) as (url, stop):
        assert url.startswith("http://127.0.0.1:")
        yield run
        assert stop() == "steppe: stopping in order; once more stops at once\n"


@pytest.mark.parametrize(
    ("command", "kind", "value"),
    [
        ("query 100", DataError, "100"),
        ("query 5 -1", ConfigError, "ids.1"),
        ("query 3 7 1234", DataError, "1234"),
        ("query 3 --measure=admm", ConfigError, "'admm'"),
        ("scale 2", ServiceError, "without scorers"),
    ],
)
def test_question_to_a_served_run_is_refused(command: str, kind: type[SteppeError], value: str, served: Run) -> None:
    before = files(served.path)
    ended = call(command, served.path.parents[1])

    assert type(ended.error) is kind
    assert value in ended.error.problem
    assert ended.error.fix
    assert (ended.code, ended.out, ended.err) == (1, "", f"steppe: {ended.error}\n")
    assert files(served.path) == before


@pytest.mark.skipif(not namespaces_are_allowed(), reason="mount namespaces are not allowed here")
def test_a_run_that_cannot_be_written_is_served_for_reading(tmp_path: Path) -> None:
    """Such as one in an archive: there is no token, and none is needed."""
    run = make_run(tmp_path)
    store = run.scores_uri / "store.json"
    store.write_text("torn")
    before = files(run.path)
    read_only = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$0" serve "$1" --port=0'
    with serving(["unshare", "-m", "sh", "-c", read_only, STEPPE, str(run.path)], tmp_path) as (url, stop):
        with Client(url) as client:
            assert client.get("/v1")["num_samples"] == SAMPLES
            with refuses(ServiceError, value="token"):
                client.scale(1)
        err = stop()

    assert os.strerror(errno.EROFS) in err  # other commands cannot be told the address
    assert str(store) in err
    assert files(run.path) == before


def test_interrupt_before_anything_began_is_no_traceback(tmp_path: Path) -> None:
    """Ctrl-C while data are read: here from a pipe that nobody writes to."""
    write_idx(tmp_path / "images")
    pipe = tmp_path / "images/train-images-idx3-ubyte"
    pipe.unlink()
    os.mkfifo(pipe)
    process = start([STEPPE, "run", str(QUICKSTART), *FASHION.split(), "--set=data.root=images"], tmp_path)

    def opened() -> int | None:
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(OSError):  # nobody reads yet
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return None

    try:
        descriptor = wait_for(opened, "a reader of the pipe")
        process.send_signal(signal.SIGINT)
        assert end_of(process) == (130, "", "")
        os.close(descriptor)
    finally:
        process.kill()
        process.wait()

    assert not (tmp_path / "runs").exists()
