"""The layers of the project: who may import whom, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "shared": {"shared"},
    "scorer": {"scorer", "shared"},
    "trainer": {"trainer", "shared"},
    "services": {"services", "shared"},
    "deploy": {"deploy", "services", "trainer", "scorer", "shared"},
}
OURS = set(MAY_IMPORT) | {"tests"}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stderr.split())


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_follow_the_layers(package: str) -> None:
    files = sorted((ROOT / package).glob("**/*.py"))

    assert files
    for path in files:
        assert imported_packages(path) & OURS <= MAY_IMPORT[package], path


def test_only_deploy_imports_ray() -> None:
    for package in set(MAY_IMPORT) - {"deploy"}:
        for path in (ROOT / package).glob("**/*.py"):
            assert "ray" not in imported_packages(path), path


@pytest.mark.parametrize(
    "code",
    [
        "import shared.score_store, shared.catalogue, shared.checkpoints, shared.datasets, services.api, "
        "deploy.config, deploy.export, deploy.plan, deploy.doctor, deploy.compare.compare",
        "import contextlib, sys\nsys.argv[1:] = ['--help']\nfrom deploy.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main()",
    ],
    ids=["store, catalogue, configuration, REST", "steppe --help"],
)
def test_is_light(code: str) -> None:
    """Neither torch nor ray is loaded."""
    assert not modules_after(code) & {"torch", "torchvision", "ray"}


def test_top_level_holds_only_what_it_should() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    top = {name.split("/")[0] for name in listed}

    expected = {"pyproject.toml", "services", "trainer", "scorer", "shared", "deploy", "tests", "README.md", "LICENSE"}
    assert expected == {name for name in top if not name.startswith(".")}


def test_tests_are_not_packaged() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import tests"], capture_output=True, text=True, check=False, cwd=ROOT.parent
    )

    assert "No module named 'tests'" in done.stderr
