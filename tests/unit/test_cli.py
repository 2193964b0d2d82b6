"""The command line where it is started; what it says to mistakes is in tests/system/test_bad_input.py."""

import os
import subprocess
import sys
from pathlib import Path

from tests.waiting import LIMIT_S

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deploy/configs/quickstart.toml"


def test_a_stranger_named_like_a_package_of_ours_is_named(tmp_path: Path) -> None:
    """`python -m deploy` looks in the working directory first."""
    (tmp_path / "trainer.py").write_text("raise SystemExit('the stranger was run')")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "deploy", "run", str(QUICKSTART)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=LIMIT_S
    )

    assert done.returncode == 1
    assert str(tmp_path / "trainer.py") in done.stderr
    assert "rename" in done.stderr
