"""What is sent to a cluster, and what is refused before."""

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenacity

from deploy.cluster import joined_cluster, why_unreachable
from deploy.config import RunConfig
from deploy.driver import check_folder_stays
from deploy.packages import PACKAGES, code_folder, stage
from deploy.submit import Submission, submit
from shared.catalogue import Run
from shared.errors import ConfigError, ServiceError
from shared.samples import Images
from tests.raising import refuses

QUICKSTART = Path(__file__).parents[2] / "deploy/configs/quickstart.toml"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_packages_are_staged_side_by_side_without_caches_and_results(tmp_path: Path) -> None:
    stage(tmp_path)
    staged = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}

    assert names(tmp_path) == set(PACKAGES)
    assert {"deploy/cli.py", "deploy/configs/quickstart.toml", "services/openapi.json"} <= staged
    assert not [name for name in staged if "__pycache__" in name or name.startswith("deploy/results")]


def test_a_working_dir_goes_along_but_for_what_git_ignores(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "nets").mkdir(parents=True)
    for name in ("nets/big.py", "data.bin", ".gitignore", "new.py"):
        (mine / name).write_text("*.bin\n" if name == ".gitignore" else name)
    subprocess.run(["git", "init", "-q"], cwd=mine, check=True)
    stage(tmp_path / "a", mine)
    (mine / ".git").rename(tmp_path / "git")
    stage(tmp_path / "b", mine)

    assert names(tmp_path / "a") == {*PACKAGES, "nets", ".gitignore", "new.py"}
    assert names(tmp_path / "b") == {*PACKAGES, "nets", "data.bin", "new.py"}
    assert (tmp_path / "a/nets/big.py").read_text() == "nets/big.py"


def test_runs_stay_where_they_are(tmp_path: Path) -> None:
    for name in ("nets.py", "runs/old/run.json", "runs/notes.txt"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).touch()
    stage(tmp_path / "staged", tmp_path / "mine")

    assert names(tmp_path / "staged") == {*PACKAGES, "nets.py", "runs"}
    assert names(tmp_path / "staged/runs") == {"notes.txt"}


def test_the_current_folder_goes_along_where_own_modules_lie_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "adapters.py").touch()
    installed = RunConfig.model_validate({"data": "sklearn.datasets:load_digits", "model": "torchvision.models:vgg16"})
    model = RunConfig.model_validate({"model": "mypkg.nets:build"})
    adapter = RunConfig.model_validate({"data": {"name": "sklearn.datasets:load_digits", "adapter": "adapters:to_xy"}})

    assert code_folder(RunConfig()) is None
    assert code_folder(installed) is None
    assert code_folder(model) == code_folder(adapter) == tmp_path


@pytest.mark.parametrize("name", ["trainer.py", "shared/x.py"])
def test_a_working_dir_that_would_hide_our_packages_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).touch()

    with refuses(ConfigError, "--working-dir", f" {name.partition('.')[0].partition('/')[0]},"):
        stage(tmp_path / "staged", tmp_path / "mine")


@pytest.mark.parametrize(
    ("settings", "in_job", "key", "value"),
    [
        ({}, False, None, None),
        ({}, True, "run.root", "'runs'"),
        ({"root": "/disk/runs"}, True, None, None),
        ({"root": "/disk/runs", "folder": "mine"}, True, "run.folder", "'mine'"),
        ({"root": "file:///disk/runs"}, True, None, None),
    ],
    ids=str,
)
def test_a_run_folder_that_goes_with_the_job_is_refused(
    settings: dict[str, str], in_job: bool, key: str | None, value: str | None
) -> None:
    config = RunConfig.model_validate({"run": settings})
    if key is None:
        check_folder_stays(config, in_job=in_job)
        return
    with refuses(ConfigError, key, value):
        check_folder_stays(config, in_job=in_job)


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:8265", "ray://10.0.0.1:10001"])
def test_an_address_that_is_no_dashboard_is_refused(address: str) -> None:
    with refuses(ConfigError, "--address", address):
        Submission(address)


def test_a_cluster_that_does_not_answer_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's address is not taken in place of the one that was given."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")

    with refuses(ServiceError, "--address", "http://127.0.0.1:1"):
        Submission("http://127.0.0.1:1")
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:2"


