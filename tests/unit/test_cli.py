"""What a user's mistake looks like: one clear line, an exit code, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deploy/configs/quickstart.toml"


def steppe(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).parent / "steppe"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.toml"], "no configuration file 'nowhere.toml'"),
        (
            ["run", str(QUICKSTART), "--set", "train.epoch=3"],
            "train.epoch: unknown setting; did you mean train.epochs?",
        ),
        (
            ["run", str(QUICKSTART), "--set", "train.epochs=0"],
            "train.epochs = 0: Input should be greater than or equal to 1",
        ),
        (["run", str(QUICKSTART), "--set", "train.epochs"], "write it as section.key=value"),
        (
            [
                "run",
                str(QUICKSTART),
                "--set",
                "data.name=fashion_mnist",
                "--set",
                "data.root=nowhere",
                "--set",
                "rest.port=0",
            ],
            "dataset-fashion-mnist",
        ),
        (["status"], "no run in"),
        (["status", "nowhere"], "is not a run folder"),
        (["scale", "2"], "no run in"),
        (["down"], "no run in"),
    ],
    ids=lambda value: " ".join(map(os.path.basename, value)) if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = steppe(*arguments, cwd=tmp_path)

    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    done = steppe("scale", "many", cwd=tmp_path)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_stranger_named_like_a_package_of_ours_is_named(tmp_path: Path) -> None:
    """`python -m deploy` looks in the working directory first."""
    (tmp_path / "trainer.py").write_text("raise SystemExit('the stranger was run')")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "deploy", "run", str(QUICKSTART)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=60
    )

    assert done.returncode == 1
    assert str(tmp_path / "trainer.py") in done.stderr
    assert "rename" in done.stderr


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = steppe("run", str(QUICKSTART), "--set", f"rest.port={port}", cwd=tmp_path)

    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert not (tmp_path / "runs").exists()
