"""Runs as jobs of real Ray clusters, which the tests start with `ray start` and end again."""

import json
import os
import pty
import secrets
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pytest

from deploy.packages import stage
from shared.attempts import attempts
from shared.events import read_events
from tests.clusters import BIN, Cluster, cluster, namespaces_are_allowed
from tests.system.runs import EXAMPLES, QUICKSTART, STEPPE, wait_until_scored
from tests.waiting import LIMIT_S, wait_for

pytestmark = pytest.mark.slow

T = TypeVar("T")
SHORT = ("train.epochs=2", "rest.port=0")
# Enough to be paused on its way.
ENOUGH = ("train.epochs=20", "model.width=16", "train.startup_wait_s=200", "scoring.nice=0", "rest.port=0")
LONG = ("train.epochs=100000", "scoring.nice=0", "rest.port=0")


@pytest.fixture(scope="module")
def without_token() -> Iterator[Cluster]:
    with cluster() as started:
        yield started


def while_up(job: "subprocess.Popen[str]", condition: Callable[[], T]) -> Callable[[], T]:
    """The condition, for as long as the job is being followed."""

    def look() -> T:
        assert job.poll() is None, job.communicate()
        return condition()

    return look


def scored(job: "subprocess.Popen[str]", root: Path) -> Path:
    """The folder of the job's run, once there are scores of all samples."""
    folder = wait_for(while_up(job, lambda: next(root.glob("*/runtime.json"), None)), "the run").parent
    wait_until_scored(folder, job)
    return folder


def sets(*settings: str) -> list[str]:
    return [f"--set={setting}" for setting in settings]


def test_the_readme_says_both_ways() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()

    assert "steppe submit CONFIG --address http://HEAD:8265" in readme
    assert "--working-dir . -- python -m deploy run CONFIG --address auto" in readme


@pytest.mark.parametrize("token", ["", secrets.token_hex(32)], ids=["without token", "with token"])
def test_a_job_is_followed_to_its_end_both_ways(tmp_path: Path, token: str, request: pytest.FixtureRequest) -> None:
    with cluster(token) if token else nullcontext(request.getfixturevalue("without_token")) as there:
        job = there.submit(*sets(*ENOUGH, f"run.root={tmp_path / 'a'}"))
        folder = scored(job, tmp_path / "a")
        out, err = job.communicate(timeout=4 * LIMIT_S)

        assert job.returncode == 0, err
        assert json.loads(out)["status"] == "SUCCEEDED"
        assert "test accuracy" in err
        assert json.loads((folder / "summary.json").read_bytes())["coverage"] == 1.0
        wait_for(lambda: not there.actors(), what="nothing of the run left")

        stage(tmp_path / "checkout", None)
        options = ["--address", there.url, "--working-dir", str(tmp_path / "checkout")]
        command = ["python", "-m", "deploy", "run", "deploy/configs/quickstart.toml", "--address", "auto"]
        settings = sets(*ENOUGH, f"run.root={tmp_path / 'b'}")
        plain = subprocess.Popen(
            [BIN / "ray", "job", "submit", *options, "--", *command, *settings],
            env=there.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        folder = scored(plain, tmp_path / "b")
        out, _ = plain.communicate(timeout=4 * LIMIT_S)
        assert plain.returncode == 0, out
        assert json.loads((folder / "summary.json").read_bytes())["coverage"] == 1.0
        wait_for(lambda: not there.actors(), what="nothing of the run left")

        if token:
            refused = there.submit(*sets(*SHORT, f"run.root={tmp_path / 'c'}"), token="0" * 64)
            assert refused.wait(LIMIT_S) == 1
            assert "does not accept our token" in refused.communicate()[1]
            assert not (tmp_path / "c").exists()


def test_own_model_and_data_go_along_with_the_job(without_token: Cluster, tmp_path: Path) -> None:
    """The folder that the modules lie in is sent; runs that lie there too are not. So by `run --address` as well."""
    home = tmp_path / "home"
    shutil.copytree(EXAMPLES, home)
    (home / "runs" / "old").mkdir(parents=True)
    for name in ("run.json", "huge"):
        (home / "runs" / "old" / name).write_text("{}")
    settings = sets(
        "rest.port=0", "scoring.nice=0", "train.startup_wait_s=200", "data.validation=300", "train.epochs=8"
    )
    for command, folder in (("submit", tmp_path / "a"), ("run", tmp_path / "b")):
        address = without_token.url if command == "submit" else without_token.address
        options = ["--address", address, "--json", *settings, f"--set=run.folder={folder}"]
        job = without_token.steppe(command, "own_loop.toml", *options, cwd=home)
        _, err = job.communicate(timeout=4 * LIMIT_S)
        assert job.returncode == 0, err
        summary = json.loads((folder / "summary.json").read_bytes())
        assert summary["scored_rows"] > 0
        assert summary["test_accuracy"] > 0.3
    wait_for(lambda: not without_token.actors(), what="nothing of the run left")


def test_a_failing_job_ends_with_its_exit_code(without_token: Cluster, tmp_path: Path) -> None:
    settings = sets(*SHORT, f"run.root={tmp_path}", "data.name=image_folder", f"data.root={tmp_path / 'none'}")
    job = without_token.submit(*settings)
    out, err = job.communicate(timeout=LIMIT_S)

    assert (job.returncode, json.loads(out)["status"]) == (1, "FAILED")
    assert f"{tmp_path / 'none'}" in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (sets("train.epochs=many"), "train.epochs"),
        (sets("run.root=runs"), "run.root"),
        (["--working-dir", "/nowhere"], "--working-dir"),
    ],
    ids=["a typo", "a folder of the job's own", "no working dir"],
)
def test_what_cannot_work_is_said_before_anything_is_sent(
    without_token: Cluster, tmp_path: Path, options: list[str], expected: str
) -> None:
    job = without_token.submit(*sets(f"run.root={tmp_path / 'runs'}"), *options)
    _, err = job.communicate(timeout=LIMIT_S)

    assert job.returncode == 1
    assert expected in err
    assert "submitted" not in err
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_stops_the_job_in_order_and_it_can_be_resumed(without_token: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = without_token.submit(*sets(*LONG, f"run.folder={folder}"))
    saved = lambda: any(event["event"] == "state_saved" for event in read_events(folder))  # noqa: E731
    wait_for(while_up(job, saved), "a saved state")
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=LIMIT_S)

    assert (job.returncode, json.loads(out)["status"]) == (130, "STOPPED"), err
    assert list(read_events(folder))[-1]["event"] == "interrupted"
    wait_for(lambda: not without_token.actors(), what="nothing of the run left")
    job_id = left_running(without_token, *sets(*LONG, f"run.folder={folder}"), "--resume")
    command = [BIN / "ray", "job", "stop", "--address", without_token.url, job_id]
    subprocess.run(command, env=without_token.environment(), capture_output=True, check=True, timeout=LIMIT_S)
    wait_for(lambda: not without_token.actors(), what="nothing of the run left")
    happened = [event["event"] for event in read_events(folder)]
    assert (happened.count("resumed"), happened.count("interrupted")) == (1, 2)


