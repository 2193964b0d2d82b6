"""One Ray cluster for all tests of actors."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="st-")
    # As the driver does: workers must not find a stranger in the working directory.
    with contextlib.chdir(folder):
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            _system_config={"worker_niceness": 0},  # as runs have it
        )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
