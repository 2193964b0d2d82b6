"""What a user's mistakes look like: the whole of stderr, the exit code, and that nothing is lost or left behind.

Commands are started as a user does, a few ahead of the tests that look at them, each in a folder of its own. What a
setting alone is refused for is asked of the command line in this process, which spares the imports.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import signal
import socket
import subprocess
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from deploy.cli import main
from deploy.config import RunConfig
from services.api import create_app
from services.client import Client
from services.config import ControllerConfig
from services.controller import Controller
from services.server import Server
from shared.attempts import begin
from shared.catalogue import Run, process_identity
from shared.config import DataConfig, _keys, read_config
from shared.datasets import load_dataset
from shared.errors import ServiceError
from shared.measures import MEASURES
from shared.score_store import ScoreWriter
from tests.clusters import namespaces_are_allowed
from tests.rows import make_rows
from tests.system.runs import QUICKSTART, STEPPE

AT_ONCE = 3
TIMEOUT_S = 60
SAMPLES = 100
FASHION = "--set=data.name=fashion_mnist"


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
    """A command and what it says; {tmp} stands for its working folder, {config} for quickstart.toml.

    `extra` is what may come into being below the folder; `here` says that it needs no process of its own.
    """

    command: str
    said: str
    prepare: Callable[[Path], None] = lambda _: None
    code: int = 1
    extra: tuple[str, ...] = ()
    here: bool = False


def setting(given: str, said: str) -> Case:
    """`steppe run` with a setting that is bad by itself."""
    return Case(f"run {{config}} --set=rest.port=0 --set={given}", said, here=True)


def misfit(given: str, said: str) -> Case:
    """`steppe run` with a setting that does not fit the data or the machine."""
    return dataclasses.replace(setting(given, said), here=False)


def usage(command: str, said: str) -> Case:
    return Case(command, said, code=2)


def each(of: str, said: str, prepare: Callable[[Path], None] | None, *commands: str) -> dict[str, Case]:
    """The same answer to several commands."""
    return {f"{one.split()[0]}, {of}": Case(one, said, prepare or (lambda _: None)) for one in commands}


NO_RUN = "no run in {tmp}/runs; name a run folder, or start one with `steppe run CONFIG`"
NO_FOLDER = "{tmp}/folder is not a run folder: it has no run.json; to see the runs: steppe runs"
NOT_UP = "run {tmp}/runs/run is not up: "
TO_SERVE = "to ask for its scores: steppe serve {tmp}/runs/run"
IS_FINISHED = f"{NOT_UP}it is finished, its results are in its summary.json; {TO_SERVE}"
IS_INTERRUPTED = f"{NOT_UP}it was interrupted; to go on: steppe run {{tmp}}/runs/run --resume; {TO_SERVE}"
IS_KILLED = (
    f"{NOT_UP}it was killed; to go on: steppe run {{tmp}}/runs/run --resume; "
    "to end what it left: steppe down {tmp}/runs/run"
)
ON_THIS_MACHINE = "set rest.host to an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
TO_GET_FASHION_MNIST = (
    "Either install Debian's package dataset-fashion-mnist, or set data.root to a folder with the four IDX files "
    "(plain or .gz), or set data.download = true to let torchvision fetch it"
)
WRITABLE = "set run.folder, or run.root, to a folder that you may write to"

CASES = {
    # keys
    "unknown key": setting("train.epoch=3", "train.epoch: unknown setting; did you mean train.epochs?"),
    "unknown section": setting("trian.epochs=3", "trian: unknown setting; did you mean train?"),
    "value for a section": setting(
        "train=3", "train = 3: train is a section, not a value; set what is in it, such as train.epochs"
    ),
    "section for a value": setting(
        "train.seed.x=1", "train.seed is a value, not a section; train.seed.x cannot be set"
    ),
    "below a value": Case(
        "run bad.toml --set=train.epochs=3",
        "--set 'train.epochs=3': 'train' is a value, not a section",
        text("bad.toml", "train = 3"),
    ),
    "set without =": setting("train.epochs", "--set 'train.epochs': write it as section.key=value"),
    "set without key": setting("=3", "--set '=3': write it as section.key=value"),
    # types
    "not a whole number": setting("train.epochs=many", "train.epochs = 'many': must be a whole number"),
    "a part": setting("train.epochs=1.5", "train.epochs = 1.5: must be a whole number"),
    "not a number": setting("train.learning_rate=fast", "train.learning_rate = 'fast': must be a number"),
    "not a text": setting("data.root=[1]", "data.root = [1]: must be a text"),
    "not true or false": setting("run.tensorboard=3", "run.tensorboard = 3: must be true or false"),
    # ranges
    "epochs 0": setting("train.epochs=0", "train.epochs = 0: must be at least 1"),
    "epochs huge": setting("train.epochs=9999999999", "train.epochs = 9999999999: must be at most 1000000"),
    "batch_size 1": setting("train.batch_size=1", "train.batch_size = 1: must be at least 2"),
    "learning_rate 0": setting("train.learning_rate=0", "train.learning_rate = 0: must be more than 0"),
    "learning_rate nan": setting("train.learning_rate=nan", "train.learning_rate = nan: must be a finite number"),
    "learning_rate -1": setting("train.learning_rate=-1", "train.learning_rate = -1: must be more than 0"),
    "momentum 1": setting("train.momentum=1", "train.momentum = 1: must be less than 1"),
    "seed -1": setting("train.seed=-1", "train.seed = -1: must be at least 0"),
    "wait inf": setting("train.startup_wait_s=inf", "train.startup_wait_s = inf: must be a finite number"),
    "rho -1": setting("train.sam.rho=-1", "train.sam.rho = -1: must be at least 0"),
    "epsilon -0.1": setting("scoring.attack.epsilon=-0.1", "scoring.attack.epsilon = -0.1: must be at least 0"),
    "block_size 0": setting("controller.block_size=0", "controller.block_size = 0: must be at least 1"),
    "replicas -1": setting("scoring.replicas=-1", "scoring.replicas = -1: must be at least 0"),
    "replicas 5000": setting("scoring.replicas=5000", "scoring.replicas = 5000: must be at most 1024"),
    "port 70000": setting("rest.port=70000", "rest.port = 70000: must be at most 65535"),
    "subset 1": setting("data.subset=1", "data.subset = 1: must be at least 2"),
    "subset too large": misfit(
        "data.subset=1438",
        "data.subset is 1438; digits has 1437 training images: set it to that or less, or leave it out",
    ),
    "width 0": setting("model.width=0", "model.width = 0: must be at least 1"),
    "strength -1": setting("train.curriculum.strength=-1", "train.curriculum.strength = -1: must be at least 0"),
    "fade_until 0": setting("train.curriculum.fade_until=0", "train.curriculum.fade_until = 0: must be more than 0"),
    # names
    "curriculum": setting(
        "train.curriculum.name=hard",
        "train.curriculum.name: no curriculum 'hard'; known: uniform, soft, pacing, self_paced",
    ),
    "mode": setting("scoring.mode=sync", "scoring.mode = 'sync': must be 'async', 'every_epoch', 'shadow' or 'off'"),
    "attack": setting("scoring.attack.name=cw", "scoring.attack.name = 'cw': must be 'fgsm' or 'pgd'"),
    "data": setting(
        "data.name=mnist",
        "data.name = 'mnist': must be 'digits', 'fashion_mnist', 'mnist_5k', 'cifar10', 'cifar100' or 'image_folder', "
        "or your own as 'module:function'",
    ),
    "model": setting(
        "model.name=vgg",
        "model.name = 'vgg': must be 'small_cnn', 'tiny_cnn' or 'resnet18', or your own as 'module:function'",
    ),
    "width of resnet18": setting(
        "model.name=resnet18", "model.width is 48, but resnet18 always has 64; set that, or leave it out"
    ),
    "two at once": Case(
        "run {config} --set=train.epochs=0 --set=train.seeds=1",
        "train.epochs = 0: must be at least 1\ntrain.seeds: unknown setting; did you mean train.seed?",
    ),
    "dry run": Case("run {config} --dry-run --set=train.epochs=0", "train.epochs = 0: must be at least 1"),
    # what does not fit the data or the machine
    "batch of one": misfit(
        "train.batch_size=359",
        "train.batch_size 359 leaves one of 1437 samples for the last batch, where BatchNorm has no variance; "
        "choose another",
    ),
    "batch beyond data": misfit(
        "train.batch_size=1438", "train.batch_size is 1438, but there are 1437 samples; set it to 1437 or less"
    ),
    "device unknown": misfit(
        "train.device=banana", "train.device is 'banana', which torch does not know; use auto, cpu or cuda:0"
    ),
    "device without numbers": misfit(
        "train.device=meta",
        "train.device is 'meta': Tensor.item() cannot be called on meta tensors; use auto, cpu or cuda:0",
    ),
    "address not ours": misfit(
        "rest.host=192.0.2.1",
        f"cannot listen on 192.0.2.1:0: this machine does not have that address; {ON_THIS_MACHINE}",
    ),
    "host unknown": misfit(
        "rest.host=no.such.host.invalid",
        f"cannot listen on no.such.host.invalid:0: the name is not known; {ON_THIS_MACHINE}",
    ),
    "host empty": misfit(
        "rest.host=", "the REST service's host is empty; set rest.host, such as to 127.0.0.1, or 0.0.0.0 for all"
    ),
    # files
    "no file": Case("run no.toml", "no configuration file 'no.toml'; to make one: steppe config init"),
    "a folder": Case("run folder", "'folder' is a folder; name the configuration file in it", a_folder),
    "below a file": Case("run file/x.toml", "cannot read 'file/x.toml': Not a directory", text("file", "")),
    "not TOML": Case(
        "run bad.toml",
        "bad.toml is not TOML: Expected ']' at the end of a table declaration (at line 1, column 7)",
        text("bad.toml", "[train\nepochs = 3"),
    ),
    "not UTF-8": Case(
        "run bad.toml",
        "bad.toml is not UTF-8 (byte 0xe4 at position 15); save it as UTF-8",
        text("bad.toml", b'[data]\nroot = "\xe4"'),
    ),
    "no data": Case(
        f"run {{config}} --set=rest.port=0 {FASHION} --set=data.root=nowhere",
        "Fashion-MNIST is not at nowhere: nowhere/train-images-idx3-ubyte.gz is missing. " + TO_GET_FASHION_MNIST,
    ),
    "data root a file": Case(
        f"run {{config}} --set=rest.port=0 {FASHION} --set=data.root=file",
        "Fashion-MNIST is not at file: file/train-images-idx3-ubyte.gz is missing. " + TO_GET_FASHION_MNIST,
        text("file", ""),
    ),
    "images cut off": Case(
        f"run {{config}} --set=rest.port=0 {FASHION} --set=data.root=images",
        "images/train-images-idx3-ubyte has 1119 bytes of values, its header says 1120; fetch it again",
        idx("train-images-idx3-ubyte", lambda data: data[:-1]),
    ),
    "images with another head": Case(
        f"run {{config}} --set=rest.port=0 {FASHION} --set=data.root=images",
        "images/t10k-images-idx3-ubyte is not an IDX file of bytes with 3 dimensions; fetch it again",
        idx("t10k-images-idx3-ubyte", lambda _: b"<html>not found</html>"),
    ),
    "labels missing": Case(
        f"run {{config}} --set=rest.port=0 {FASHION} --set=data.root=images",
        "images/train-images-idx3-ubyte has 70 images, images/train-labels-idx1-ubyte 69 labels; fetch both again",
        idx(labels=69),
    ),
    "label beyond": Case(
        f"config validate {{config}} {FASHION} --set=data.root=images",
        "{config} is not valid\n"
        "images/train-labels-idx1-ubyte has the label 77; Fashion-MNIST has 0..9; fetch it again",
        idx("train-labels-idx1-ubyte", lambda data: data[:-1] + bytes([77])),
    ),
    # the run's folder
    "folder taken": Case(
        "run {config} --set=rest.port=0 --set=run.folder=runs/run",
        "{tmp}/runs/run already holds a run; choose another folder with --set run.folder=...",
        interrupted,
    ),
    "folder below a file": Case(
        "run {config} --set=rest.port=0 --set=run.folder=file/run",
        f"cannot write the run folder {{tmp}}/file/run: Not a directory; {WRITABLE}",
        text("file", ""),
    ),
    "folder in /proc": Case(
        "run {config} --set=rest.port=0 --set=run.folder=/proc/run",
        f"cannot write the run folder /proc/run: No such file or directory; {WRITABLE}",
    ),
    "folder elsewhere": Case(
        "run {config} --set=rest.port=0 --set=run.folder=s3://bucket/run",
        "'s3://bucket/run': only local paths and file:// URIs can be used; choose a folder on a disk",
    ),
    # resuming
    "resume nothing": Case(
        "run {config} --resume", "no unfinished run in {tmp}/runs; name its folder: steppe run FOLDER --resume"
    ),
    "resume no run": Case("run folder --resume", NO_FOLDER, a_folder),
    "resume finished": Case(
        "run runs/run --resume",
        "{tmp}/runs/run is finished, its results are in summary.json; start a new run",
        finished,
    ),
    "resume running": Case(
        "run runs/run --resume", "{tmp}/runs/run is running; stop it first: steppe down {tmp}/runs/run", running
    ),
    "resume otherwise": Case(
        "run runs/run --resume --set=train.momentum=0.5 --set=train.learning_rate=0.2",
        "train.learning_rate is 0.2, but {tmp}/runs/run was started with 0.1; resume with the same, or start a new run",
        interrupted,
    ),
    "resume with another attack": Case(
        "run runs/run --resume --set=scoring.attack.name=pgd",
        "scoring.attack.name is 'pgd', but {tmp}/runs/run was started with 'fgsm'; resume with the same, or start a "
        "new run",
        interrupted,
    ),
    "resume with other files": Case(
        "run runs/run --resume --set=rest.port=0 --set=data.root=others",
        "run {tmp}/runs/run was made for the data set {fingerprint}, here is {fingerprint}; bring the same files, or "
        "start a new run",
        of_other_files,
    ),
    "resume of a torn run": Case(
        "run runs/run --resume",
        "{tmp}/runs/run/run.json is not whole: Expecting ',' delimiter: line 1 column 14 (char 13); bring it back from "
        "a copy, or start a new run",
        changed("run.json", '{"run_id": ""'),
    ),
    "resume of no object": Case(
        "run runs/run --resume",
        "{tmp}/runs/run/run.json is not of a run: it holds no JSON object",
        changed("run.json", "[1]"),
    ),
    "resume with a damaged attempt": Case(
        "run runs/run --resume",
        "{tmp}/runs/run/train/attempt-0001.json is damaged: Expecting ',' delimiter: line 1 column 14 (char 13); "
        "restore it, or start a new run",
        changed("train/attempt-0001.json", '{"attempt": 1'),
    ),
    "resume of another version": Case(
        "run runs/run --resume",
        "{tmp}/runs/run/run.json is of another version of steppe; resume with that version:\n"
        "zeal: unknown setting; known: {known}",
        of_another_version,
    ),
    # asking
    **each("no runs", NO_RUN, None, "query 3", "status", "scale 1", "top", "serve", "down"),
    **each("no run", NO_FOLDER, a_folder, "query 3 --run=folder", "status folder", "scale 1 folder"),
    **each("no run", NO_FOLDER, a_folder, "top folder", "serve folder", "down folder"),
    **each("finished", IS_FINISHED, finished, "query 3", "status", "scale 1", "top"),
    **each("interrupted", IS_INTERRUPTED, interrupted, "status", "top"),
    **each("killed", IS_KILLED, killed, "query 3", "status"),
    "status, starting": Case(
        "status", "run {tmp}/runs/run is starting and does not answer yet; try again in a few seconds", running
    ),
    "status of a file": Case(
        "status file",
        "{tmp}/file is not a run folder: it has no run.json; to see the runs: steppe runs",
        text("file", ""),
    ),
    "serve, host": Case(
        "serve --host=192.0.2.1 --port=0",
        "cannot listen on 192.0.2.1:0: this machine does not have that address; "
        + ON_THIS_MACHINE.replace("rest.", "--"),
        finished,
        extra=("runs/run/token", "runs/run/logs", "runs/run/logs/serve.log"),
    ),
    # others
    "init over a file": Case(
        "config init mine.toml",
        "mine.toml is there already; name another file, or remove it first",
        text("mine.toml", ""),
    ),
    "init elsewhere": Case(
        "config init nowhere/x.toml",
        "cannot write nowhere/x.toml: No such file or directory; name a file in a folder that you may write to",
    ),
    "template": Case("config init x.toml --template=mnist", "no template 'mnist'; known: fashion_mnist, quickstart"),
    "show": Case("config show no.toml", "no configuration file 'no.toml'; to make one: steppe config init"),
    "bench": Case(
        "bench speed",
        "no benchmark 'speed'; known: recovery, flat, store, store-crash, store-load, rest, scorers, controller, "
        "ranks, sampler",
    ),
    # usage
    "scale many": usage(
        "scale many",
        "Invalid value for 'replicas': Input should be a valid integer, unable to parse string as an integer",
    ),
    "query without ids": usage("query", "Missing argument 'ids'."),
    "run without a file": usage("run", "Missing argument 'config'."),
    "unknown command": usage("nonsense", "No such command 'nonsense'."),
    "unknown option": usage("run {config} --fast", "No such option: --fast (Possible options: --set)"),
    "port of serve": usage(
        "serve --port=70000", "Invalid value for '--port': Input should be less than or equal to 65535"
    ),
}


# -- running it --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did, and what was in its folder before and after."""

    code: int
    out: str
    err: str
    before: dict[str, str]
    after: dict[str, str]


