"""Commands that neither train nor score load neither torch nor ray."""

import subprocess
import sys

import pytest

from deploy.bench.recovery import QUICKSTART


@pytest.mark.parametrize(
    "arguments", [["config", "validate", str(QUICKSTART)], ["runs", "--json"]], ids=["validate", "runs"]
)
def test_command_is_light(arguments: list[str]) -> None:
    script = (
        "import contextlib, sys\nfrom deploy.cli import app\n"
        f"with contextlib.suppress(SystemExit):\n    app({arguments!r})\n"
        "print(*sorted({'torch', 'ray'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout
    assert done.stderr == "\n"
