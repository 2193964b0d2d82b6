"""The README's commands do what it says: the quickstart runs, and every example beside it answers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.cluster import end_processes
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIVE = ("status", "top", "query", "scale", "runs", "export", "store")  # what a second terminal asks of a run that is up
# This suite itself, what CI runs before it, and what the slow tier runs.
NOT_HERE = ("./deploy/local test", "./deploy/local check", "./deploy/local steppe bench")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if not line.startswith(NOT_HERE)]


def shell(command: str) -> str:
    # The examples speak of `python3`'s environment as a user has it; here it is the one that runs the tests.
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def python(code: str, run: Path) -> None:
    subprocess.run([sys.executable, "-c", code.replace("NAME", run.name)], check=True, cwd=ROOT, timeout=60)


@pytest.fixture
def made() -> Iterator[Callable[[], list[Path]]]:
    """The runs that came since the test began; removed with what else the README's commands write."""
    before = set((ROOT / "runs").glob("*"))

    def runs() -> list[Path]:
        return list(set((ROOT / "runs").glob("*")) - before)

    yield runs
    for name in ("scores.parquet", "seven.png"):
        (ROOT / name).unlink(missing_ok=True)
    for run in runs():
        end_processes(run)
        shutil.rmtree(run)


def test_commands_of_the_readme(made: Callable[[], list[Path]]) -> None:
    run_command, *others = commands()
    assert run_command == "./deploy/local run"
    assert "test accuracy" in shell(run_command)
    (quickstart,) = made()
    check_summary(json.loads((quickstart / "summary.json").read_text()))

    process = subprocess.Popen(  # one that is up for as long as the examples take
        ["bash", "-c", f"exec {run_command} --set train.epochs=10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )

    def new_run() -> Path | None:
        assert process.poll() is None, process.communicate()
        return next((run for run in made() if (run / "runtime.json").exists()), None)

    try:
        run = wait_for(new_run, 120, "the README's run")
        ready = "curl -sf localhost:7471/readyz"
        wait_for(lambda: subprocess.run(ready.split(), capture_output=True, check=False).returncode == 0, 120, "scores")
        live = [command for command in others if command.startswith("curl") or command.split()[2] in LIVE]
        check_answers({command: shell(command) for command in live})
        for code in blocks("python"):
            python(code, run)
        down, other_run, plan, doctor, settings = (shell(command) for command in others if command not in live)
        assert "stopped" in down
        assert process.wait(60) == 130
        assert json.loads(other_run)["steps"] == 5 * 23
        assert "full scoring pass" in plan
        assert "REST port" in doctor
        assert "[train.sam]" in settings
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def check_answers(answers: dict[str, str]) -> None:
    """Each example gave what the text around it says."""
    curls = {command: answer for command, answer in answers.items() if command.startswith("curl")}
    assert len(curls) == 18
    plain = {command.split("localhost:7471")[1].split()[0].strip("'"): answer for command, answer in curls.items()}
    snapshot, metrics = plain.pop("/v1/scores/snapshot"), plain.pop("/metrics")
    assert "shape: (9, 14)" in snapshot  # nine figures of thirteen columns
    assert "steppe_coverage " in metrics
    assert plain.pop("/v1/samples/7/image?scale=8") == ""
    assert (ROOT / "seven.png").read_bytes().startswith(b"\x89PNG")
    by_path = {path: json.loads(answer) for path, answer in plain.items()}
    assert by_path["/v1/samples/7"]["sample_id"] == 7
    assert by_path["/v1/samples/7?max_age_versions=4"]["status"] in ("fresh", "stale", "unscored")
    assert by_path["/v1/samples/7/history"]["sample_id"] == 7
    assert by_path["/v1"]["api"] == "v1"
    assert 0 < by_path["/v1/stats"]["coverage"] <= 1
    assert by_path["/v1/scores:query"]["measure"] == "loss"
    assert by_path["/v1/scores:query"]["sample_id"] == [3, 14, 159]
    assert len(by_path["/v1/scores?label=3&order=desc&limit=5"]["sample_id"]) == 5
    assert len(by_path["/v1/histogram?measure=margin&bins=10"]["counts"]) == 10
    assert by_path["/v1/classes"]["label"] == list(range(10))
    assert by_path["/v1/suspects?limit=5"]["measure"] == "loss"
    assert by_path["/v1/checkpoints"]["checkpoints"][0]["model_version"] >= 1
    assert len(by_path["/v1/events?limit=5"]["events"]) == 5
    assert by_path["/readyz"] == {"status": "ok"}
    assert by_path["/v1/scorers"]["wanted"] == 2  # by PATCH, which has the same path
    status, top, query, scale, runs, export, suspects, store = (
        answers[command] for command in answers if command.startswith("./deploy/local steppe")
    )
    assert "coverage" in status
    assert "published" in top
    assert "running" in runs
    assert "159" in query
    assert "2 scorers wanted" in scale
    assert "wrote 1437 scores" in export
    assert "mislabelled" in suspects
    assert "fragments" in store


def check_summary(summary: dict[str, float]) -> None:
    """The quickstart's promises, apart from its times."""
    assert summary["test_accuracy"] >= 0.95
    assert summary["coverage"] == 1.0
    assert summary["model_versions_scored"] >= 3
    assert summary["draws_fresh"] > 0.5
    assert summary["quarantined_rows"] == 0
    assert 0.999 < summary["draws_fresh"] + summary["draws_stale"] + summary["draws_unscored"] < 1.001
    expected = """test_accuracy seconds steps model_versions_published model_versions_scored scored_rows coverage
        age_versions_p50 age_versions_p95 draws_fresh draws_stale draws_unscored staleness_bound
        scorer_samples_per_second trainer_seconds_in_publish trainer_seconds_in_sampler trainer_seconds_total
        quarantined_rows run_folder attempts scoring_mode seconds_to_first_score_p50 seconds_to_first_score_p95
        trainer_seconds_in_save trainer_seconds_in_scoring checkpoints_failed
        checkpoints_superseded states_failed scores_unreadable reports fidelity_mean fidelity_min audits
        trainer_forward_equivalents scorer_forward_equivalents"""
    assert set(expected.split()) == set(summary)
