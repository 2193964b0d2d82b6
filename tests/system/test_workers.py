"""Processes that train cells: replaced after their share, and told by name when they fail."""

import os
import signal
from pathlib import Path

import pytest

from deploy.compare.workers import Workers
from deploy.interrupts import Interrupts
from shared.errors import CellFailed
from tests.raising import refuses


class Job:
    """What a worker can be given without torch."""

    def __init__(self, does: str, slots: int = 1) -> None:
        self.does, self.slots = does, slots

    def __str__(self) -> str:
        return f"the job {self.does}"


def do(job: Job) -> None:
    print("at work", flush=True)
    if job.does == "raise":
        raise ZeroDivisionError("divided")
    if job.does == "fill":
        raise OSError(28, "No space left on device", "somewhere")
    if job.does == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_are_replaced_and_no_job_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More slots than cores run alone, and a worker ends after its share of jobs."""
    monkeypatch.setattr("deploy.compare.workers.CELLS_PER_PROCESS", 2)
    jobs = [Job("nothing", slots=1 + 2 * (number == 3)) for number in range(7)]
    done: list[Job] = []
    with Workers(do, tmp_path / "log", Interrupts()) as workers:
        workers.run(jobs, 2, done.append)

    assert sorted(map(id, done)) == sorted(map(id, jobs))
    assert (tmp_path / "log").read_text().count("at work") == 7


@pytest.mark.parametrize(
    ("does", "value", "fix"),
    [
        ("raise", "ZeroDivisionError: divided", ""),
        ("fill", "No space left on device: somewhere", ""),
        ("die", "SIGKILL", "--cores"),
    ],
)
def test_a_job_that_fails_is_told_by_its_name(tmp_path: Path, does: str, value: str, fix: str) -> None:
    done: list[Job] = []
    with (
        refuses(CellFailed, str(tmp_path / "log"), value) as caught,
        Workers(do, tmp_path / "log", Interrupts()) as workers,
    ):
        workers.run([Job("nothing"), Job(does), Job("nothing")], 1, done.append)

    assert f"the job {does}" in caught.value.problem
    assert fix in caught.value.fix
    assert len(done) == 1
