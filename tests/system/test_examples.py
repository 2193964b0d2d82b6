"""The example scripts do what their first lines say, in a folder of their own; steppe as a script uses it."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deploy.cluster import end_processes, processes_of
from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.score_store import ScoreReader
from tests.system.runs import EXAMPLES, QUICKSTART, STEPPE, wait_until_scored
from tests.waiting import LIMIT_S, wait_for


def python(folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, check=False, cwd=folder, text=True, timeout=2 * LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and two short runs of the quickstart, `a` and `b`."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, folder, dirs_exist_ok=True)
    for seed, name in enumerate("ab"):
        given = (f"run.folder={folder / name}", "rest.port=0", "scoring.mode=every_epoch", "train.epochs=3")
        options = [f"--set={one}" for one in (*given, f"train.seed={seed}", "data.label_noise=0.1", "model.width=8")]
        subprocess.run([STEPPE, "run", str(QUICKSTART), *options], check=True, capture_output=True, timeout=2 * LIMIT_S)
    return folder


def test_watch_difficulty(runs: Path) -> None:
    said = python(runs, "watch_difficulty.py", "a", "3", "14")

    assert "sample 14" in said
    assert said.count("model_version") == 3


def test_export_suspects(runs: Path) -> None:
    said = python(runs, "export_suspects.py", "a", "suspects.csv")
    lines = (runs / "suspects.csv").read_text().splitlines()

    assert "of 1437 scored samples are suspects" in said
    assert lines[0].startswith("sample_id,key,label,predicted,loss")
    losses = [float(line.split(",")[4]) for line in lines[1:]]
    assert len(losses) > 50
    assert losses == sorted(losses, reverse=True)


def test_compare_runs(runs: Path) -> None:
    said = python(runs, "compare_runs.py", "a", "b")

    assert "1437 of 1437 samples are scored in both" in said
    (agreement,) = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("loss")]
    assert 0.3 < agreement < 1


def test_a_run_is_replayed_bit_for_bit_and_only_on_its_data(runs: Path) -> None:
    """Also the draws' worth is as it was; scores are neither made nor read."""
    options = ["--json", "--set", "rest.port=0"]
    done = subprocess.run(
        [STEPPE, "run", "--replay", "a", "--set", "run.folder=replayed", *options],
        capture_output=True,
        check=False,
        cwd=runs,
        text=True,
        timeout=2 * LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    first, replayed = json.loads((runs / "a" / "summary.json").read_text()), json.loads(done.stdout)
    for key in ("steps", "test_accuracy", "draws_fresh", "draws_stale", "draws_unscored", "age_versions_p95"):
        assert first[key] == replayed[key], key
    assert not (runs / "replayed" / "scores").exists()
    last = [sorted((runs / name / "checkpoints").glob("*/weights.safetensors"))[-1] for name in ("a", "replayed")]
    assert last[0].read_bytes() == last[1].read_bytes()

    again = subprocess.run(  # what was replayed was logged too
        [STEPPE, "run", "--replay", "replayed", "--set", "run.folder=changed", "--set", "data.noise_seed=1", *options],
        capture_output=True,
        check=False,
        cwd=runs,
        text=True,
        timeout=2 * LIMIT_S,
    )
    assert again.returncode == 1
    assert "data set" in again.stderr
    assert not (runs / "changed").exists()


@pytest.mark.slow
def test_a_run_with_scorers_beside_it_that_was_interrupted_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    """When scores come is chance; which samples were drawn by them is not, once it is logged."""
    options = ["--json", "--set=rest.port=0"]
    settings = (f"run.folder={tmp_path / 'a'}", "model.width=8", "train.epochs=100", "train.curriculum.form=weighting")
    settings += ("scoring.nice=0", "train.startup_wait_s=200")
    first = subprocess.Popen(
        [STEPPE, "run", str(QUICKSTART), *options, *(f"--set={one}" for one in settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until_scored(tmp_path / "a", first)
        wait_for(lambda: list((tmp_path / "a" / "train").glob("state-*.json")), "a saved state")
        first.send_signal(signal.SIGINT)
        _, err = first.communicate(timeout=LIMIT_S)
    finally:
        first.kill()
        end_processes(tmp_path / "a")
    assert first.returncode == 130, err
    commands = (["run", str(tmp_path / "a"), "--resume"], ["run", "--replay", str(tmp_path / "a")])
    summaries = []
    for command, more in zip(commands, ([], [f"--set=run.folder={tmp_path / 'b'}"]), strict=True):
        done = subprocess.run(
            [STEPPE, *command, *options, *more], capture_output=True, check=False, text=True, timeout=4 * LIMIT_S
        )
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads(done.stdout))

    assert summaries[0]["draws_fresh"] == summaries[1]["draws_fresh"] > 0
    last = [sorted((tmp_path / name / "checkpoints").glob("*/weights.safetensors"))[-1] for name in "ab"]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.fixture
def scoring(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`steppe score own_loop.toml` in a copy of the examples, beside a `trainer.py` of the user's."""
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "trainer.py").write_text("raise SystemExit('not this one')\n")
    process = subprocess.Popen(
        [STEPPE, "score", "own_loop.toml", "--set", "rest.port=0", "--set", "scoring.nice=0"],
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        start_new_session=True,
    )
    yield process
    process.kill()
    end_processes(tmp_path / "runs" / "digits")


@pytest.mark.slow
def test_own_loop_beside_its_scorers(scoring: subprocess.Popen[str], tmp_path: Path) -> None:
    """The loop imports no Ray; what it published last is scored after it has ended."""
    assert scoring.stderr is not None
    for line in scoring.stderr:
        if line.startswith("ready"):
            break
    (tmp_path / "trainer.py").unlink()  # a script's own folder comes first for Python: there it would be found
    code = "import runpy, sys; runpy.run_path('own_loop.py', run_name='__main__'); assert 'ray' not in sys.modules"
    said = python(tmp_path, "-c", code).splitlines()
    fresh, total = (int(said[-1].split()[at]) for at in (4, 6))
    assert len(said) == 30
    assert total == 30 * 1797
    assert fresh > 0

    reader = ScoreReader(tmp_path / "runs" / "digits" / "scores")
    last = 30 * 29 // 20
    wait_for(lambda: reader.refresh() and int(reader.dense("model_version").min()) == last, "the last scores")
    status = subprocess.run([STEPPE, "status", "runs/digits"], capture_output=True, check=True, cwd=tmp_path, text=True)
    assert f"version {last}, step {20 * last}" in status.stdout
    command = [STEPPE, "run", "runs/digits", "--resume"]
    resumed = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path, text=True)
    assert (resumed.returncode, "steppe score" in resumed.stderr) == (1, True)

    with CheckpointPublisher(tmp_path / "runs" / "digits") as publisher:
        publisher.publish(torch.nn.DataParallel(torch.nn.Linear(2, 2)), 1000)
    assert "checkpoints skipped: 1" in next(line for line in scoring.stderr if "skipped" in line)

    scoring.send_signal(signal.SIGINT)
    assert scoring.wait(LIMIT_S) == 130
    folder = tmp_path / "runs" / "digits"
    assert not processes_of(folder)
    assert Run(folder).runtime() is None
    assert "Traceback" not in scoring.stderr.read()


@pytest.mark.slow
def test_scoring_from_python(tmp_path: Path) -> None:
    """Scorers in the script itself; a second time the same run is gone on with, and other data are refused."""
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    script = """
import time, torch, steppe
from digits import dataset, network

if __name__ == "__main__":
    settings = {"model": "digits:network", "data": "digits:dataset", "run": {"folder": "runs/x"}, "rest": {"port": 0}}
    settings["scoring"] = {"nice": 0}
    for life in range(2):
        resumed_at = 5 if life else None
        with steppe.score(settings) as run, steppe.CheckpointPublisher(run.path, resumed_at=resumed_at) as publisher:
            publisher.publish(network(), step=10 * (life + 1))
            while (run.scores.view().model_version_N != life + 1).any():
                time.sleep(0.05)
            sampler = steppe.CurriculumSampler(run.num_samples, run.scores)
            next(iter(sampler))
            assert sampler.draws.fresh == sampler.draws.total > 0
    settings["data"] = {"name": "digits:dataset", "subset": 100}
    try:
        with steppe.score(settings):
            raise AssertionError
    except steppe.SteppeError as error:
        print(error)
"""
    (tmp_path / "script.py").write_text(script)
    said = python(tmp_path, "script.py")

    assert "data set" in said
    assert not processes_of(tmp_path / "runs" / "x")


def test_the_facade_is_light_and_whole(tmp_path: Path) -> None:
    """Ray comes with `score` alone; all that it lists is there."""
    code = """
import sys, steppe
assert "ray" not in sys.modules
for name in steppe.__all__:
    getattr(steppe, name)
"""
    python(tmp_path, "-c", code)


def test_a_stranger_in_the_place_of_a_package_of_ours_is_named(tmp_path: Path) -> None:
    """And is not run."""
    (tmp_path / "trainer.py").write_text("raise SystemExit('not this one')\n")
    done = subprocess.run(
        [sys.executable, "-c", "import steppe"], capture_output=True, check=False, cwd=tmp_path, text=True
    )

    assert done.returncode == 1
    assert str(tmp_path / "trainer.py") in done.stderr


def test_the_diff_of_the_readme_is_the_example_and_has_six_lines() -> None:
    readme = (EXAMPLES.parents[1] / "README.md").read_text()
    diff = readme.split("```diff\n")[1].split("```")[0].splitlines()
    script = (EXAMPLES / "own_loop.py").read_text().splitlines()
    added, removed = ([line[1:] for line in diff if line[0] == sign] for sign in "+-")

    assert len(added) == 6
    assert not [line for line in added if line not in script]
    assert not [line for line in removed if line in script]
