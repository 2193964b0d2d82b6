"""The README's commands do what it says: the quickstart runs, and every example answers beside a run that is up."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.events import read_events
from tests.system.runs import RunningRun
from tests.waiting import LIMIT_S

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# This suite itself, what CI runs before it, and what measures for minutes.
NOT_HERE = ("./deploy/local test", "./deploy/local check", "./deploy/local steppe bench")
NEW_RUN = "./deploy/local run"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if not line.startswith(NOT_HERE)]


class Place:
    """A folder to run the README's commands in, and the run in `runs/` below it that they speak to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunningRun(folder / "runs" / "live", "train.epochs=100000", "model.width=8", cwd=folder)

    @functools.cached_property
    def service(self) -> str:
        """Host and port that the run took."""
        return urlsplit(self.run.runtime()["url"]).netloc

    def shell(self, command: str) -> str:
        """Return what a command of the README prints, here: beside the port that the run took."""
        for named, here in (
            ("./deploy/local", str(ROOT / "deploy/local")),
            ("deploy/configs", str(ROOT / "deploy/configs")),
            (".venv/bin/python", sys.executable),
            ("localhost:7471", self.service),
        ):
            command = command.replace(named, here)
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=False, cwd=self.folder, timeout=2 * LIMIT_S
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("readme"))
    try:
        place.run.scored()
        assert place.service
        yield place
    finally:
        place.run.stop_for_good()


def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command of the README, to its end. A RAY_ADDRESS in the environment is not followed."""
    assert commands()[0] == NEW_RUN
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    folder = tmp_path / "runs" / "first"
    options = [
        f"--set={one}"
        for one in (
            f"run.folder={folder}",
            "rest.port=0",
            "run.tensorboard=true",
            "scoring.nice=0",
            "train.startup_wait_s=200",
        )
    ]
    done = subprocess.run(
        [ROOT / "deploy/local", "run", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=4 * LIMIT_S,
    )

    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    check_summary(json.loads((folder / "summary.json").read_text()))
    assert {file.stem for file in (folder / "logs").iterdir()} == {"driver", "controller", "rest", "scorer-1"}
    assert all(file.stat().st_size for file in (folder / "logs").iterdir())
    happened = [event["event"] for event in read_events(folder)]
    assert (happened[0], happened[-1]) == ("started", "finished")
    assert {"published", "committed", "scorer_up", "scorer_down", "rest_up", "epoch"} <= set(happened)
    curves = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"train/loss", "test/accuracy", "scores/fresh_share", "scores/fidelity"} <= set(curves.Tags()["scalars"])


def check_summary(summary: dict[str, float]) -> None:
    """The quickstart's promises, apart from its times."""
    assert summary["test_accuracy"] >= 0.95
    assert summary["coverage"] == 1.0
    assert summary["model_versions_scored"] > 0
    assert summary["quarantined_rows"] == 0
    shares = [summary[f"draws_{status}"] for status in ("fresh", "stale", "unscored")]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > 0
    expected = """test_accuracy seconds steps model_versions_published model_versions_scored scored_rows coverage
        age_versions_p50 age_versions_p95 draws_fresh draws_stale draws_unscored staleness_bound
        scorer_samples_per_second trainer_seconds_in_publish trainer_seconds_in_sampler trainer_seconds_total
        quarantined_rows run_folder attempts scoring_mode seconds_to_first_score_p50 seconds_to_first_score_p95
        trainer_seconds_in_save trainer_seconds_in_scoring checkpoints_failed
        checkpoints_superseded states_failed scores_unreadable reports fidelity_mean fidelity_min audits
        trainer_forward_equivalents scorer_forward_equivalents"""
    assert set(expected.split()) == set(summary)


def test_rest_examples(place: Place) -> None:
    by_path: dict[str, Any] = {}
    for command in commands():
        if command.startswith("curl"):
            by_path[command.split("localhost:7471")[1].split()[0].strip("'")] = place.shell(command)
    snapshot, metrics, image = (
        by_path.pop(path) for path in ("/v1/scores/snapshot", "/metrics", "/v1/samples/7/image?scale=8")
    )
    by_path = {path: json.loads(answer) for path, answer in by_path.items()}

    assert "shape: (9, 14)" in snapshot  # nine figures of thirteen columns
    assert "steppe_coverage " in metrics
    assert image == ""
    assert (place.folder / "seven.png").read_bytes().startswith(b"\x89PNG")
    assert by_path["/v1/samples/7"]["sample_id"] == 7
    assert by_path["/v1/samples/7?max_age_versions=4"]["status"] in ("fresh", "stale", "unscored")
    assert by_path["/v1/samples/7/history"]["sample_id"] == 7
    assert by_path["/v1"]["api"] == "v1"
    assert by_path["/v1/stats"]["coverage"] == 1
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
    assert len(by_path) == 14


def test_python_examples(place: Place) -> None:
    for code in blocks("python"):
        code_here = code.replace("NAME", place.run.folder.name)
        subprocess.run([sys.executable, "-c", code_here], check=True, cwd=place.folder, timeout=LIMIT_S)


def test_commands(place: Place) -> None:
    """In the order of the README: `steppe down` ends the run that those before it speak to."""
    said = {}
    for command in commands():
        if command.startswith(("./deploy/local steppe", f"{NEW_RUN} ")):
            word = next(word for word in reversed(command.split()) if word in EXPECTED)
            said[word] = place.shell(command)

    assert said.keys() == EXPECTED.keys()
    for word, expected in EXPECTED.items():
        assert expected in said[word], word
    assert place.run.finish()[0] == 130


EXPECTED = {  # by a word of the command: what it prints
    "status": "coverage",
    "top": "published",
    "query": "159",
    "scale": "2 scorers wanted",
    "runs": "running",
    "scores.parquet": "wrote 1437 scores",
    "--suspects": "mislabelled",
    "stats": "fragments",
    "down": "stopped",
    "scoring.replicas=2": '"steps": 115',
    "--dry-run": "full scoring pass",
    "doctor": "REST port",
    "config": "[train.sam]",
}