def start(arguments: Sequence[str], cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [STEPPE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
    )


def steppe(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    return end_of(start(arguments, cwd))


def end_of(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """As `steppe`, of one that was started; nothing that it started is left."""
    out, err = process.communicate(timeout=TIMEOUT_S)

    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode, out, err


def steppe_here(arguments: Sequence[str], cwd: Path) -> tuple[int, str, str]:
    """As `steppe`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        unittest.mock.patch("sys.argv", [STEPPE, *arguments]),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


def fill(said: str, folder: Path) -> str:
    values = {"tmp": str(folder), "config": str(QUICKSTART), "known": ", ".join(_keys(RunConfig))}
    for name, value in values.items():
        said = said.replace(f"{{{name}}}", value)
    return said


class Commands:
    """The commands of the cases `names`, AT_ONCE of them going on ahead of those that are asked for."""

    def __init__(self, place: Path, names: Sequence[str]) -> None:
        self._place = place
        self._names = names
        self._waiting = [name for name in names if not CASES[name].here]
        self._going: dict[str, tuple[subprocess.Popen[str], dict[str, str]]] = {}

    def folder(self, name: str) -> Path:
        return self._place / str(self._names.index(name))

    def outcome(self, name: str) -> Outcome:
        if CASES[name].here:
            arguments, before = self._prepare(name)
            return Outcome(*steppe_here(arguments, self.folder(name)), before, files(self.folder(name)))
        while name not in self._going:
            self._start_next()
        process, before = self._going.pop(name)
        ended = end_of(process)
        while self._waiting and len(self._going) < AT_ONCE:
            self._start_next()
        return Outcome(*ended, before, files(self.folder(name)))

    def close(self) -> None:
        """End what was started and not asked for."""
        for process, _ in self._going.values():
            process.kill()
            process.communicate()

    def _start_next(self) -> None:
        name = self._waiting.pop(0)
        arguments, before = self._prepare(name)
        self._going[name] = start(arguments, self.folder(name)), before

    def _prepare(self, name: str) -> tuple[list[str], dict[str, str]]:
        folder = self.folder(name)
        folder.mkdir()
        CASES[name].prepare(folder)
        return fill(CASES[name].command, folder).split(), files(folder)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Commands]:
    selected = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_mistake_is_told"
    ]
    commands = Commands(tmp_path_factory.mktemp("bad"), selected)
    yield commands
    commands.close()


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_told(name: str, commands: Commands) -> None:
    case, outcome = CASES[name], commands.outcome(name)

    assert "Traceback" not in outcome.err
    if case.code == 2:
        assert plain(outcome.err).endswith(f" --help' for help. Error {case.said}")
    else:
        err = re.sub(r"\b[0-9a-f]{32}\b", "{fingerprint}", outcome.err)

        assert err == fill(f"steppe: {case.said}\n", commands.folder(name))
    assert (outcome.code, outcome.out) == (case.code, "")
    assert {path: what for path, what in outcome.after.items() if path not in case.extra} == outcome.before


def plain(err: str) -> str:
    """A usage error without the frame around it."""
    return " ".join(re.sub("[╭╮╰╯─│]", " ", err).split())


# -- what needs more than a folder -------------------------------------------------------------------------------------


def refused(*arguments: str, cwd: Path) -> str:
    """What a command says that is refused and prints nothing."""
    code, out, err = steppe(*arguments, cwd=cwd)

    assert (code, out) == (1, "")
    assert "Traceback" not in err
    return err


def test_taken_port_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("run", str(QUICKSTART), f"--set=rest.port={port}", cwd=tmp_path)

    assert said == (
        f"steppe: cannot listen on 127.0.0.1:{port}: the port is taken; "
        "set rest.port to a free one, or to 0 to take any\n"
    )
    assert files(tmp_path) == {}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that is not up and that `steppe serve` answers for."""
    folder = tmp_path_factory.mktemp("served")
    run = make_run(folder)
    with subprocess.Popen(
        [STEPPE, "serve", str(run.path), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"{run.path} is served at http://127.0.0.1:")
        yield run
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=TIMEOUT_S)[1]

        assert (process.returncode, err) == (130, "steppe: stopping in order; once more stops at once\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("query 100", "sample_id 100 is outside 0..99"),
        ("query 5 -1", "body.ids.1: Input should be greater than or equal to 0"),
        ("query 3 7 1234", "sample_id 1234 is outside 0..99"),
        ("query 3 --measure=admm", f"no measure 'admm'; known: {', '.join(MEASURES)}"),
        ("scale 2", "this service runs without scorers: the run is not up, or it is scored inside its training"),
    ],
    ids=lambda value: value if value.startswith(("query", "scale")) else "",
)
def test_question_to_a_served_run_is_refused(command: str, said: str, served: Run) -> None:
    before = files(served.path)

    assert refused(*command.split(), cwd=served.path.parents[1]) == f"steppe: {said}\n"
    assert files(served.path) == before


@pytest.mark.skipif(not namespaces_are_allowed(), reason="mount namespaces are not allowed here")
def test_a_run_that_cannot_be_written_is_served_for_reading(tmp_path: Path) -> None:
    """Such as one in an archive: there is no token, and none is needed."""
    run = make_run(tmp_path)
    (run.scores_uri / "store.json").write_text("torn")
    before = files(run.path)
    read_only = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$0" serve "$1" --port=0'
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", read_only, STEPPE, str(run.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().partition(" is served at ")[2].partition(",")[0]
            with Client(url) as client:
                assert client.get("/v1")["num_samples"] == SAMPLES
                with pytest.raises(ServiceError, match="send the run's token"):
                    client.scale(1)
            process.send_signal(signal.SIGTERM)
            err = process.communicate(timeout=TIMEOUT_S)[1]
        finally:
            process.kill()

    assert process.returncode == 130
    assert "other steppe commands will not find this service: " in err
    assert f"no scores can be asked for now: {run.scores_uri / 'store.json'} " in err
    assert files(run.path) == before


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


def test_number_of_scorers_that_cannot_be_is_refused(steered: Controller, tmp_path: Path) -> None:
    for wanted in (-1, 5000):
        assert refused("scale", str(wanted), cwd=tmp_path) == f"steppe: replicas is {wanted}; it must lie in 0..1024\n"
        assert steered.status()["wanted"] == 1


@pytest.mark.parametrize("prepare", [interrupted, finished, killed])
def test_down_of_a_run_that_is_not_up_takes_nothing_but_its_address(
    prepare: Callable[[Path], None], tmp_path: Path
) -> None:
    prepare(tmp_path)
    before = files(tmp_path)
    before.pop("runs/run/runtime.json", None)

    assert steppe("down", cwd=tmp_path) == (0, f"{tmp_path}/runs/run was not up\n", "")
    assert files(tmp_path) == before


def test_interrupt_before_anything_began_is_no_traceback(tmp_path: Path) -> None:
    """Ctrl-C while data are read: here from a pipe that nobody writes to."""
    write_idx(tmp_path / "images")
    pipe = tmp_path / "images/train-images-idx3-ubyte"
    pipe.unlink()
    os.mkfifo(pipe)
    arguments = ("run", str(QUICKSTART), "--set=rest.port=0", FASHION, "--set=data.root=images")
    process = start(arguments, tmp_path)
    with open(pipe, "wb"):  # returns once it is read
        process.send_signal(signal.SIGINT)
        ended = end_of(process)

    assert ended == (130, "", "")
    assert not (tmp_path / "runs").exists()


def test_file_that_the_driver_cannot_write_is_named(tmp_path: Path) -> None:
    """As on a full disk."""
    make_run(tmp_path)
    (tmp_path / "runs/run/token").mkdir()
    said = refused("run", "runs/run", "--resume", "--set=rest.port=0", cwd=tmp_path)

    assert said == f"steppe: Is a directory: {tmp_path}/runs/run/token\n"
    assert not (tmp_path / "runs/run/runtime.json").exists()