def left_running(there: Cluster, *options: str) -> str:
    """Submitted on a terminal, Ctrl-C once it trains, and then n: the job's id."""
    pid, terminal = pty.fork()
    if pid == 0:
        command = [STEPPE, "submit", str(QUICKSTART), "--address", there.url, *options]
        os.execve(STEPPE, command, there.environment())  # noqa: S606
    seen = ""

    def reads(text: str) -> bool:
        nonlocal seen
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
        return text in seen

    wait_for(lambda: reads("accuracy"), "the job's progress")
    os.write(terminal, b"\x03")
    wait_for(lambda: reads("stop the job too? [Y/n]"), what="the question")
    os.write(terminal, b"n\n")
    wait_for(lambda: reads("left running: ray job logs --follow"), what="the answer")
    wait_for(lambda: reads("running\r\n"), what="the last line")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    return seen.partition("submitted ")[2].partition(" ")[0]


@pytest.mark.skipif(not namespaces_are_allowed(), reason="mount namespaces are not allowed here")
def test_a_run_folder_that_a_host_cannot_reach_is_refused(tmp_path: Path) -> None:
    """The other host has a mount of its own over the folder."""
    root = tmp_path / "runs"
    root.mkdir()
    with cluster() as there:
        hide = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none {root} && exec "$@"', "sh")
        there.join("--num-cpus=1", before=hide)
        job = there.submit(*sets(*SHORT, f"run.root={root}"))
        _, err = job.communicate(timeout=LIMIT_S)

        assert (job.returncode, str(root) in err, "hosts" in err) == (1, True, True), err
        assert not there.actors()


def test_scorers_sit_on_labelled_hosts_and_leave_one_that_is_drained(tmp_path: Path) -> None:
    """Without such a host the training goes on without scorers, and it is said what is missing."""
    folder = tmp_path / "run"
    wanted = ('scoring.labels={"steppe.io/role"="scorer"}', 'scoring.resources={"scorer"=1}')

    def happened(name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(folder) if event["event"] == name]

    with cluster() as there:
        job = there.submit(*sets(*LONG, *wanted, f"run.folder={folder}"))
        wait_for(while_up(job, lambda: happened("epoch")), "training without scorers")
        assert not happened("scorer_up")
        labelled = ("--num-cpus=2", "--labels=steppe.io/role=scorer", '--resources={"scorer": 1}')
        there.join(*labelled)
        (up,) = wait_for(while_up(job, lambda: happened("scorer_up")), "a scorer on the host that came late")
        wait_for(while_up(job, lambda: happened("committed")), what="scores")
        there.join(*labelled)
        there.drain(up["node_id"])
        wait_for(while_up(job, lambda: len(happened("scorer_up")) == 2), "a scorer on the other host")
        other = happened("scorer_up")[1]
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=LIMIT_S)

    assert other["node_id"] != up["node_id"]
    assert next(event["reason"] for event in happened("scorer_down")) == "drained"
    assert "steppe.io/role=scorer" in err  # what a scorer needed and no host had
    assert "scorer-1" in err  # which had to leave its host


def test_workers_on_a_host_that_is_drained_begin_again_on_another(tmp_path: Path) -> None:
    """Exactly where they stopped, and not counted as a failure."""
    folder = tmp_path / "run"
    wanted = ("trainer.num_workers=1", "trainer.cpus=5", "trainer.max_failures=0", "scoring.mode=off")
    with cluster() as there:
        first = there.join("--num-cpus=5", "--labels=place=first")
        job = there.submit(*sets(*LONG, *wanted, f"run.folder={folder}"))
        saved = lambda: any(event["event"] == "state_saved" for event in read_events(folder))  # noqa: E731
        wait_for(while_up(job, saved), "a saved state")
        there.join("--num-cpus=5")
        there.drain(there.node_id("place", "first"))
        wait_for(while_up(job, lambda: len(attempts(folder)) == 2), "the second attempt")
        assert first.poll() is None
        again = attempts(folder)[1]
        wait_for(while_up(job, lambda: last_step(folder) > again.fork_step), "training elsewhere")
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=LIMIT_S)

    assert f"step {again.fork_step}" in err


def last_step(folder: Path) -> int:
    return max(int(event["step"]) for event in read_events(folder) if event["event"] == "published")
