"""Submitting a run to a Ray cluster as a job: check here, send packages and settings, follow, return its code."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import tenacity

from deploy.config import RunConfig
from deploy.driver import check_folder_stays
from deploy.packages import code_folder, stage
from shared.config import read_config
from shared.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONFIG_FILE = "steppe-run.toml"
GUESSED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray lets them overrule an address that was given
STOP_WAIT_S = 60  # for a run to stop in order; Ray's own is 3
POLL_INTERVAL_S = 0.5
LOST_AFTER_S = 120.0
FAILED, STOPPED = 1, 130  # exit codes of a job that left none


_PATIENTLY = tenacity.Retrying(  # a cluster that has just started
    retry=tenacity.retry_if_exception_message(match=".*No available agent"),
    stop=tenacity.stop_after_delay(30),
    wait=tenacity.wait_fixed(POLL_INTERVAL_S),
    reraise=True,
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted run: its id with the cluster, its state there, and once it has ended its exit code."""

    submission_id: str
    address: str
    status: str
    exit_code: int | None


class Submission:
    """One run on its way through a cluster.

    Raises: ConfigError when there is no cluster at `address`, when it does not accept our token, or when its Ray is
        another than ours.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with _without(GUESSED):
            self._client = _connect(address)
        self.submission_id = ""

    def send(self, path: str, settings: Sequence[str], working_dir: str | Path | None, *, resume: bool) -> None:
        """Start the job with our packages, the files of `working_dir`, and the settings.

        Raises: ConfigError for a `working_dir` that cannot be sent (`deploy.packages.stage`).
        """
        options = [f"--set={setting}" for setting in settings] + ["--resume"] * resume
        with tempfile.TemporaryDirectory(prefix="steppe-submit-") as folder:
            stage(Path(folder), working_dir)
            shutil.copy(path, Path(folder) / CONFIG_FILE)
            command = ["python", "-m", "deploy", "run", CONFIG_FILE, *options, "--address", "auto"]
            try:
                self.submission_id = _PATIENTLY(
                    self._client.submit_job,
                    entrypoint=shlex.join(command),
                    runtime_env={
                        "working_dir": folder,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
                    },
                )
            except (RuntimeError, OSError) as error:
                raise ServiceError(
                    f"the cluster at {self.address} did not take the job: {error}",
                    fix=f"look for the reason at {self.address}, and submit again",
                    key="--address",
                ) from error

    def follow(self, log: TextIO) -> None:
        """Copy the job's log as it grows, until the job has ended; a lost connection is taken up again.

        In a thread of its own, which goes on after Ctrl-C: the main one hears that.
        """
        ended: Future[None] = Future()

        def work() -> None:
            try:
                ended.set_result(asyncio.run(self._follow(log)))
            except BaseException as error:
                ended.set_exception(error)

        threading.Thread(target=work, name="job log", daemon=True).start()
        ended.result()

    def stop(self) -> None:
        """Ask the job to stop in order, and wait until it has."""
        self._client.stop_job(self.submission_id)
        while not self._has_ended():
            time.sleep(POLL_INTERVAL_S)

    def job(self) -> Job:
        info = self._client.get_job_info(self.submission_id)
        code = info.driver_exit_code
        status = str(info.status.value)
        if code is None and info.status.is_terminal():
            code = {"SUCCEEDED": 0, "STOPPED": STOPPED}.get(status, FAILED)
        return Job(self.submission_id, self.address, status, code)

    async def _follow(self, log: TextIO) -> None:
        import aiohttp

        printed, lost_at = 0, None
        while True:
            try:
                async for text in _skipping(self._client.tail_job_logs(self.submission_id), printed):
                    log.write(text)
                    log.flush()
                    printed, lost_at = printed + len(text), None
                if self._has_ended():
                    return
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > LOST_AFTER_S:
                    raise ServiceError(
                        f"the cluster at {self.address} does not answer any more ({error})",
                        fix="look for the job, which may go on: ray job logs --follow "
                        f"{self.submission_id} --address {self.address}",
                        key=self.submission_id,
                    ) from error
            await asyncio.sleep(POLL_INTERVAL_S)

    def _has_ended(self) -> bool:
        return bool(self._client.get_job_status(self.submission_id).is_terminal())


def submit(
    path: str,
    settings: Sequence[str],
    address: str,
    *,
    working_dir: str | Path | None = None,
    resume: bool = False,
    wait: bool = True,
    log: TextIO = sys.stdout,
) -> Job:
    """Submit the run that `path` and `settings` describe, and follow it to its end unless `wait` is off.

    The current folder goes along where the user's own modules lie in it, unless `working_dir` says another.

    Ctrl-C asks, on a terminal, whether the job is to stop too; without one it stops.

    Raises: as `Submission` does; ConfigError for settings that cannot work, before anything is sent.
    """
    config = read_config(RunConfig, path, settings)
    check_folder_stays(config, in_job=True)
    working_dir = working_dir or code_folder(config)
    with _quiet():
        return _submit(path, settings, address, working_dir=working_dir, resume=resume, wait=wait, log=log)


def _submit(
    path: str,
    settings: Sequence[str],
    address: str,
    *,
    working_dir: str | Path | None,
    resume: bool,
    wait: bool,
    log: TextIO,
) -> Job:
    submission = Submission(address)
    submission.send(path, settings, working_dir, resume=resume)
    sys.stderr.write(f"submitted {submission.submission_id} to {address}\n")
    if wait:
        try:
            submission.follow(log)
        except KeyboardInterrupt:
            if not _wants_to_stop():
                sys.stderr.write(
                    f"left running: ray job logs --follow {submission.submission_id} --address {address}\n"
                )
                return submission.job()
            sys.stderr.write("stopping the job in order; Ctrl-C once more leaves it to itself\n")
            submission.stop()
    return submission.job()


def _wants_to_stop() -> bool:
    """Asked on a terminal; a second Ctrl-C there means yes."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    try:
        sys.stderr.write("\nstop the job too? [Y/n] ")
        sys.stderr.flush()
        return not sys.stdin.readline().strip().lower().startswith("n")
    except KeyboardInterrupt:
        return True


def _connect(address: str) -> "JobSubmissionClient":
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address is {address!r}, but a job is sent to the cluster's dashboard",
            fix="name that, such as http://HEAD:8265",
            key="--address",
        )
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} does not accept our token: {str(error).splitlines()[0].rstrip('.')}",
            fix="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's",
            key="RAY_AUTH_TOKEN",
        ) from error
    except Exception as error:  # connection, TLS, another service: Ray passes on whatever its HTTP library raises
        raise ServiceError(
            f"no Ray cluster answers at {address}: {error}",
            fix="start one, or name the dashboard of one that is up",
            key="--address",
        ) from error
    theirs = getattr(client, "_server_ray_version", None)  # what the client has asked for its own check
    if theirs is not None and theirs != ray.__version__:
        raise ConfigError(
            f"the cluster at {address} has Ray {theirs}, here is Ray {ray.__version__}",
            fix=f"install ray=={theirs} here, or make the cluster's image anew",
            key="--address",
        )
    return client


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Ray does not tell what it uploads and that a log has ended."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Inside, the environment lacks these variables."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


async def _skipping(texts: AsyncIterator[str], count: int) -> AsyncIterator[str]:
    """`texts` but for their first `count` characters, which were printed before the connection was lost."""
    async for text in texts:
        if count < len(text):
            yield text[count:]
        count = max(count - len(text), 0)
