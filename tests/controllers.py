"""A controller of six samples in blocks of two, driven by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.config import ControllerConfig
from services.controller import Controller
from shared.leases import Lease
from tests.rows import make_rows

SAMPLES, BLOCK = 6, 2


def open_controller(run: Path, **settings: Any) -> Controller:
    config = {"block_size": BLOCK, "commit_interval_s": 0.01, "audit_share": 0} | settings
    return Controller(str(run), SAMPLES, "id", ControllerConfig(**config), wanted=2)


@contextmanager
def controller_of(run: Path, **settings: Any) -> Iterator[Controller]:
    controller = open_controller(run, **settings)
    try:
        yield controller
    finally:
        controller.close()


def score(controller: Controller, version: int, failed: dict[int, str] | None = None, **columns: Any) -> Lease:
    """Lease a block, hand in its rows."""
    lease = controller.lease("a", version)
    assert lease is not None
    controller.submit("a", lease.lease_id, make_rows(lease.sample_ids, version, **columns), failed or {})
    return lease