class FakeClient:
    """The cluster's end: a job whose log breaks off twice."""

    def __init__(self, ray_version: str = "", exit_code: int | None = 3) -> None:
        self._server_ray_version = ray_version
        self._exit_code = exit_code
        self._breaks = [5, 9]
        self.asked: dict[str, Any] = {}
        self.refused = 2

    def submit_job(self, **asked: Any) -> str:
        self.refused -= 1
        if self.refused >= 0:
            raise RuntimeError(
                "Request failed with status code 500: No available agent to submit job, please try again"
            )
        self.asked = asked | {"files": names(Path(asked["runtime_env"]["working_dir"]))}
        return "raysubmit_1"

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        text, size = "one\ntwo\nthree\n", self._breaks.pop(0) if self._breaks else 99
        for start in range(0, min(size, len(text)), 3):
            yield text[start : min(start + 3, size)]
        if size < len(text):
            raise RuntimeError("the connection closed")

    def get_job_status(self, submission_id: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: not self._breaks)

    def get_job_info(self, submission_id: str) -> Any:
        status = SimpleNamespace(is_terminal=lambda: True, value="FAILED")
        return SimpleNamespace(driver_exit_code=self._exit_code, status=status)


class Log:
    """Where the job's log goes."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_a_cluster_that_is_gone_is_not_followed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient()
    client._breaks = [0] * 99
    monkeypatch.setattr("deploy.submit._connect", lambda address: client)
    monkeypatch.setattr("deploy.submit.POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr("deploy.submit._PATIENTLY.wait", tenacity.wait_none())
    monkeypatch.setattr("deploy.submit.LOST_AFTER_S", 0.05)

    with refuses(ServiceError, "raysubmit_1", "http://head:8265"):
        submit(str(QUICKSTART), ["run.root=/disk/runs"], "http://head:8265", log=Log())  # type: ignore[arg-type]


@pytest.mark.parametrize(("left", "expected"), [(3, 3), (None, 1)], ids=["its exit code", "without one"])
def test_a_job_is_followed_without_gaps_and_its_exit_code_returned(
    monkeypatch: pytest.MonkeyPatch, left: int | None, expected: int
) -> None:
    client, log = FakeClient(exit_code=left), Log()
    monkeypatch.setattr("deploy.submit._connect", lambda address: client)
    monkeypatch.setattr("deploy.submit.POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr("deploy.submit._PATIENTLY.wait", tenacity.wait_none())
    settings = ["run.root=/disk/runs", "train.epochs=2"]
    job = submit(str(QUICKSTART), settings, "http://head:8265", log=log)  # type: ignore[arg-type]

    assert log.text == "one\ntwo\nthree\n"
    assert (job.submission_id, job.status, job.exit_code) == ("raysubmit_1", "FAILED", expected)
    assert client.asked["entrypoint"] == (
        "python -m deploy run steppe-run.toml --set=run.root=/disk/runs --set=train.epochs=2 --address auto"
    )
    assert client.asked["files"] == {*PACKAGES, "steppe-run.toml"}


def test_a_cluster_of_another_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: FakeClient("2.51.0"))

    with refuses(ConfigError, "--address", "2.51.0") as caught:
        Submission("http://head:8265")
    assert "ray==2.51.0" in caught.value.fix


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("Version mismatch: The cluster was started with: Ray: 2.51.0"), "Version mismatch: The cluster"),
        (ConnectionError("Could not find any running Ray instance."), "Could not find any running Ray instance"),
    ],
    ids=["another Ray", "no cluster"],
)
def test_a_cluster_that_cannot_be_joined_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    """What Ray compares before anything else, versions of Ray and Python, is said as it says it."""
    images = Images(np.zeros((10, 1, 2, 2), np.uint8), np.arange(10) % 2, white=1, num_classes=2)
    run = Run.create(tmp_path / "run", dataset_fingerprint="f", train=images, config={}, scoring_id="s")

    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr("ray.init", init)

    with refuses(ConfigError, "--address", expected), joined_cluster("auto", run):
        raise AssertionError
    with (
        refuses(ConfigError, "--address", "ray://head:10001"),
        joined_cluster("ray://head:10001", run),
    ):
        raise AssertionError


def test_a_host_says_why_it_cannot_work_on_a_run(tmp_path: Path) -> None:
    images = Images(np.zeros((10, 1, 2, 2), np.uint8), np.arange(10) % 2, white=1, num_classes=2)
    run = Run.create(tmp_path / "run", dataset_fingerprint="f", train=images, config={}, scoring_id="s")

    assert why_unreachable(str(run.path), "run") is None
    assert why_unreachable(str(run.path), "other") == f"{run.path} is another folder here"
    assert why_unreachable(str(tmp_path / "none"), "run") == "it does not see the run there"
