"""What the tests of the worker share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.controller import Controller
from shared.checkpoints import CheckpointPublisher
from tests.scorers import open_controller


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    controller = open_controller(tmp_path)
    yield controller
    controller.close()


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[CheckpointPublisher]:
    with CheckpointPublisher(tmp_path) as publisher:
        yield publisher
