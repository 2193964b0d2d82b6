"""Stopping a run from outside."""

import contextlib
import time

import psutil

from deploy.cluster import end_processes, remove_ray_folder
from shared.catalogue import Run, is_running
from shared.errors import ServiceError

STOP_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.05


def stop_run(run: Run) -> str:
    """Ask the driver to stop and wait for it; then end what is left of the run's cluster. Returns what was done."""
    runtime = run.runtime() or {}
    stopped = _stop_driver(runtime) if runtime else False
    left = end_processes(run.path)
    remove_ray_folder(runtime.get("ray_folder"))
    run.remove("runtime.json")
    if stopped:
        return f"stopped {run.path}"
    return f"ended {left} processes that {run.path} had left" if left else f"{run.path} was not up"


def _stop_driver(runtime: dict[str, object]) -> bool:
    """False when the driver is gone already. A pid that another process has by now is left alone."""
    if not is_running(runtime):
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        driver = psutil.Process(int(str(runtime["pid"])))
        with contextlib.suppress(psutil.NoSuchProcess):  # from here on, gone means stopped
            driver.terminate()
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:  # a zombie waits for its parent only
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"the driver (pid {driver.pid}) did not stop within {STOP_TIMEOUT_S:.0f} s",
                        fix="end it at once by `steppe down` once more",
                        key=str(driver.pid),
                    )
                time.sleep(POLL_INTERVAL_S)
        return True
    return False
